"""What is read from schedules, against schedules whose ends are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax import _schedule


@pytest.mark.parametrize(
    ("schedule", "steps", "value"),
    [
        (optax.linear_schedule(1.0, 0.0, 500), 500, 0.0),
        (optax.linear_schedule(1.0, 0.1, 50), 50, 0.1),
        (optax.cosine_decay_schedule(2.0, 20_000), 20_000, 0.0),
        (optax.warmup_cosine_decay_schedule(0.0, 1.0, 100, 1000), 1000, 0.0),
        (optax.piecewise_constant_schedule(1.0, {30: 0.1, 90: 0.1}), 90, 0.01),
        (optax.warmup_constant_schedule(0.0, 1.0, 100), 100, 1.0),
        (lambda count: 1.0 - jnp.minimum(count.astype(jnp.float32), 70.0) / 70.0, 70, 0.0),
    ],
)
def test_the_end_of_a_schedule(schedule, steps, value):
    end = _schedule.ending(schedule)
    assert 0.97 * steps <= end.steps <= 1.1 * steps + 1  # (a cosine ends a little early)
    assert float(end.value) == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize(
    "schedule",
    [
        1.0,
        optax.constant_schedule(0.5),
        lambda count: 1 + jnp.sin(count),
        lambda count: (count + 1.0) ** -0.1,
        lambda count: 1.0 if count < 10 else 0.0,  # takes no array of counts
    ],
)
def test_schedules_without_an_end(schedule):
    end = _schedule.ending(schedule)
    assert end.steps == 0
    assert _schedule.annealing(end, jnp.float32(0.7)) == 0


def test_a_traced_schedule():
    ends = jax.jit(lambda peak: _schedule.ending(optax.linear_schedule(peak, 0.1, 100)))(2.0)
    assert 100 <= ends.steps <= 110
    assert float(ends.value) == pytest.approx(0.1)


def test_what_is_lost():
    end = _schedule.ending(optax.linear_schedule(1.0, 0.25, 100))
    assert float(_schedule.annealing(end, jnp.float32(1.0))) == pytest.approx(0.75)
    assert float(_schedule.annealing(end, jnp.float32(0.5))) == pytest.approx(0.5)
    for nothing in (0.25, 0.1, 0.0, jnp.nan):
        assert _schedule.annealing(end, jnp.float32(nothing)) == 0
    assert float(_schedule.fallen(jnp.float32(1.0), jnp.float32(0.5))) == pytest.approx(np.log(2))
    for now, last in ((0.5, 0.2), (0.5, 0.5), (0.0, 0.5), (0.0, 0.0), (jnp.nan, 1.0)):
        assert _schedule.fallen(jnp.float32(last), jnp.float32(now)) == 0


@pytest.mark.parametrize("make", [dartax.dart, dartax.paper_dart])
def test_schedules_get_counts_as_optax_gives_them(make):
    seen = []

    def schedule(count):
        seen.append(count)
        return 1.0 - count.astype(jnp.float32) / 100

    optimizer = make(schedule)
    params = jnp.ones(3)
    state = optimizer.init(params)
    optimizer.update(params, state, params)
    assert all(isinstance(count, jax.Array) and count.dtype == jnp.int32 for count in seen)


@pytest.mark.parametrize(
    "schedule",
    [optax.linear_schedule(0.0, 1.0, 10), optax.warmup_constant_schedule(0.0, 1.0, 10)],
    ids=["linear", "warmup"],
)
def test_a_warm_up_to_a_constant_makes_no_run_short(schedule):
    """Rates grow as they do without a schedule: none of it is going to be taken back."""

    def mean_rate(learning_rate):
        optimizer = dartax.dart(
            learning_rate, inner=optax.identity(), init_rate=2e-3, rate_budget=100.0
        )

        def step(state, _):
            return optimizer.update({"w": jnp.ones(3)}, state)[1], None

        state = optimizer.init({"w": jnp.ones(3)})
        state, _ = jax.jit(lambda s: jax.lax.scan(step, s, None, length=60))(state)
        return dartax.expected_learning_rates(state, {"w": 0})["w"]

    assert mean_rate(schedule) < 1.1 * mean_rate(1.0)


def test_a_schedule_below_zero_is_annealed_wholly():
    end = _schedule.ending(optax.linear_schedule(1.0, -1.0, 100))
    np.testing.assert_allclose(_schedule.annealing(end, jnp.array([1.0, 0.5, -0.5])), [1, 1, 1])
