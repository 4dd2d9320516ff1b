"""The fused step against the plain one: the same run to rounding, over 50 steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax import _fused, _plain
from dartax._blocks import Blocks
from dartax._fusable import fusable
from dartax._fused import _sample, _threefry

pytestmark = pytest.mark.usefixtures("all_measured")

STEPS = 50
slow = functools.partial(pytest.param, marks=pytest.mark.slow)

PARAMS = {
    "a": jnp.linspace(0.5, 1.5, 3),
    "b": jnp.linspace(-1, 1, 6).reshape(3, 2),
    "c": jnp.ones(()),
}
CURVATURE = {"a": 0.05, "b": 1.0, "c": 4.0}
# A NaN, and a finite element whose square overflows.
FAULTS = {7: jnp.nan, 20: 1e30}


@functools.partial(jax.jit, static_argnums=0)
def run(optimizer, params):
    """Parameters and rates at every step of a noisy quadratic, with faults."""
    fault = jnp.zeros(STEPS).at[jnp.array(list(FAULTS))].set(jnp.array(list(FAULTS.values())))

    def step(carry, now):
        (params, state), (key, fault) = carry, now
        noise = optax.tree.random_like(key, params)
        grads = {
            name: (CURVATURE[name] * params[name] + 0.3 * noise[name]).astype(params[name].dtype)
            for name in params
        }
        grads["a"] = grads["a"].at[0].add(fault.astype(grads["a"].dtype))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, dartax.learning_rates(state, params))

    keys = jax.random.split(jax.random.key(0), STEPS)
    (_, state), seen = jax.lax.scan(step, (params, optimizer.init(params)), (keys, fault))
    return seen, dartax.metrics(state), optax.tree.get(state, "concentration")


def assert_same_run(fused, plain, dtype=jnp.float32, rtol=1e-4):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    got, expected = run(fused, params), run(plain, params)
    assert got[1]["dart/skipped"] == expected[1]["dart/skipped"] == len(FAULTS)
    assert np.ptp(np.log(expected[0][1]["c"][30:])) > 0.05, "the rates have to move"
    assert np.abs(np.log(expected[2][:-1] / expected[2][0])).max() > 1e-3, "and to part"
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, float), np.asarray(b, float), rtol=rtol, atol=rtol * np.max(np.abs(b))
        ),
        (got[0], got[2]),
        (expected[0], expected[2]),
    )


# What fuses, and the transform of optax that the plain step is given.
PAIRS = {
    "adam": (dartax.inner.adam, functools.partial(optax.scale_by_adam, b2=0.99)),
    "nesterov": (
        functools.partial(dartax.inner.adam, nesterov=True, eps_root=1e-6),
        functools.partial(optax.scale_by_adam, b2=0.99, nesterov=True, eps_root=1e-6),
    ),
    "momentum": (dartax.inner.momentum, functools.partial(optax.trace, 0.9)),
    "lion": (dartax.inner.lion, optax.scale_by_lion),
    "optax adam": (optax.scale_by_adam, optax.scale_by_adam),
    "gradients": (optax.identity, optax.identity),
}
exact = functools.partial(dartax.dart, init_rate=1e-2, memory_dtype="float32")
every_pair = pytest.mark.parametrize("name", PAIRS)


@pytest.mark.one_in(8)
@every_pair
def test_every_inner_transform(name):
    fused, plain = PAIRS[name]
    assert_same_run(exact(inner=fused()), exact(inner=plain(), implementation="plain"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "memory_decay"),
    [
        ("adam", 0.0),
        ("optax adam", 0.9),
        slow("gradients", 0.0),
        *(slow(name, 0.9) for name in PAIRS if name != "optax adam"),
    ],
)
def test_weight_decay_under_a_schedule(name, memory_decay):
    fused, plain = PAIRS[name]
    make = functools.partial(
        exact,
        optax.linear_schedule(1, 0, 60),
        memory_decay=memory_decay,
        weight_decay=0.1,
        mask={"a": True, "b": False, "c": True},
    )
    assert_same_run(make(inner=fused()), make(inner=plain(), implementation="plain"))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "blocks",
    [slow("channel"), "element", {"a": 0, "b": 1, "c": 0}],
    ids=["channel", "element", "labels"],
)
def test_every_kind_of_blocks(blocks):
    assert_same_run(exact(blocks=blocks), exact(blocks=blocks, implementation="plain"))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("inner", "dtype", "rtol"),
    [
        (None, jnp.bfloat16, 2e-2),
        (optax.identity(), jnp.float16, 5e-3),
        slow(None, jnp.float16, 5e-3),
        slow(optax.identity(), jnp.bfloat16, 2e-2),
    ],
    ids=["adam-bfloat16", "gradients-float16", "adam-float16", "gradients-bfloat16"],
)
def test_half_precision(inner, dtype, rtol):
    make = functools.partial(exact, inner=inner)
    assert_same_run(make(), make(implementation="plain"), dtype, rtol)


@pytest.mark.slow
def test_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float64), PARAMS)
        runs = [run(exact(implementation=name), params) for name in ("fused", "plain")]
    assert runs[0][0][0]["a"].dtype == np.float64
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *runs)


def test_paper_dart():
    make = functools.partial(dartax.paper_dart, eta=0.05, rate_budget=0.5)
    assert_same_run(make(), make(implementation="plain"))


def test_a_sample_estimates_the_inner_product(monkeypatch):
    monkeypatch.setattr(_sample, "MIN_SAMPLE", 256)
    rng = np.random.default_rng(0)
    tree = {"large": jnp.zeros((256, 64)), "small": jnp.zeros(7)}
    blocks = Blocks((0, 1), 2, (jnp.uint32(0), jnp.uint32(1)), jnp.zeros(2, jnp.int32))
    phases = _fused.phases(blocks)
    memory = _fused.empty_memory(tree, jnp.float32)
    assert memory["large"].shape == _fused.memory_shape((256, 64)) != (256, 64)
    whole = _fused.empty_memory(tree, jnp.float32, whole=True)
    assert whole["large"].shape == (256, 64)
    estimates, truths = [], []
    for _ in range(200):
        g, z = (jax.tree.map(lambda p: rng.normal(0.1, 1, p.shape).astype("f"), tree) for _ in "gz")
        estimates.append(_fused.judge(g, _sample.part_like(memory, z, phases), blocks)[0])
        truths.append(_plain.judge(g, z, blocks)[0])
        np.testing.assert_allclose(_fused.judge(g, z, blocks)[0], truths[-1], rtol=1e-4, atol=1e-3)
    (large, small), (true_large, true_small) = np.transpose(estimates), np.transpose(truths)
    np.testing.assert_allclose(small, true_small, rtol=1e-5, atol=1e-5)
    error = large - true_large
    assert np.abs(error.mean()) < 4 * error.std() / len(error) ** 0.5
    assert 0 < np.abs(error).max() < 5 * 256 * 64 / 256**0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e19])
def test_both_refuse_the_same_gradients(bad, monkeypatch):
    monkeypatch.setattr(_sample, "MIN_SAMPLE", 256)
    tree = {"large": jnp.ones((256, 64)), "small": jnp.ones(7)}
    blocks = Blocks((0, 1), 2, (jnp.uint32(0), jnp.uint32(1)), jnp.zeros(2, jnp.int32))
    poisoned = {**tree, "large": tree["large"].at[1, 1].set(bad)}  # not in the sample
    for step in (_fused, _plain):
        memory = step.empty_memory(tree, jnp.bfloat16)
        for gradient, expected in ((tree, [True, True]), (poisoned, [False, True])):
            squares = step.judge(gradient, memory, blocks)[2]
            assert np.isfinite(squares).tolist() == expected


@pytest.mark.parametrize("implementation", ["fused", "plain"])
def test_directions_are_judged_by_their_blocks(implementation):
    # The squares of each leaf's direction are finite, and their sum over both is not.
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    options = {"inner": optax.scale(10.0), "implementation": implementation}
    for blocks, skipped in ((None, 0), (lambda path: "all", 1)):
        optimizer = dartax.scale_by_dart(blocks=blocks, **options)
        gradient = jax.tree.map(lambda p: 1e18 * p, params)
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        assert int(state.skipped) == skipped


def test_a_fusable_transform_survives_what_keeps_its_functions():
    inner = dartax.inner.adam()
    copies = (
        jax.tree.map(lambda leaf: leaf, inner),
        jax.tree.unflatten(jax.tree.structure(inner), jax.tree.leaves(inner)),
        inner._replace(init=inner.init),
        optax.GradientTransformation(*inner),
        optax.with_extra_args_support(inner),
    )
    for copy in copies:
        assert fusable(copy) is inner.update
    assert fusable(optax.chain(inner, optax.identity())) is None


@pytest.mark.parametrize("shape", [(2, 3), (2, 1), (2, 10_000)])
@pytest.mark.parametrize("count", [0, 1, 2**31 - 1])
def test_random_words_are_those_of_jax(shape, count):
    key = jax.random.key_data(jax.random.key(5))
    got = _threefry.random_words(key, jnp.int32(count), shape)
    expected = _plain.random_words(key, jnp.int32(count), shape)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
