"""Looking at the learned rates. Nothing here draws: what was used is what is reported."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dartax import dirichlet
from dartax._blocks import PyTree, path_name
from dartax._state import ScaleByDartState, check_state
from dartax.contrib import ScaleBySharesState, factor_variances, mean_factors, used_factors

# From a state to a value for each of its blocks.
Values = Callable[[ScaleByDartState], jax.Array]


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
            check_state(state)
            if jnp.ndim(state.count):
                raise ValueError(
                    f"opt_state must be that of one run, got a batch of {list(state.count.shape)}; "
                    "jax.vmap over the states."
                )
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
    within = state.inner_state
    within = within._replace(inner_state=None) if isinstance(within, ScaleBySharesState) else None
    return jax.tree.map(
        lambda x: x[...],
        state._replace(step_memory=None, inner_state=within),
        is_leaf=lambda x: hasattr(x, "shape"),
    )._replace(step_memory=state.step_memory)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _own_leaves(state: ScaleByDartState, params: PyTree) -> list[int]:
    """Which of the parameters' leaves the state controls: those that no mask left out."""
    num_leaves = len(jax.tree.leaves(params))
    slots = jax.tree.leaves(state.step_memory, is_leaf=_is_masked)
    if len(slots) != num_leaves and any(map(_is_masked, slots)):
        # A mask that is a prefix of the tree leaves one node in place of a whole subtree. If
        # the trees do not fit even so, the count below says it.
        with contextlib.suppress(ValueError):
            slots = jax.tree.leaves(
                jax.tree.map(
                    lambda slot, subtree: jax.tree.map(lambda _: slot, subtree),
                    state.step_memory,
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


def _values_of_leaves(
    state: ScaleByDartState, params: PyTree, values: Values
) -> list[tuple[int, jax.Array]]:
    """The number of every leaf that the state controls, with the value of its block."""
    of_blocks = values(state)
    of_leaves = [of_blocks[block] for block in state.block_index]
    return list(zip(_own_leaves(state, params), of_leaves, strict=True))


def _blocks_to_leaves(opt_state: PyTree, params: PyTree, values: Values) -> PyTree:
    """The values of the blocks of every DART state, as a tree of scalars shaped like ``params``."""
    leaves, structure = jax.tree.flatten(params)
    result: list[Any] = [jnp.asarray(jnp.nan, jnp.float32)] * len(leaves)
    for _, state in _states(opt_state):
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
    for _, state in _states(opt_state):
        if isinstance(state.inner_state, ScaleBySharesState):
            own = _own_leaves(state, params)
            for leaf, value in zip(own, values(state.inner_state), strict=True):
                result[leaf] = value
    return jax.tree.unflatten(structure, result)


def _used(state: ScaleByDartState) -> jax.Array:
    return state.last_rates


def _of_blocks(per_component: jax.Array, state: ScaleByDartState) -> jax.Array:
    """Without the slack, which is the last component where there is one."""
    return per_component[: state.last_rates.shape[0]]


def _concentration(state: ScaleByDartState) -> jax.Array:
    return _of_blocks(state.concentration, state)


def _share(state: ScaleByDartState) -> jax.Array:
    """Mean share of the budget."""
    return _of_blocks(dirichlet.mean(state.concentration), state)


def _expected(state: ScaleByDartState) -> jax.Array:
    budget = state.rate_budget - state.min_rate
    return state.last_multiplier * (state.min_rate + budget * _share(state))


def _std(state: ScaleByDartState) -> jax.Array:
    variance = _of_blocks(dirichlet.variance(state.concentration), state)
    return state.last_multiplier * (state.rate_budget - state.min_rate) * jnp.sqrt(variance)


# What metrics says of every leaf.
_OF_LEAVES: dict[str, Values] = {
    "rate": _used,
    "expected_rate": _expected,
    "rate_std": _std,
    "concentration": _concentration,
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
      ``blocks="channel"`` or ``"element"`` of arrays that broadcast with the leaves.

    Raises:
      ValueError: If there is no DART state, or ``params`` has another number of leaves.
    """
    rates = _blocks_to_leaves(opt_state, params, _used)
    return jax.tree.map(jnp.multiply, rates, _within(opt_state, params, used_factors, 1.0))


def expected_learning_rates(opt_state: PyTree, params: PyTree) -> PyTree:
    """Mean of the rates under the current Dirichlet; see :func:`learning_rates`."""
    rates = _blocks_to_leaves(opt_state, params, _expected)
    return jax.tree.map(jnp.multiply, rates, _within(opt_state, params, mean_factors, 1.0))


def learning_rate_std(opt_state: PyTree, params: PyTree) -> PyTree:
    """Standard deviation of the rates under the current Dirichlet; see :func:`learning_rates`."""

    def of_product(rate, std, factor, factor_variance):
        return jnp.sqrt((std * factor) ** 2 + factor_variance * (rate**2 + std**2))

    return jax.tree.map(
        of_product,
        _blocks_to_leaves(opt_state, params, _expected),
        _blocks_to_leaves(opt_state, params, _std),
        _within(opt_state, params, mean_factors, 1.0),
        _within(opt_state, params, factor_variances, 0.0),
    )


def concentrations(opt_state: PyTree, params: PyTree) -> PyTree:
    """Concentration of the block of every leaf; see :func:`learning_rates`.

    With ``blocks="channel"`` or ``"element"`` the tensor's; those within it are the field
    ``within_concentration`` of the state.
    """
    return _blocks_to_leaves(opt_state, params, _concentration)


def metrics(opt_state: PyTree, params: PyTree | None = None) -> dict[str, jax.Array]:
    """Scalars for a logger, safe inside ``jax.jit``; :mod:`dartax.plot` draws them.

    Args:
      opt_state: See :func:`learning_rates`.
      params: The parameters, for scalars of every leaf as well.

    Returns:
      - ``dart/step`` and ``dart/skipped``: updates so far, and those skipped for a non-finite
        gradient.
      - ``dart/multiplier`` (the user's schedule), ``dart/min_rate`` and ``dart/rate_budget`` (the
        ends of the rates before it).
      - ``dart/spent``: mean share of the budget that the blocks spend, in [0, 1].
      - ``dart/concentration_total``: sum of all concentrations, the slack's too. The share of a
        block is Beta(concentration, total - concentration).
      - ``dart/rate_*`` and ``dart/expected_rate_*`` with ``min``, ``mean`` and ``max``, over
        blocks, of the rates at the last update and of their means.
      - With ``params`` also ``dart/rate/PATH``, ``dart/expected_rate/PATH``,
        ``dart/rate_std/PATH`` and ``dart/concentration/PATH`` of every leaf that a DART
        controls, with paths such as ``Dense_0/kernel``. Where its channels or elements have
        rates of their own these are the tensor's, their mean, and ``dart/factor_std/PATH`` is the
        standard deviation over the tensor of what they are multiplied with on the mean: 0 as long
        as nothing is learned there.

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
    states = _states(opt_state)
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    result: dict[str, jax.Array] = {}
    for label, (_, state) in zip(_labels(states), states, strict=True):
        prefix = f"dart/{label}/" if label else "dart/"
        result |= {
            prefix + "step": state.count,
            prefix + "skipped": state.skipped,
            prefix + "multiplier": state.last_multiplier,
            prefix + "min_rate": state.min_rate,
            prefix + "rate_budget": state.rate_budget,
            prefix + "spent": jnp.sum(_share(state)),
            prefix + "concentration_total": jnp.sum(state.concentration),
        }
        for name, rates in (("rate", _used(state)), ("expected_rate", _expected(state))):
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
            factors = zip(_own_leaves(state, params), mean_factors(state.inner_state), strict=True)
            for leaf, factor in factors:
                result[f"{prefix}factor_std/{paths[leaf]}"] = jnp.std(factor)
    return result
