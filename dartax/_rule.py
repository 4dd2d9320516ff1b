"""What a rule is: how concentrations move, and what it may know for that."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dartax import _walk
from dartax._averages import f32, root
from dartax._draw import Draw
from dartax._schedule import Ending, annealing, fallen
from dartax._state import Moments, ScaleByDartState


class Context(NamedTuple):
    """What a rule may know beside the gradient.

    Attributes:
      updates: Updates so far, without this one and those that were skipped; int32 scalar.
      num: Hypergradients of every block so far that were not 0, including this one; int32 ``[K]``.
      weight_rms: Root mean square of every block's matrices at ``init``, float32 ``[K]``.
      displacement: Root mean square of the elements of the memory, how far the past steps moved
        them, ``[K]``.
      progress: Squared distance that the past steps got, over that of a free walk, ``[K]``; see
        ``dartax/_walk.py``.
      noise: How much their directions count as white noise, ``[K]`` in [0, 1].
      schedule_steps: Updates until the user's schedule ends, counted from its start; 0 if it does
        not, 2**31 if a mean is evaluated. float32 scalar, as the others.
      schedule_fall: How far the logarithm of the schedule has fallen since the last update.
      annealing: Fraction of its present value that the schedule will still lose, in [0, 1].
    """

    updates: jax.Array
    num: jax.Array
    weight_rms: jax.Array
    displacement: jax.Array
    progress: jax.Array
    noise: jax.Array
    schedule_steps: jax.Array
    schedule_fall: jax.Array
    annealing: jax.Array


class Rule(NamedTuple):
    """How the concentrations start and move.

    Attributes:
      init: From the number of blocks K to the concentrations ``[C]``, C >= K. The first K
        belong to the blocks; a further one is budget that no block spends.
      learn: From (concentration ``[C]``, draw, hypergradient ``[K]``, moments, context) to the new
        concentration and moments, and to the factor of the memory of past steps, ``[K]`` in
        [0, 1].
      in_log_space: Whether the hypergradient is with respect to log pi, not to the rates.
      uses_walk: Whether it looks at progress and noise.
    """

    init: Callable[[int], jax.Array]
    learn: Callable[
        [jax.Array, Draw, jax.Array, Moments, Context],
        tuple[jax.Array, Moments, jax.Array],
    ]
    in_log_space: bool
    uses_walk: bool


def context_of(
    state: ScaleByDartState,
    h: jax.Array,
    square_length: jax.Array,
    sizes: np.ndarray,
    multiplier: jax.Array,
    end: Ending,
) -> Context:
    """What the rule may know.

    Args:
      state: The state after the last update.
      h: Hypergradients, ``[K]``.
      square_length: Squared length of every block's memory, ``[K]``.
      sizes: Number of its elements, ``[K]``.
      multiplier: Present value of the user's schedule.
      end: How that schedule ends.
    """
    count = state.count - state.skipped
    num = state.hyper_count + (h != 0).astype(jnp.int32)
    return Context(
        updates=count,
        num=num,
        weight_rms=state.weight_rms,
        displacement=root(square_length / np.maximum(sizes, 1)),
        progress=_walk.progress(state.walk, square_length),
        noise=_walk.noise(state.walk, count, num),
        schedule_steps=f32(end.steps),
        schedule_fall=fallen(state.last_multiplier, multiplier),
        annealing=annealing(end, multiplier),
    )
