"""Looking at the learned rates. Nothing here draws: what was used is what is reported."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dartax import dirichlet
from dartax._blocks import PyTree, path_name
from dartax._transform import ScaleByDartState, check_version


def _is_state(node: Any) -> bool:
    return isinstance(node, ScaleByDartState)


def _states(opt_state: PyTree) -> list[tuple[str, ScaleByDartState]]:
    """Every DART state inside ``opt_state``, with the labels of the partitions around it."""
    opt_state = getattr(opt_state, "opt_state", opt_state)  # TrainState, nnx.Optimizer
    found: list[tuple[str, ScaleByDartState]] = []
    for path, node in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_state):
        if _is_state(node):
            labels = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
            # Flax nnx wraps every array in a variable, and [...] reads through it.
            state = _map_arrays(node)
            check_version(state)
            found.append(("/".join(labels), state))
    if not found:
        raise ValueError(
            f"opt_state must hold the state of a DART transform, got {type(opt_state).__name__} "
            "without one; pass what dartax.dart(...).init returned, or the state around it."
        )
    return found


def _labels(states: list[tuple[str, ScaleByDartState]]) -> list[str]:
    """A name for each of several states: its label, or its number where labels do not tell."""
    if len(states) == 1:
        return [""]
    labels = [label for label, _ in states]
    unique = "" not in labels and len(set(labels)) == len(labels)
    return labels if unique else [str(number) for number in range(len(states))]


def _map_arrays(state: ScaleByDartState) -> ScaleByDartState:
    """``state`` with plain arrays in the fields that are read here."""
    return jax.tree.map(
        lambda x: x[...],
        state._replace(last_direction=None, inner_state=None),
        is_leaf=lambda x: hasattr(x, "shape"),
    )._replace(last_direction=state.last_direction)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _own_leaves(state: ScaleByDartState, params: PyTree) -> list[int]:
    """Which of the parameters' leaves the state controls: those that no mask left out."""
    num_leaves = len(jax.tree.leaves(params))
    slots = jax.tree.leaves(state.last_direction, is_leaf=_is_masked)
    if len(slots) != num_leaves and any(map(_is_masked, slots)):
        # A mask that is a prefix of the tree leaves one node in place of a whole subtree. If
        # the trees do not fit even so, the count below says it.
        with contextlib.suppress(ValueError):
            slots = jax.tree.leaves(
                jax.tree.map(
                    lambda slot, subtree: jax.tree.map(lambda _: slot, subtree),
                    state.last_direction,
                    params,
                    is_leaf=_is_masked,
                ),
                is_leaf=_is_masked,
            )
    if len(slots) != num_leaves:
        raise ValueError(
            f"params must be the tree that init was given, with {len(slots)} leaves, got "
            f"{num_leaves}; pass the parameters that opt_state belongs to."
        )
    return [i for i, slot in enumerate(slots) if not _is_masked(slot)]


def _blocks_to_leaves(
    opt_state: PyTree, params: PyTree, values: Callable[[ScaleByDartState], jax.Array]
) -> PyTree:
    """The ``[K]`` values of every DART state, as a tree of scalars shaped like ``params``."""
    leaves, structure = jax.tree.flatten(params)
    result: list[Any] = [jnp.asarray(jnp.nan, jnp.float32)] * len(leaves)
    for _, state in _states(opt_state):
        per_block = values(state)
        for block, leaf in zip(state.block_index, _own_leaves(state, params), strict=True):
            result[leaf] = per_block[block]
    return jax.tree.unflatten(structure, result)


def _expected(state: ScaleByDartState) -> jax.Array:
    share = dirichlet.mean(state.concentration)[: state.last_rates.shape[0]]
    return state.last_multiplier * (state.min_rate + (state.max_rate - state.min_rate) * share)


def _std(state: ScaleByDartState) -> jax.Array:
    variance = dirichlet.variance(state.concentration)[: state.last_rates.shape[0]]
    return state.last_multiplier * (state.max_rate - state.min_rate) * jnp.sqrt(variance)


def learning_rates(opt_state: PyTree, params: PyTree) -> PyTree:
    """The rates used at the last update: what multiplied the direction of every leaf.

    Args:
      opt_state: An optimizer state with DART's anywhere inside, a Flax ``TrainState`` or an
        ``nnx.Optimizer``.
      params: The parameters, or any tree of their structure.

    Returns:
      A tree like ``params`` of float32 scalars, the user's schedule included: 0 before the
      first update and after a skipped one, NaN for leaves that DART does not control.

    Raises:
      ValueError: If there is no DART state, or ``params`` has another number of leaves.
    """
    return _blocks_to_leaves(opt_state, params, lambda state: state.last_rates)


def expected_learning_rates(opt_state: PyTree, params: PyTree) -> PyTree:
    """Mean of the rates under the current Dirichlet; see :func:`learning_rates`."""
    return _blocks_to_leaves(opt_state, params, _expected)


def learning_rate_std(opt_state: PyTree, params: PyTree) -> PyTree:
    """Standard deviation of the rates under the current Dirichlet; see :func:`learning_rates`."""
    return _blocks_to_leaves(opt_state, params, _std)


def concentrations(opt_state: PyTree, params: PyTree) -> PyTree:
    """Concentration of the block of every leaf; see :func:`learning_rates`."""
    return _blocks_to_leaves(opt_state, params, lambda s: s.concentration[: s.last_rates.shape[0]])


def metrics(opt_state: PyTree) -> dict[str, jax.Array]:
    """Scalars for a logger, safe inside ``jax.jit``.

    Args:
      opt_state: See :func:`learning_rates`.

    Returns:
      ``dart/step`` and ``dart/skipped`` (updates so far, and those skipped for a non-finite
      gradient), ``dart/multiplier`` (the user's schedule), ``dart/spent`` (mean share of
      the budget that the blocks spend, in [0, 1]), and the smallest, mean and largest over
      blocks of the rates at the last update (``dart/rate_*``) and of their means
      (``dart/expected_rate_*``). With several DARTs in ``opt_state`` the label of
      ``optax.partition`` follows, or a number: ``dart/LABEL/step``, ``dart/0/step``.
    """
    states = _states(opt_state)
    result: dict[str, jax.Array] = {}
    for label, (_, state) in zip(_labels(states), states, strict=True):
        prefix = f"dart/{label}/" if label else "dart/"
        num_blocks = state.last_rates.shape[0]
        result |= {
            prefix + "step": state.count,
            prefix + "skipped": state.skipped,
            prefix + "multiplier": state.last_multiplier,
            prefix + "spent": jnp.sum(dirichlet.mean(state.concentration)[:num_blocks]),
        }
        for name, rates in (("rate", state.last_rates), ("expected_rate", _expected(state))):
            if num_blocks:
                result |= {
                    f"{prefix}{name}_min": jnp.min(rates),
                    f"{prefix}{name}_mean": jnp.mean(rates),
                    f"{prefix}{name}_max": jnp.max(rates),
                }
    return result


def _health(state: ScaleByDartState, block: int) -> str:
    """One word or two on whether the block's rate is learning."""
    if state.count == 0:
        return "not started"
    if state.count - state.skipped > 1 and state.hypergradient[block] == 0:
        return "no gradient"
    if dirichlet.mean(state.concentration)[block] > 0.99:
        return "at max_rate"
    return "learning"


def describe(opt_state: PyTree, params: PyTree) -> str:
    """A table for a person: each block with its mean rate, spread, last draw and health.

    Args:
      opt_state: See :func:`learning_rates`. Concrete arrays, not tracers.
      params: The parameters.

    Returns:
      Text of a few lines for each DART state. ``health`` is ``learning``, ``not started``
      (no update yet), ``no gradient`` (the last gradient of the block was orthogonal to its
      steps, or zero) or ``at max_rate``.
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    sizes = [int(np.size(leaf)) for leaf in jax.tree.leaves(params)]
    tables = []
    states = _states(opt_state)
    for label, (_, state) in zip(_labels(states), states, strict=True):
        if isinstance(state.count, jax.core.Tracer):
            raise TypeError(
                "opt_state must hold concrete arrays, got a tracer; call describe outside jax.jit, "
                "and metrics inside."
            )
        own = _own_leaves(state, params)
        tables.append(_table(label, state, [paths[i] for i in own], [sizes[i] for i in own]))
    return "\n\n".join(tables)


def _table(label: str, state: ScaleByDartState, paths: list[str], sizes: list[int]) -> str:
    num_blocks = state.last_rates.shape[0]
    members: list[list[int]] = [[] for _ in range(num_blocks)]
    for leaf, block in enumerate(np.asarray(state.block_index)):
        members[block].append(leaf)
    expected, std = np.asarray(_expected(state)), np.asarray(_std(state))
    rows = [("block", "parameters", "E[rate]", "std", "last rate", "health")]
    for block, leaves in enumerate(members):
        names = ", ".join(paths[i] for i in leaves[:2])
        rows.append(
            (
                names + (f" + {len(leaves) - 2} more" if len(leaves) > 2 else ""),
                f"{sum(sizes[i] for i in leaves):,}",
                f"{expected[block]:.3g}",
                f"{std[block]:.2g}",
                f"{float(state.last_rates[block]):.3g}",
                _health(state, block),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, 5) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    title = f"DART{f' [{label}]' if label else ''} after {int(state.count)} updates"
    spent = float(jnp.sum(dirichlet.mean(state.concentration)[:num_blocks]))
    facts = (
        f"{int(state.skipped)} skipped, multiplier {float(state.last_multiplier):.3g}, "
        f"{spent:.3g} of the budget spent"
    )
    return "\n".join([f"{title}: {facts}", *lines])
