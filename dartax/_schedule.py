"""What the user's schedule is going to do, read from it ahead of time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dartax import _check
from dartax._averages import f32

# Updates at which a schedule is looked at, eight in every octave: an end is found to 9 %.
GRID = np.unique(np.round(2.0 ** np.arange(0.0, 30.1, 1 / 8)).astype(np.int32))
# A schedule has ended where it stays this close to its last value, relative to its greatest.
ENDED = 1e-3
# More updates than are counted.
FAR = 2.0**31


class Ending(NamedTuple):
    """How the user's schedule ends; float32 scalars.

    Attributes:
      steps: Updates after which it stays at one value; 0 if it never does, as for a number or a
        cyclic schedule; FAR if a mean of the parameters stands for a decay.
      value: That value, or 0.
    """

    steps: Any
    value: Any


def ending(learning_rate: optax.ScalarOrSchedule, averaged: bool = False) -> Ending:
    """Looks ahead on a schedule.

    If a mean of the parameters is evaluated (``averaged``), the schedule is not looked at: the mean
    does what a decay to 0 does whose end is beyond all counts.
    """
    if averaged:
        return Ending(np.float32(FAR), np.float32(0))
    if callable(learning_rate):
        # A schedule of traced numbers can only be read as part of the traced program.
        for read in (_read_now, _read):
            try:
                return read(learning_rate)
            except Exception:  # it takes only one count at a time, or is traced
                continue
    return Ending(np.float32(0), np.float32(0))


@functools.lru_cache(maxsize=32)
def _read_now(schedule: Callable[[Any], Any]) -> Ending:
    with jax.core.eval_context():
        return _read(schedule)


def _read(schedule: Callable[[Any], Any]) -> Ending:
    values = jnp.asarray(jax.vmap(schedule)(GRID), jnp.float32)
    values = jnp.broadcast_to(values, GRID.shape)
    moves = jnp.abs(values - values[-1]) > ENDED * jnp.max(jnp.abs(values))
    last = jnp.max(jnp.where(moves, np.arange(len(GRID)), -1))
    ends = (last >= 0) & (last < len(GRID) - 8)  # still moving in the last octave: no end
    after = jnp.asarray(GRID)[jnp.minimum(last + 1, len(GRID) - 1)]
    return Ending(jnp.where(ends, after.astype(jnp.float32), 0.0), jnp.where(ends, values[-1], 0.0))


def greatest(learning_rate: optax.ScalarOrSchedule) -> float | None:
    """The greatest value of a number or a schedule; ``None`` if it cannot be known now."""
    if _check.is_number(learning_rate):
        return float(learning_rate)
    try:
        with jax.core.eval_context():
            return float(jnp.max(jax.vmap(learning_rate)(np.append(0, GRID).astype(np.int32))))
    except Exception:
        return None  # an array, a schedule of traced values, or of one count at a time


def value_at(
    schedule: optax.ScalarOrSchedule, count: jax.Array, name: str = "learning_rate"
) -> Any:
    """Value of a user's schedule, float32; counts are int32 arrays, as optax passes them."""
    value = schedule(count) if callable(schedule) else schedule
    _check.scalar(f"{name}(count)", value, "return a number from the schedule")
    return f32(value)


def annealing(end: Ending, multiplier: jax.Array) -> jax.Array:
    """What part of its present value ``multiplier`` the schedule will lose until its end; [0, 1].

    0 where it has no end.
    """
    falls = (end.steps > 0) & (end.value < multiplier)  # a comparison: NaN gives 0
    left = jnp.maximum(end.value, 0.0) / jnp.where(falls, multiplier, 1.0)
    return jnp.where(falls, 1 - left, 0.0)


def fallen(last: jax.Array, multiplier: jax.Array) -> jax.Array:
    """How far the logarithm of the schedule fell from its ``last`` value; 0 where it rose."""
    falls = (multiplier > 0) & (multiplier < last)
    ratio = jnp.where(falls, last, 1.0) / jnp.where(falls, multiplier, 1.0)
    return jnp.log(ratio)
