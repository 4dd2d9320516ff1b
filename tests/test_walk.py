"""Progress and power against walks whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax import _dart, _probe, _walk
from dartax._rule import Context

ADAM = (1.0, 0.9, 0.1 / 1.9)
PARAMS = {"w": jnp.ones((20, 30)), "b": jnp.zeros(20), "c": jnp.ones(())}


@pytest.mark.parametrize(
    ("inner", "known"),
    [
        (optax.scale_by_adam(b1=0.9), ADAM),
        (optax.scale_by_adam(b1=0.5), (1.0, 0.5, 0.5 / 1.5)),
        (optax.trace(0.95), (1.0, 0.95, 0.0)),
        (optax.identity(), (0.0, 0.0, 0.0)),
        (optax.scale_by_sign(), (0.0, 0.0, 0.0)),  # always 1: tells nothing
        (optax.scale_by_rms(), (0.0, 0.0, 0.0)),
        (optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1.0)), ADAM),
    ],
)
def test_white_noise_is_measured(inner, known):
    measured = _probe.measure(inner, PARAMS)
    for values, expected in zip(measured, known, strict=True):
        vector, scalar, matrix = values  # of the scalar there are few numbers
        np.testing.assert_allclose([vector, matrix], 2 * [expected], rtol=0.1, atol=0.02)
        np.testing.assert_allclose(scalar, expected, rtol=0.5, atol=0.08)


def test_parts_of_a_tree_are_measured_apart():
    parts = {"adam": optax.scale_by_adam(), "sgd": optax.identity()}
    inner = optax.partition(parts, {"w": "adam", "b": "sgd", "c": "adam"})
    of_leaf, num_blocks = (0, 0, 1), 2  # b, c, w: Adam and SGD share the first block
    found = _probe.white_noise(inner, PARAMS, of_leaf, num_blocks)
    agreement, persistence, power = found
    np.testing.assert_allclose(agreement, [1 / 21, 1.0], rtol=0.1)
    np.testing.assert_allclose(persistence, [0.9, 0.9], rtol=0.1)
    np.testing.assert_allclose(power, [0.0, 0.1 / 1.9], rtol=0.1)
    known = _probe.white_noise(dartax.inner.adam(), PARAMS, of_leaf, num_blocks)
    assert _walk.empty_walk(known, num_blocks).white_noise.power.shape == (2,)


def test_a_correlation_that_is_over_after_one_step_is_seen():
    assert _probe._fit(np.array([0.3, 0.05, 0.0, 0.0])) == (1.0, 0.3)
    assert _probe._fit(np.array([0.05, 0.0, 0.0, 0.0])) == (0.0, 0.0)
    agreement, persistence = _probe._fit(0.5 * 0.8 ** np.array([1.0, 2.0, 5.0, 17.0]))
    assert (agreement, persistence) == (pytest.approx(0.5), pytest.approx(0.8))


def test_the_long_memory_of_lion_is_seen():
    # Its directions agree little with their neighbours, but do so for a hundred steps.
    found = _probe.measure(optax.scale_by_lion(), PARAMS)
    agreement, persistence, power = found
    assert np.all((agreement > 0.1) & (agreement < 0.4))
    assert np.all((persistence > 0.97) & (persistence < 0.998))
    assert np.all(power == 0)  # signs


@pytest.mark.parametrize(
    "inner",
    [
        dartax.inner.adam(b1=0.8),
        dartax.inner.momentum(0.8),
    ],
)
def test_what_our_own_transforms_know_is_what_is_measured(inner):
    measured = [values[2] for values in _probe.measure(inner, PARAMS)]
    np.testing.assert_allclose(inner.update.white_noise, measured, rtol=0.1, atol=0.02)


def test_what_cannot_be_measured_counts_as_independent():
    def refuse(*_, **__):
        raise ValueError("no")

    inner = optax.GradientTransformation(lambda params: (), refuse)
    np.testing.assert_array_equal(_probe.measure(inner, PARAMS), np.zeros((3, 3)))
    np.testing.assert_array_equal(_probe.measure(optax.identity(), {}), np.zeros((3, 0)))


def run(gradients, steps=600, rate=lambda t: 1.0, decay=0.999):
    """Progress, power and noise after steps of Adam's directions, for 4,000 elements."""
    inner = dartax.inner.adam(b2=0.99)
    params = {"x": jnp.zeros(4000)}
    walk = _walk.empty_walk(_probe.white_noise(inner, params, (0,), 1), 1)

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
    steps = jnp.asarray(steps)
    power, noise = _walk.power(walk, steps)[0], _walk.noise(walk, steps, steps)[0]
    return float(progress[0]), float(power), float(noise)


@pytest.mark.parametrize(
    "rate",
    [lambda t: 1.0, lambda t: 1.0 - t / 600, lambda t: jnp.exp(0.05 * (t - 600.0))],
    ids=["constant", "falling", "growing"],
)
def test_a_free_walk_has_a_progress_of_one(rate):
    progress, power, noise = run(lambda x, key: jax.random.normal(key, x.shape), rate=rate)
    assert progress == pytest.approx(1.0, abs=0.12)
    assert power == pytest.approx(1.0, abs=0.1)
    assert noise > 0.5


def test_steps_that_agree_have_more_progress_and_power():
    progress, power, noise = run(lambda x, key: 1.0 + 0.1 * jax.random.normal(key, x.shape))
    assert progress > 20
    assert power == pytest.approx(19.0, rel=0.05)
    assert noise == 0


def test_steps_in_a_narrow_valley_have_none():
    progress, power, _ = run(lambda x, key: x + 0.1 * jax.random.normal(key, x.shape))
    assert progress < 0.1
    assert power < 1.5


def test_nothing_is_known_before_the_first_step():
    known = _probe.white_noise(dartax.inner.adam(), PARAMS, (0, 1, 2), 3)
    walk = _walk.empty_walk(known, 3)
    np.testing.assert_array_equal(_walk.progress(walk, jnp.zeros(3)), np.ones(3))
    np.testing.assert_array_equal(_walk.power(walk, jnp.asarray(0)), np.zeros(3))
    zero = jnp.asarray(0)
    np.testing.assert_array_equal(_walk.noise(walk, zero, zero), np.zeros(3))
    # Overflow says nothing either.
    walk = walk._replace(free=jnp.array([1.0, jnp.inf, 1.0]))
    assert _walk.progress(walk, jnp.array([jnp.inf, 1.0, 4.0])).tolist() == [1.0, 1.0, 4.0]


def sizes_over_time(mean_squares):
    """Power and noise of one block whose directions have these mean squares."""
    walk, one = _walk.empty_walk(_walk.WhiteNoise(), 1), jnp.ones(1)
    for square in mean_squares:
        walk = _walk.advance(walk, one, one, jnp.full(1, square), np.ones(1, np.float32))
    count = jnp.asarray(len(mean_squares))
    return float(_walk.power(walk, count)[0]), float(_walk.noise(walk, count, count)[0])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_directions_that_keep_their_size_may_be_noise_after_a_while(size):
    for num, expected in ((10, 0.0), (25, 0.0), (40, 0.6), (50, 1.0), (200, 1.0)):
        power, noise = sizes_over_time(num * [size])
        assert power == pytest.approx(1.0, rel=1e-4)
        assert noise == pytest.approx(expected, abs=1e-4)


def test_directions_that_shrink_with_the_loss_are_no_noise():
    for factor in (0.97, 1.03):
        assert sizes_over_time(factor ** np.arange(200.0))[1] == 0.0
    assert sizes_over_time(0.999 ** np.arange(200.0))[1] == 1.0
    assert sizes_over_time(np.zeros(200)) == (0.0, 0.0)


def test_lengths_that_overflow_leave_the_walk_finite():
    known = _probe.white_noise(dartax.inner.momentum(), PARAMS, (0, 1, 2), 3)
    walk = _walk.empty_walk(known, 3)
    huge = jnp.array([jnp.inf, 3e38, 1.0])
    for keep in (1.0, 1.0, 0.0):
        walk = _walk.advance(walk, jnp.full(3, keep), jnp.full(3, 1e30), huge, np.ones(3, "f"))
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(walk))


def test_noise_takes_a_rate_back_and_progress_keeps_it():
    progress = jnp.array([1.0, 2.5, 4.0])
    one, zero = jnp.ones([]), jnp.zeros([])
    context = Context(
        updates=jnp.asarray(9),
        num=jnp.full(3, 9),
        weight_rms=jnp.ones(3),
        displacement=jnp.zeros(3),
        progress=progress,
        noise=jnp.ones(3),
        schedule_steps=zero,
        schedule_fall=zero,
        annealing=zero,
    )
    full = _dart.GROWTH * jnp.array([1.0, 0.5, 0.0])
    np.testing.assert_allclose(_dart.fall(jnp.zeros(3), context), full, atol=1e-6)
    # What will be annealed falls only where noise has carried the block away.
    context = context._replace(annealing=one, displacement=jnp.array([0.1, 1.0, 1.0]))
    np.testing.assert_allclose(
        _dart.fall(jnp.zeros(3), context), full * jnp.array([0.0, 1.0, 1.0]), atol=1e-6
    )
