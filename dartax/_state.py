"""What the transforms keep between two updates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dartax._draw import Draw
from dartax._trees import PyTree
from dartax._walk import Walk

# Layout of the state below.
VERSION = 14


class Moments(NamedTuple):
    """What a rule keeps of the gradient that moves the concentrations or their logs.

    The names have a prefix so that ``optax.tree.get(state, "mu")`` finds the moments of Adam alone.

    Attributes:
      hyper_mu: First moment, float32 ``[K]``.
      hyper_nu: Second moment, float32 ``[K]``.
      hyper_change: Last change of the log concentrations, float32 ``[K]``, before the common factor
        that leaves the mean rates alone. ``paper_dart`` leaves it at 0.
    """

    hyper_mu: jax.Array
    hyper_nu: jax.Array
    hyper_change: jax.Array


class ScaleByDartState(NamedTuple):
    """State of :func:`dartax.scale_by_dart`; K blocks, C concentrations, n leaves.

    The structure, shapes and dtypes never change, and no array is shared with the
    parameters or the arguments. Scalars are float32 unless noted.

    Attributes:
      version: Layout of this state, int32.
      count: Number of updates, int32.
      skipped: Number of updates that were skipped for a non-finite gradient, direction,
        hypergradient, loss or schedule, int32.
      key: Raw threefry key data, uint32 ``[2]``. Each update folds ``count`` into it for its draw.
        Once ``count`` has reached its end, 2**31 - 1, the key of each draw replaces it. Raw,
        because serializers do not know typed keys.
      block_index: Block of every parameter leaf, n uint32 scalars.
      concentration: Concentrations of the Dirichlet that gave the last rates, float32 ``[C]``.
      moments: What the rule keeps of the gradient with respect to those of the blocks.
      hyper_count: Hypergradients of every block so far that were not 0, int32 ``[K]``. (Those whose
        squares underflow count, though the moments do not move then.)
      walk: Lengths of the past steps, and what they would add up to under white noise.
      silent_updates: How long the sample of every block has been silent, int32 ``[K]``; at first
        as long as it may (``_blocks.py``).
      sample_phase: Rows by which the samples of every block's large tensors have moved on,
        int32 ``[K]``.
      weight_rms: Root mean square of every block's matrices at ``init``, ``[K]``; 0 without any.
      hypergradient: h, the gradient of the last loss with respect to the rates of the steps
        before it (``paper_dart``) or the logarithms of their shares (``dart``), ``[K]``.
      last_draw: The last point of the simplex and its derivative.
      last_rates: What multiplied the last directions, f_t included, ``[K]``; 0 before the
        first update and for a skipped one.
      last_multiplier: f_t, the value of the user's schedule at the last update.
      min_rate: Lower end of the rates at the last update.
      rate_budget: Budget of the rates at the last update.
      step_memory: z, the last direction (``paper_dart``) or the decayed sum of past steps
        (``dart``), which the next gradient is compared with. A tree like the parameters; a sample
        of a large tensor.
      inner_state: State of the inner transform.
    """

    version: jax.Array
    count: jax.Array  # type: ignore[assignment]  # tuples have a method of that name
    skipped: jax.Array
    key: jax.Array
    block_index: tuple[jax.Array, ...] | jax.Array
    concentration: jax.Array
    moments: Moments
    hyper_count: jax.Array
    walk: Walk
    silent_updates: jax.Array
    sample_phase: jax.Array
    weight_rms: jax.Array
    hypergradient: jax.Array
    last_draw: Draw
    last_rates: jax.Array
    last_multiplier: jax.Array
    min_rate: jax.Array
    rate_budget: jax.Array
    step_memory: PyTree
    inner_state: PyTree


def check_state(state: PyTree) -> None:
    """Raises unless ``state`` is a ``ScaleByDartState`` of this version."""
    if not isinstance(state, ScaleByDartState):
        raise TypeError(
            f"state must be a ScaleByDartState, got {type(state).__name__}; pass what init or "
            "the last update returned, in the order update(grads, state, params), and restore "
            "checkpoints into it."
        )
    if isinstance(state.version, jax.core.Tracer):
        return  # inside jax.jit its value cannot be read
    found = np.unique(np.asarray(state.version))  # vmapped states have several
    if np.any(found != VERSION):
        raise ValueError(
            f"state must have version {VERSION}, got {', '.join(map(str, found))} from another "
            "dartax; go on with the dartax that saved it, or keep the parameters and call init: "
            "the rates are learned again within a few hundred updates."
        )


def next_key(state: ScaleByDartState, step_key: jax.Array) -> jax.Array:
    """The key as it is, or that of the last draw once the count has reached its end.

    The count stands still there, so the same key would give the same draw forever.
    """
    ended = state.count == jnp.iinfo(state.count.dtype).max
    return jnp.where(ended, step_key, state.key)
