"""The guarded Adam is optax's, step by step, and dart around either is the same."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax import _inner

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


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_guarded_adam_is_adam(dtype, rtol, weight_decay):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    mask = {"kernel": True, "bias": False}
    guarded = _inner.with_decayed_weights(_inner.adam(b2=0.99), weight_decay, mask)
    plain = _inner.with_decayed_weights(optax.scale_by_adam(b2=0.99), weight_decay, mask)
    assert isinstance(guarded, _inner.Guarded)
    assert not isinstance(plain, _inner.Guarded)
    state, expected_state = guarded.init(params), plain.init(params)
    for gradient in gradients(5, dtype):
        updates, state = guarded.update(gradient, state, params)
        expected, expected_state = plain.update(gradient, expected_state, params)
        chex.assert_trees_all_equal_dtypes(updates, expected)
        assert_close(updates, expected, rtol)
        assert_close(guarded.again(state, params), updates, rtol)
        assert_close(jax.tree.leaves(state), jax.tree.leaves(expected_state), rtol)


def test_a_skipped_update_leaves_the_state():
    guarded = _inner.adam()
    (first,) = gradients(1)
    _, state = guarded.update(first, guarded.init(PARAMS))
    poisoned = jax.tree.map(lambda g: g * jnp.nan, first)
    _, kept = guarded.update(poisoned, state, finite=jnp.asarray(False))
    chex.assert_trees_all_equal(kept, state)
    # Also the very first one, which finds no moments to correct.
    _, kept = guarded.update(poisoned, guarded.init(PARAMS), finite=jnp.asarray(False))
    chex.assert_trees_all_equal(kept, guarded.init(PARAMS))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_dart_around_either_is_the_same(weight_decay):
    make = functools.partial(dartax.dart, init_rate=1e-3, weight_decay=weight_decay)
    runs = []
    for inner in (None, optax.scale_by_adam(b2=0.99)):
        optimizer, params = make(inner=inner), PARAMS
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for step, gradient in enumerate(gradients(12)):
            if step == 7:
                gradient["bias"] = gradient["bias"].at[0].set(jnp.nan)
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        assert dartax.metrics(state)["dart/skipped"] == 1
        runs.append((params, dartax.learning_rates(state, params)))
    assert_close(runs[0], runs[1], 1e-4)


def test_horizon_0_needs_no_memory_of_the_last_step():
    """The direction that Adam gives again is the one that a buffer would hold."""
    make = functools.partial(dartax.dart, init_rate=1e-3, horizon=0.0, direction_dtype="float32")
    runs = []
    for inner in (None, optax.scale_by_adam(b2=0.99)):
        optimizer, params = make(inner=inner), PARAMS
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for step, gradient in enumerate(gradients(12)):
            if step in (0, 7):
                gradient["bias"] = gradient["bias"].at[0].set(jnp.nan)
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        runs.append((params, dartax.learning_rates(state, params), state[0].hypergradient))
        kept = [leaf.size for leaf in jax.tree.leaves(state[0].last_direction)]
        assert kept == ([0, 0] if inner is None else [2, 6])
    assert_close(runs[0], runs[1], 1e-4)
