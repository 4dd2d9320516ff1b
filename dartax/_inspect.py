"""Looking at the learned rates. Nothing here draws: what was used is what is reported."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dartax._block_values import (
    block_concentrations,
    expected_rates,
    mean_shares,
    rate_stds,
    used_rates,
)
from dartax._find import find_states, labels_of, own_leaves
from dartax._state import ScaleByDartState
from dartax._trees import PyTree, path_names
from dartax.contrib import ScaleBySharesState, factor_variances, mean_factors, used_factors

# From a state to a value for each of its blocks.
Values = Callable[[ScaleByDartState], jax.Array]


def _values_of_leaves(
    state: ScaleByDartState, params: PyTree, values: Values
) -> list[tuple[int, jax.Array]]:
    """The number of every leaf that the state controls, with the value of its block."""
    of_leaves = values(state)[jnp.asarray(state.block_index)]
    return list(zip(own_leaves(state, params), of_leaves, strict=True))


def _blocks_to_leaves(opt_state: PyTree, params: PyTree, values: Values) -> PyTree:
    """The values of the blocks of every DART state, as a tree of scalars shaped like ``params``."""
    leaves, structure = jax.tree.flatten(params)
    result: list[Any] = [jnp.asarray(jnp.nan, jnp.float32)] * len(leaves)
    for _, state in find_states(opt_state):
        for leaf, value in _values_of_leaves(state, params, values):
            result[leaf] = value
    return jax.tree.unflatten(structure, result)


def _within(
    opt_state: PyTree,
    params: PyTree,
    values: Callable[[ScaleBySharesState], list[jax.Array]],
    otherwise: float,
) -> PyTree:
    """Values of the channels or elements of every leaf; ``otherwise`` where it has one rate."""
    leaves, structure = jax.tree.flatten(params)
    result: list[Any] = [jnp.asarray(otherwise, jnp.float32)] * len(leaves)
    for _, state in find_states(opt_state):
        if isinstance(state.inner_state, ScaleBySharesState):
            own = own_leaves(state, params)
            for leaf, value in zip(own, values(state.inner_state), strict=True):
                result[leaf] = value
    return jax.tree.unflatten(structure, result)


# What metrics says of every leaf.
_OF_LEAVES: dict[str, Values] = {
    "rate": used_rates,
    "expected_rate": expected_rates,
    "rate_std": rate_stds,
    "concentration": block_concentrations,
}


def learning_rates(opt_state: PyTree, params: PyTree) -> PyTree:
    """The rates used at the last update: what multiplied the direction of every leaf.

    Args:
      opt_state: An optimizer state with DART's anywhere inside, a Flax ``TrainState`` or an
        ``nnx.Optimizer``.
      params: The parameters, or any tree of their structure.

    Returns:
      A tree like ``params`` of float32 scalars, the user's schedule included: 0 before the
      first update and after a skipped one, NaN for leaves that DART does not control. With
      ``blocks="channel"`` or ``"element"`` it holds arrays that broadcast with the leaves; for a
      complex leaf, the rates of the real parts, then of the imaginary ones, along the last axis.

    Raises:
      ValueError: If there is no DART state, or ``params`` has another number of leaves.
    """
    rates = _blocks_to_leaves(opt_state, params, used_rates)
    return jax.tree.map(jnp.multiply, rates, _within(opt_state, params, used_factors, 1.0))


def expected_learning_rates(opt_state: PyTree, params: PyTree) -> PyTree:
    """Mean of the rates under the current Dirichlet; see :func:`learning_rates`."""
    rates = _blocks_to_leaves(opt_state, params, expected_rates)
    return jax.tree.map(jnp.multiply, rates, _within(opt_state, params, mean_factors, 1.0))


def learning_rate_std(opt_state: PyTree, params: PyTree) -> PyTree:
    """Standard deviation of the rates under the current Dirichlet; see :func:`learning_rates`."""

    def of_product(rate, std, factor, factor_variance):
        return jnp.sqrt((std * factor) ** 2 + factor_variance * (rate**2 + std**2))

    return jax.tree.map(
        of_product,
        _blocks_to_leaves(opt_state, params, expected_rates),
        _blocks_to_leaves(opt_state, params, rate_stds),
        _within(opt_state, params, mean_factors, 1.0),
        _within(opt_state, params, factor_variances, 0.0),
    )


def concentrations(opt_state: PyTree, params: PyTree) -> PyTree:
    """Concentration of the block of every leaf; see :func:`learning_rates`.

    With ``blocks="channel"`` or ``"element"`` the tensor's; those within it are the field
    ``within_concentration`` of the state.
    """
    return _blocks_to_leaves(opt_state, params, block_concentrations)


def metrics(opt_state: PyTree, params: PyTree | None = None) -> dict[str, jax.Array]:
    """Scalars for a logger, safe inside ``jax.jit``; :mod:`dartax.plot` draws them.

    Args:
      opt_state: See :func:`learning_rates`.
      params: The parameters, for scalars of every leaf as well.

    Returns:
      - ``dart/step`` and ``dart/skipped``: updates so far, and how many of them were skipped; see
        :func:`dartax.scale_by_dart`.
      - ``dart/multiplier`` (the user's schedule), ``dart/min_rate`` and ``dart/rate_budget`` (the
        ends of the rates before it).
      - ``dart/spent``: mean share of the budget that the blocks spend, in [0, 1].
      - ``dart/concentration_total``: sum of all concentrations, the slack's too. The share of a
        block is Beta(concentration, total - concentration).
      - ``dart/rate_*`` and ``dart/expected_rate_*`` with ``min``, ``mean`` and ``max``, over
        blocks, of the rates at the last update and of their means.
      - With ``params`` also ``dart/rate/PATH``, ``dart/expected_rate/PATH``,
        ``dart/rate_std/PATH`` and ``dart/concentration/PATH`` of every leaf that a DART
        controls, with paths such as ``Dense_0/kernel``. If its channels or elements have rates of
        their own, these describe the rate of the tensor, which is their mean, and
        ``dart/factor_std/PATH`` is the standard deviation of the mean factors within the tensor:
        0 until something is learned there.

      With several DARTs in ``opt_state`` the label of ``optax.partition`` follows, or a number:
      ``dart/LABEL/step``, ``dart/0/step``.

    Raises:
      ValueError: If there is no DART state, or ``params`` has another number of leaves.

    Examples:
      >>> import dartax, jax.numpy as jnp
      >>> params = {"dense": {"bias": jnp.zeros(2), "kernel": jnp.ones((3, 2))}}
      >>> metrics = dartax.metrics(dartax.dart(init_rate=1e-4).init(params), params)
      >>> {name: round(float(x), 6) for name, x in metrics.items() if "expected_rate/" in name}
      {'dart/expected_rate/dense/bias': 0.0001, 'dart/expected_rate/dense/kernel': 0.0001}
    """
    states = find_states(opt_state)
    paths = path_names(params)
    result: dict[str, jax.Array] = {}
    for label, (_, state) in zip(labels_of(states), states, strict=True):
        prefix = f"dart/{label}/" if label else "dart/"
        result |= {
            prefix + "step": state.count,
            prefix + "skipped": state.skipped,
            prefix + "multiplier": state.last_multiplier,
            prefix + "min_rate": state.min_rate,
            prefix + "rate_budget": state.rate_budget,
            prefix + "spent": jnp.sum(mean_shares(state)),
            prefix + "concentration_total": jnp.sum(state.concentration),
        }
        for name, rates in (("rate", used_rates(state)), ("expected_rate", expected_rates(state))):
            if rates.size:
                result |= {
                    f"{prefix}{name}_min": jnp.min(rates),
                    f"{prefix}{name}_mean": jnp.mean(rates),
                    f"{prefix}{name}_max": jnp.max(rates),
                }
        if params is not None:
            for name, values in _OF_LEAVES.items():
                for leaf, value in _values_of_leaves(state, params, values):
                    result[f"{prefix}{name}/{paths[leaf]}"] = value
        if params is not None and isinstance(state.inner_state, ScaleBySharesState):
            factors = zip(own_leaves(state, params), mean_factors(state.inner_state), strict=True)
            for leaf, factor in factors:
                spread = jnp.std(factor) if factor.size else jnp.zeros([])
                result[f"{prefix}factor_std/{paths[leaf]}"] = spread
    return result
