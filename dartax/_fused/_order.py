"""The order in which a CPU updates the leaves.

XLA may compute them in any order. Where one order costs less than another, each later value is
made to depend on an earlier one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dartax._fused._mesh import is_split
from dartax._trees import PyTree

# Leaves are updated in groups of this many elements: enough for many cores to share, and few enough
# that their moments are still in the caches when the parameters are computed from them.
GROUP_SIZE = 1 << 19


@jax.jit
def _after(value: jax.Array, array: jax.Array) -> jax.Array:
    """``value``, a scalar, computed after ``array`` as far as XLA can be made to."""
    first = jnp.atleast_1d(jax.lax.stop_gradient(array[(0,) * (array.ndim - 1)]))[:2]
    never = first > jnp.inf  # XLA does not see that this is false
    # XLA computes a reduction once, in its own kernel. Otherwise the kernels that read the value
    # would differ by what they wait for. (XLA would drop the reduction of a single element.)
    return jnp.max(jnp.where(never, jnp.zeros_like(value), value))


def leaf_by_leaf(
    update: Callable[..., tuple[jax.Array, ...]],
    taken: Any,
    gradient: PyTree,
    *state: PyTree,
) -> list[PyTree]:
    """The new state of an inner transform, ``update(taken, g, *s)`` for every leaf of its trees.

    On a CPU XLA would first update the state of all leaves, and then compute all new parameters
    from a state that has left the caches. So each group of leaves waits for the one before. Split
    arrays do not wait: devices would exchange an element for it. Neither does a transform that
    stands alone, whose ``taken`` is the Python ``True``.

    Gain: 12 % of a step of 10 M parameters in 24 tensors on a CPU (``dartax bench --sizes 1e7x24``
    with ``GROUP_SIZE = 1 << 62``).
    """
    structure: Any = jax.tree.structure(gradient)
    leaves = list(zip(*map(structure.flatten_up_to, (gradient, *state)), strict=True))

    def update_all(taken, leaves, group_size=math.inf):
        rows, waiting = [], 0
        for leaf in leaves:
            rows.append(update(taken, *leaf))
            waiting += jnp.size(leaf[0])
            if waiting >= group_size:
                taken, waiting = _after(taken, rows[-1][0]), 0
        return rows

    large = sum(jnp.size(leaf[0]) for leaf in leaves) > GROUP_SIZE
    if large and taken is not True and not is_split(leaves):
        in_groups = functools.partial(update_all, group_size=GROUP_SIZE)
        rows = jax.lax.platform_dependent(taken, leaves, cpu=in_groups, default=update_all)
    else:
        rows = update_all(jnp.asarray(taken), leaves)
    columns = zip(*rows, strict=True) if rows else [()] * len(state)
    return [jax.tree.unflatten(structure, column) for column in columns]


def after_memory(values: PyTree, memory: PyTree) -> PyTree:
    """``values``, scalars of the leaves, which a CPU computes after the new memory of the leaf.

    With weight decay the memory is computed from the parameters. New parameters are written over
    the old ones only where XLA sees that all who read the old ones come before; else it copies
    them.

    Gain: with weight decay a step of 10 M parameters in 24 tensors takes 1.3 times as long as
    AdamW's in place of 2.8 (``dartax bench --sizes 1e7x24 --optimizers dart_weight_decay``).
    """

    def after(value, array):
        return _after(value, array) if array.size and not is_split([array]) else value

    return jax.lax.platform_dependent(
        values,
        memory,
        cpu=functools.partial(jax.tree.map, after),
        default=lambda values, _: values,
    )
