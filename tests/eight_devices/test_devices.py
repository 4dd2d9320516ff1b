"""On eight virtual devices a run ends where it ends on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from layouts import LAYOUTS, STEPS, loss_fn, make_batches, make_params, placed, train

import dartax
from dartax._fused import _order, _sample
from dartax._fused._mesh import is_split
from dartax.contrib import _shares

# Of wider kernels every fourth row goes into the memory, put together from two.
WIDTHS = (16, 64)


@pytest.fixture(autouse=True)
def small_samples(monkeypatch):
    monkeypatch.setattr(_sample, "MIN_SAMPLE", 64)
    monkeypatch.setattr(_sample, "MAX_SOURCES", 2)
    monkeypatch.setattr(_shares, "MIN_SLICE", 64)  # slices of the kernels


@functools.cache
def on_one_device(width=16, **options):
    """Where one device ends, and the state there."""
    return train(
        dartax.dart(init_rate=1e-3, **options), make_params(*3 * [width]), make_batches(width)
    )[:2]


def assert_close(tree, expected, atol=1e-5):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=atol), tree, expected
    )


def assert_lie_like(tree, params):
    for leaf, param in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
QUICK = "two axes"  # splits both axes of a kernel and the batch
each_layout = [layout if layout == QUICK else slow(layout) for layout in LAYOUTS]


@pytest.mark.parametrize("width", [slow(16), 64])
@pytest.mark.parametrize("layout", each_layout)
def test_ends_where_one_device_ends(width, layout):
    expected, expected_state = on_one_device(width)
    params, batch_sharding = placed(layout, make_params(*3 * [width]))
    batches = [jax.device_put(x, batch_sharding) for x in make_batches(width)]
    after, (state, *_), _ = train(dartax.dart(init_rate=1e-3), params, batches)
    assert_close(after, expected)
    np.testing.assert_allclose(state.concentration, expected_state[0].concentration, rtol=1e-4)

    # State lies where its parameters lie, and every device has the same draw.
    assert state.step_memory[0]["kernel"].shape == (16, width)
    moments = state.inner_state
    for tree in (after, state.step_memory, moments.mu, moments.nu):
        assert_lie_like(tree, params)
    for vector in (state.concentration, state.last_rates, state.hypergradient):
        assert vector.sharding.is_fully_replicated
        shards = [np.asarray(shard.data) for shard in vector.addressable_shards]
        assert all(np.array_equal(shard, shards[0]) for shard in shards)


@pytest.mark.slow
def test_plain_ends_where_one_device_ends():
    expected, _ = on_one_device(implementation="plain")
    params, batch_sharding = placed("two axes", make_params())
    batches = [jax.device_put(x, batch_sharding) for x in make_batches()]
    after, _, _ = train(dartax.dart(init_rate=1e-3, implementation="plain"), params, batches)
    assert_close(after, expected)
    assert_lie_like(after, params)


@functools.cache
def fifty_plain_steps():
    make = functools.partial(dartax.dart, init_rate=1e-3, memory_dtype="float32")
    batches = jnp.tile(make_batches(), (9, 1, 1))[:50]
    return make, batches, train(make(implementation="plain"), make_params(), batches)[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", each_layout)
def test_fifty_fused_steps_end_where_plain_ones_on_one_device_end(layout, monkeypatch):
    monkeypatch.setattr(_sample, "MIN_SAMPLE", 1 << 14)  # all of the memory, as the plain one
    make, batches, expected = fifty_plain_steps()
    params, batch_sharding = placed(layout, make_params())
    after, _, _ = train(make(), params, [jax.device_put(x, batch_sharding) for x in batches])
    assert_close(after, expected, atol=1e-4)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("jitted", [False, True])
def test_state_begins_where_its_parameters_lie(jitted):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    optimizer = dartax.dart()
    with jax.set_mesh(mesh):
        params = jax.device_put(make_params(*WIDTHS), NamedSharding(mesh, P("x")))
        state = (jax.jit(optimizer.init) if jitted else optimizer.init)(params)
    moments = state[0].inner_state
    for tree in (state[0].step_memory, moments.mu, moments.nu):
        assert_lie_like(tree, params)


@pytest.mark.parametrize("blocks", [slow("channel"), "element"])
def test_rates_within_tensors_end_where_one_device_ends(blocks):
    expected, _ = on_one_device(blocks=blocks)
    params, batch_sharding = placed("two axes", make_params())
    batches = [jax.device_put(x, batch_sharding) for x in make_batches()]
    after, state, _ = train(dartax.dart(init_rate=1e-3, blocks=blocks), params, batches)
    assert_close(after, expected)
    if blocks == "element":
        assert_lie_like(optax.tree.get(state, "within_factor"), params)


def test_explicit_mesh():
    expected, _ = on_one_device()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jax.device_put(make_params(), NamedSharding(mesh, P()))
        batches = [jax.device_put(x, NamedSharding(mesh, P("x"))) for x in make_batches()]
        after, state, _ = train(dartax.dart(init_rate=1e-3), params, batches)
    assert_close(after, expected)
    assert state[0].concentration.sharding.is_fully_replicated


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        slow({"implementation": "plain"}),
        slow({"inner": optax.scale_by_lion()}),
        slow({"inner": dartax.inner.lion(), "weight_decay": 0.1}),
        {"inner": dartax.inner.muon()},
        slow({"blocks": "channel"}),
        slow({"blocks": "element", "weight_decay": 0.1}),
    ],
    ids=lambda options: "-".join(options),
)
def test_explicit_mesh_with_sharded_parameters(options):
    optimizer, ends = dartax.dart(init_rate=1e-3, **options), []
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    for place in (lambda p: p, lambda p: jax.device_put(p, NamedSharding(mesh, P("x")))):
        params = place(make_params(*WIDTHS))
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(STEPS):
            updates, state = update(params, state, params)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    assert_close(ends[1], ends[0])
    assert_lie_like(
        params, jax.tree.map(lambda p: jax.device_put(p, NamedSharding(mesh, P("x"))), params)
    )
    rates = jax.tree.leaves(dartax.expected_learning_rates(state, params))
    assert all(bool(jnp.all(rate > 0)) for rate in rates)


def test_shard_map_over_the_data():
    expected, _ = on_one_device()
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
    for x in make_batches():
        params, state = sharded_step(params, state, x)
    assert_close(params, expected)


def branches(params):
    """How often one update chooses by platform, as what is fast on one device does."""
    optimizer = dartax.dart()
    state = optimizer.init(params)
    traced = jax.jit(optimizer.update).trace(params, state, params)
    return str(traced.jaxpr).count("branches_platforms")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("number", [None, 0, 5])
def test_one_of_eight_devices_is_as_fast_as_the_only_one(number, monkeypatch):
    monkeypatch.setattr(_order, "GROUP_SIZE", 1)
    assert jax.device_count() == 8
    params = make_params(*WIDTHS)
    if number is not None:
        params = jax.device_put(params, SingleDeviceSharding(jax.devices()[number]))
    assert not is_split(params)
    inner = dartax.inner.adam()
    moments = jax.jit(inner.update).trace(params, inner.init(params), taken=jnp.bool_(True))
    assert "branches_platforms" in str(moments.jaxpr)
    assert branches(params) >= 3  # the moments, the sums, the sample


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("x"), P()])
def test_what_is_split_over_devices_takes_no_branch_of_one(kind, spec, monkeypatch):
    monkeypatch.setattr(_order, "GROUP_SIZE", 1)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    params = jax.device_put(make_params(*WIDTHS), NamedSharding(mesh, spec))
    assert is_split(params)
    assert branches(params) == 0


def test_a_mesh_of_one_device_splits_nothing():
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1], axis_types=(AxisType.Explicit,))
    assert not is_split(jax.device_put(make_params(), NamedSharding(mesh, P("x"))))
