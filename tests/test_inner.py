"""The directions of dartax.inner are optax's, and dart around either is the same."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax import _fusable

PARAMS = {"kernel": jnp.full((3, 2), 0.5), "bias": jnp.zeros(2)}


def gradients(steps, dtype=jnp.float32):
    for seed in range(steps):
        yield optax.tree.random_like(jax.random.key(seed), PARAMS, dtype=dtype)


def assert_close(got, expected, rtol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=1e-7
        ),
        got,
        expected,
    )


PAIRS = {
    "adam": (dartax.inner.adam(), optax.scale_by_adam(b2=0.99)),
    "momentum": (dartax.inner.momentum(), optax.trace(0.9)),
    "lion": (dartax.inner.lion(), optax.scale_by_lion()),
}
every_pair = pytest.mark.parametrize("name", PAIRS)


def averages(state):
    """The leaves of a state that our transform and that of optax have in common."""
    return jax.tree.leaves([optax.tree.get(state, name, {}) for name in ("mu", "nu", "trace")])


def test_directions_times_shares_fit_into_float16():
    optimizer = dartax.dart(inner=dartax.inner.momentum(), blocks="channel")
    params = {"a": jnp.ones((8, 8), jnp.float16), "b": jnp.ones(4, jnp.float16)}
    state = optimizer.init(params)
    for _ in range(12):
        grads = jax.tree.map(lambda p: jnp.full(p.shape, 3e4, jnp.float16), params)
        updates, state = optimizer.update(grads, state, params)
        assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))


@every_pair
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_directions_are_those_of_optax(name, dtype, rtol):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    ours, theirs = PAIRS[name]
    assert isinstance(ours.update, _fusable.FusableUpdate)
    assert not isinstance(theirs.update, _fusable.FusableUpdate)
    state, expected_state = ours.init(params), theirs.init(params)
    for gradient in gradients(5, dtype):
        updates, state = ours.update(gradient, state, params)
        expected, expected_state = theirs.update(gradient, expected_state, params)
        chex.assert_trees_all_equal_dtypes(updates, expected)
        assert_close(updates, expected, rtol)
        again = ours.update.again(gradient, state, True, lambda tree: tree)
        assert_close(again, updates, rtol)
        assert_close(averages(state), averages(expected_state), rtol)
    assert averages(state)


@every_pair
def test_a_skipped_update_leaves_the_state(name):
    ours, _ = PAIRS[name]
    (first,) = gradients(1)
    _, state = ours.update(first, ours.init(PARAMS))
    poisoned = jax.tree.map(lambda g: g * jnp.nan, first)
    for before in (state, ours.init(PARAMS)):  # the very first finds nothing to correct
        direction, after = ours.update(poisoned, before, taken=jnp.asarray(False))
        chex.assert_trees_all_equal(after, before)
        chex.assert_tree_all_finite(direction)


@every_pair
def test_directions_fit_into_float16(name):
    ours, _ = PAIRS[name]
    params = {"w": jnp.ones(3, jnp.float16)}
    state = ours.init(params)
    for _ in range(20):
        direction, state = ours.update({"w": jnp.full(3, 6e4, jnp.float16)}, state, params)
        assert direction["w"].dtype == jnp.float16
        chex.assert_tree_all_finite((direction, state))


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("all_measured")
@every_pair
@pytest.mark.parametrize("options", [{"memory_decay": 0.0}, {"weight_decay": 0.1}], ids=str)
def test_dart_around_either_is_the_same(name, options):
    make = functools.partial(dartax.dart, init_rate=1e-3, **options)
    runs = []
    for inner in PAIRS[name]:
        optimizer, params = make(inner=inner), PARAMS
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for step, gradient in enumerate(gradients(12)):
            if step in (0, 7):
                gradient["bias"] = gradient["bias"].at[0].set(jnp.nan)
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        assert dartax.metrics(state)["dart/skipped"] == 2
        runs.append((params, dartax.learning_rates(state, params), state[0].hypergradient))
    assert_close(runs[0], runs[1], 1e-4)


def test_it_stays_fusable_wherever_its_functions_are_kept():
    ours = dartax.inner.adam()
    init, update = ours
    for kept in (
        jax.tree.map(lambda function: function, ours),
        ours._replace(init=init),
        optax.with_extra_args_support(ours),
        optax.GradientTransformationExtraArgs(init, update),
    ):
        assert isinstance(kept.update, _fusable.FusableUpdate)
