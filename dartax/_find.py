"""Finding DART's states inside other states, and the leaves that they control."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dartax._state import ScaleByDartState, check_state
from dartax._trees import PyTree
from dartax.contrib import ScaleBySharesState


def _is_state(node: Any) -> bool:
    return isinstance(node, ScaleByDartState)


def find_states(opt_state: PyTree) -> list[tuple[str, ScaleByDartState]]:
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


def labels_of(states: list[tuple[str, ScaleByDartState]]) -> list[str]:
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


def own_leaves(state: ScaleByDartState, params: PyTree) -> list[int]:
    """Which of the parameters' leaves the state controls: those that no mask left out."""
    num_leaves = len(jax.tree.leaves(params))
    slots = jax.tree.leaves(state.step_memory, is_leaf=_is_masked)
    if len(slots) != num_leaves and any(map(_is_masked, slots)):
        # A mask that is a prefix of the tree leaves one node in place of a whole subtree. If
        # the trees do not fit even so, the count below says it.
        with contextlib.suppress(ValueError):
            slots = jax.tree.leaves(
                jax.tree.broadcast(state.step_memory, params, is_leaf=_is_masked),
                is_leaf=_is_masked,
            )
    if len(slots) != num_leaves:
        raise ValueError(
            f"params must be the tree that init was given, with {len(slots)} leaves, got "
            f"{num_leaves}; pass the parameters that opt_state belongs to."
        )
    return [i for i, slot in enumerate(slots) if not _is_masked(slot)]
