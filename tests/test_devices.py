"""On eight virtual devices a run ends where it ends on one, and moves no more data than Adam's."""

import collections
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dartax
from dartax import _allocation, _dart, _thinning

P = PartitionSpec
pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="XLA_FLAGS were set to fewer than eight devices"
)

# Name: mesh shape, and the specs of kernels, biases and the batch.
LAYOUTS = {
    "data parallel": ((8,), P(), P(), P("x")),
    "fully sharded": ((8,), P("x"), P("x"), P("x")),
    "tensor parallel": ((8,), P(None, "x"), P("x"), P()),
    "two axes": ((4, 2), P("x", "y"), P("y"), P("x")),
}
STEPS = 6


def make_params(width=16):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        {"kernel": jax.random.normal(key, (width, width)) / width**0.5, "bias": jnp.zeros(width)}
        for key in keys
    ]


def loss_fn(params, x):
    for layer in params:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    return jnp.mean((x - 0.5) ** 2)


def assert_close(tree, expected, atol=1e-5):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=atol), tree, expected
    )


def step(optimizer, params, state, x):
    grads = jax.grad(loss_fn)(params, x)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(optimizer, params, batches):
    state = optimizer.init(params)
    jitted = jax.jit(functools.partial(step, optimizer))
    for x in batches:
        params, state = jitted(params, state, x)
    return params, state, jitted


def placed(layout, params):
    shape, kernel, bias, batch = LAYOUTS[layout]
    types = (AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=types)
    params = [
        {
            "kernel": jax.device_put(layer["kernel"], NamedSharding(mesh, kernel)),
            "bias": jax.device_put(layer["bias"], NamedSharding(mesh, bias)),
        }
        for layer in params
    ]
    return params, NamedSharding(mesh, batch)


def collectives(jitted, *arguments):
    """How often the compiled step moves an array of which shape, by which operation."""
    text = jitted.lower(*arguments).compile().as_text()
    found = collections.Counter()
    pattern = (
        r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
    )
    for shapes, operation, _ in re.findall(pattern, text):
        for shape in re.findall(r"\w+\[[\d,]*\]", shapes):
            found[operation, shape] += 1
    return found


@pytest.fixture(scope="module")
def on_one_device():
    batches = jax.random.normal(jax.random.key(1), (STEPS, 16, 16))
    params, _, _ = train(dartax.dart(init_rate=1e-3), make_params(), batches)
    return batches, params


def ends_where_one_device_ends(layout, width, atol=1e-5):
    """Trains on both; returns where the parameters were, and what the devices have at the end."""
    batches = jax.random.normal(jax.random.key(1), (STEPS, 16, width))
    optimizer, params = dartax.dart(init_rate=1e-3), make_params(width)
    expected, expected_state, _ = train(optimizer, params, batches)
    params, batch_sharding = placed(layout, params)
    batches = [jax.device_put(x, batch_sharding) for x in batches]
    after, state, jitted = train(optimizer, params, batches)
    assert_close(after, expected, atol)
    found, wanted = (optax.tree.get(s, "concentration") for s in (state, expected_state))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    return params, after, state, jitted, batches[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("width", "kept"), [(16, 16), (64, 16)])
def test_ends_where_one_device_ends(width, kept, layout, monkeypatch):
    monkeypatch.setattr(_dart, "LEAST", 64)  # of the wider ones every fourth row, ...
    monkeypatch.setattr(_thinning, "TURNS", 2)  # put together from two
    params, after, state, jitted, batch = ends_where_one_device_ends(layout, width)

    # State lies where its parameters lie, and every device has the same draw.
    dart_state = state[0]
    assert dart_state.step_memory[0]["kernel"].shape == (kept, width)
    moments = dart_state.inner_state[0]
    for tree in (after, dart_state.step_memory, moments.mu, moments.nu):
        for leaf, param in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
            assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim)
    for vector in (dart_state.concentration, dart_state.last_rates, dart_state.hypergradient):
        assert vector.sharding.is_fully_replicated
        shards = [np.asarray(shard.data) for shard in vector.addressable_shards]
        assert all(np.array_equal(shard, shards[0]) for shard in shards)

    # Beside what Adam's step moves there is a scalar to sum for each tensor along each axis of the
    # mesh, two where the rows that are not kept must be seen to be finite, nothing else.
    adam = optax.adam(1e-3)
    adam_step = jax.jit(functools.partial(step, adam))
    extra = collectives(jitted, after, state, batch) - collectives(
        adam_step, params, adam.init(params), batch
    )
    assert set(extra) <= {("all-reduce", "f32[]")}
    scalars = len(jax.tree.leaves(params)) + (len(params) if kept < width else 0)
    assert sum(extra.values()) <= scalars * len(LAYOUTS[layout][0])


def test_kept_rows_that_lie_unevenly_come_from_a_neighbour(monkeypatch):
    monkeypatch.setattr(_dart, "LEAST", 1 << 15)  # of every 49 rows 3, put together from 8 each
    # Of so many gradients some are next to 0, and Adam makes a step of what is rounding there.
    _, after, state, jitted, batch = ends_where_one_device_ends("fully sharded", 784, atol=1e-4)
    assert state[0].step_memory[0]["kernel"].shape == (48, 784)
    moved = collectives(jitted, after, state, batch)
    rows = [shape for operation, shape in moved if operation == "collective-permute"]
    assert rows
    assert all(int(re.search(r"\[(\d+),784\]", shape)[1]) < 16 for shape in rows)  # of 98


@pytest.mark.parametrize("jitted", [False, True])
def test_state_begins_where_its_parameters_lie(jitted):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    optimizer = dartax.dart()
    with jax.set_mesh(mesh):
        params = jax.device_put(make_params(), NamedSharding(mesh, P("x")))
        state = (jax.jit(optimizer.init) if jitted else optimizer.init)(params)
    moments = state[0].inner_state[0]
    for tree in (state[0].step_memory, moments.mu, moments.nu):
        for leaf, param in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
            assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim)


@pytest.mark.parametrize("blocks", ["channel", "element"])
def test_rates_within_tensors_end_where_one_device_ends(blocks, monkeypatch):
    monkeypatch.setattr(_allocation, "LEAST", 64)  # slices of the matrices
    batches = jax.random.normal(jax.random.key(1), (STEPS, 16, 16))
    optimizer = dartax.dart(init_rate=1e-3, blocks=blocks)
    expected, _, _ = train(optimizer, make_params(), batches)
    params, batch_sharding = placed("two axes", make_params())
    batches = [jax.device_put(x, batch_sharding) for x in batches]
    after, state, _ = train(optimizer, params, batches)
    assert_close(after, expected)
    if blocks == "element":
        factors = optax.tree.get(state, "within_factor")
        for leaf, param in zip(jax.tree.leaves(factors), jax.tree.leaves(params), strict=True):
            assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim)


def test_explicit_mesh(on_one_device):
    batches, expected = on_one_device
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jax.device_put(make_params(), NamedSharding(mesh, P()))
        batches = [jax.device_put(x, NamedSharding(mesh, P("x"))) for x in batches]
        after, state, _ = train(dartax.dart(init_rate=1e-3), params, batches)
    assert_close(after, expected)
    assert state[0].concentration.sharding.is_fully_replicated


@pytest.mark.parametrize("width", [16, 48])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory_decay": 0.0},
        {"inner": optax.scale_by_lion()},
        {"weight_decay": 0.1},
        {"blocks": "channel"},
        {"blocks": "element", "weight_decay": 0.1},
    ],
)
def test_explicit_mesh_with_sharded_parameters(options, width, monkeypatch):
    monkeypatch.setattr(_allocation, "LEAST", 64)  # slices of the matrices
    monkeypatch.setattr(_dart, "LEAST", 64)  # and every third row of the larger ones, ...
    monkeypatch.setattr(_thinning, "TURNS", 2)  # put together from two
    optimizer, ends = dartax.dart(init_rate=1e-3, **options), []
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    for place in (lambda p: p, lambda p: jax.device_put(p, NamedSharding(mesh, P("x")))):
        params = place(make_params(width))
        state = optimizer.init(params)
        for _ in range(STEPS):
            updates, state = jax.jit(optimizer.update)(params, state, params)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    assert_close(ends[1], ends[0])
    kernel = jax.tree.leaves(params)[1]
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), kernel.ndim)
    rates = jax.tree.leaves(dartax.expected_learning_rates(state, params))
    assert all(bool(jnp.all(rate > 0)) for rate in rates)


def test_shard_map_over_the_data(on_one_device):
    batches, expected = on_one_device
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    optimizer = dartax.dart(init_rate=1e-3)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=(P(), P()))
    def sharded_step(params, state, x):
        # Replicated parameters make JAX sum the gradient over the devices itself.
        grads = jax.grad(lambda p: loss_fn(p, x) / 8)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = make_params()
    state = optimizer.init(params)
    for x in batches:
        params, state = sharded_step(params, state, x)
    assert_close(params, expected)


@pytest.mark.parametrize(
    "make", [dartax.dart, functools.partial(dartax.dart, weight_decay=0.1), dartax.paper_dart]
)
def test_update_lowers_for_every_platform(make):
    optimizer, params = make(), make_params()
    state = optimizer.init(params)
    exported = jax.export.export(
        jax.jit(optimizer.update), platforms=("cpu", "cuda", "rocm", "tpu")
    )(params, state, params)
    assert exported.platforms == ("cpu", "cuda", "rocm", "tpu")
    got, expected = (
        exported.call(params, state, params),
        jax.jit(optimizer.update)(params, state, params),
    )
    assert_close(got[0], expected[0])
