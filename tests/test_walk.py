"""Progress and power against walks whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax import _walk

PARAMS = {"w": jnp.ones((20, 30)), "b": jnp.zeros(20), "c": jnp.ones(())}


@pytest.mark.parametrize(
    ("inner", "known"),
    [
        (optax.scale_by_adam(b1=0.9), (1.0, 0.9, 0.1 / 1.9)),
        (optax.scale_by_adam(b1=0.5), (1.0, 0.5, 0.5 / 1.5)),
        (optax.trace(0.95), (1.0, 0.95, 0.0)),
        (optax.identity(), (0.0, 0.0, 0.0)),
        (optax.scale_by_sign(), (0.0, 0.0, 1.0)),
    ],
)
def test_white_noise_is_measured(inner, known):
    measured = _walk.measure(inner, PARAMS)
    np.testing.assert_allclose(measured, known, rtol=0.05, atol=0.02)


def test_the_long_memory_of_lion_is_seen():
    # Its directions agree little with their neighbours, but do so for a hundred steps.
    agreement, persistence, power = _walk.measure(optax.scale_by_lion(), PARAMS)
    assert 0.1 < agreement < 0.4
    assert 0.98 < persistence < 0.995
    assert power == pytest.approx(1.0)


@pytest.mark.parametrize(
    "inner",
    [
        dartax.inner.adam(b1=0.8),
        dartax.inner.momentum(0.8),
    ],
)
def test_what_our_own_transforms_know_is_what_is_measured(inner):
    np.testing.assert_allclose(
        inner.update.white_noise, _walk.measure(inner, PARAMS), rtol=0.05, atol=0.02
    )


def test_what_cannot_be_measured_counts_as_independent():
    def refuse(*_, **__):
        raise ValueError("no")

    inner = optax.GradientTransformation(lambda params: (), refuse)
    assert _walk.measure(inner, PARAMS) == (0.0, 0.0, 0.0)
    assert _walk.measure(optax.identity(), {}) == (0.0, 0.0, 0.0)


def run(gradients, steps=600, rate=lambda t: 1.0, decay=0.999):
    """Progress and power after steps of Adam's directions, for 4,000 elements."""
    inner = dartax.inner.adam(b2=0.99)
    params = {"x": jnp.zeros(4000)}
    walk = _walk.no_walk(inner, params, 1)

    def step(carry, t):
        x, memory, walk, state = carry
        gradient = gradients(x, jax.random.fold_in(jax.random.key(0), t))
        direction, state = inner.update({"x": gradient}, state)
        weight, keep = jnp.reshape(rate(t), 1) * jnp.ones(1), jnp.full(1, decay)
        u = direction["x"]
        memory = keep * memory + weight * u
        walk = _walk.advance(walk, keep, weight, jnp.sum(u**2)[None], np.full(1, 4000.0))
        return (x - weight * u, memory, walk, state), None

    start = (jnp.zeros(4000), jnp.zeros(4000), walk, inner.init(params))
    (_, memory, walk, _), _ = jax.lax.scan(step, start, jnp.arange(steps))
    progress = _walk.progress(walk, jnp.sum(memory**2)[None])
    return float(progress[0]), float(_walk.power(walk, jnp.asarray(steps))[0])


@pytest.mark.parametrize(
    "rate",
    [lambda t: 1.0, lambda t: 1.0 - t / 600, lambda t: jnp.exp(0.05 * (t - 600.0))],
    ids=["constant", "falling", "growing"],
)
def test_a_free_walk_has_a_progress_of_one(rate):
    progress, power = run(lambda x, key: jax.random.normal(key, x.shape), rate=rate)
    assert progress == pytest.approx(1.0, abs=0.12)
    assert power == pytest.approx(1.0, abs=0.1)
    assert _walk.noise(power) > 0.5


def test_steps_that_agree_have_more_progress_and_power():
    progress, power = run(lambda x, key: 1.0 + 0.1 * jax.random.normal(key, x.shape))
    assert progress > 20
    assert power == pytest.approx(19.0, rel=0.05)
    assert _walk.noise(power) < 0.01


def test_steps_in_a_narrow_valley_have_none():
    progress, power = run(lambda x, key: x + 0.1 * jax.random.normal(key, x.shape))
    assert progress < 0.1
    assert power < 1.5


def test_nothing_is_known_before_the_first_step():
    walk = _walk.no_walk(dartax.inner.adam(), PARAMS, 3)
    np.testing.assert_array_equal(_walk.progress(walk, jnp.zeros(3)), np.ones(3))
    np.testing.assert_array_equal(_walk.power(walk, jnp.asarray(0)), np.zeros(3))
    assert _walk.noise(jnp.zeros(())) == 0
    # Overflow says nothing either.
    walk = walk._replace(free=jnp.array([1.0, jnp.inf, 1.0]))
    assert _walk.progress(walk, jnp.array([jnp.inf, 1.0, 4.0])).tolist() == [1.0, 1.0, 4.0]
