"""The order in which XLA computes what may be computed in any order.

Where one order costs less than another, what should come later is made to depend on what should
come before.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dartax._siblings import SMALL, siblings
from dartax._thinning import Thinning

PyTree = Any

# Leaves of so many elements together are updated at a time: enough for many cores to share, and few
# enough for their moments to be in the caches still when the parameters are computed from these.
TURN = 1 << 19


@functools.partial(jax.jit, static_argnames="apart")
def _after(value: jax.Array, array: jax.Array, apart: bool = False) -> jax.Array:
    """``value``, a scalar, which XLA must compute after ``array``, as far as it can be made to.

    It is not made to where the array is split over an explicit mesh: its first element lies on one
    device.

    Args:
      value: The scalar.
      array: The array.
      apart: Whether a kernel of its own computes the result, not each of those that read it, whose
        programs would differ by what they wait for. A reduction is computed once.
    """
    if array.size == 0 or any(jax.typeof(array).sharding.spec):
        return value
    first = jnp.atleast_1d(jax.lax.stop_gradient(array[(0,) * (array.ndim - 1)]))
    first = first[:2] if apart else first[0]  # of one element there would be no reduction
    never = jnp.isnan(first) & (first == first)  # which XLA does not see
    value = jnp.where(never, jnp.zeros_like(value), value)
    return jnp.max(value) if apart else value


def leaf_by_leaf(
    update: Callable[..., tuple[jax.Array, ...]],
    finite: jax.Array,
    gradient: PyTree,
    *state: PyTree,
) -> list[PyTree]:
    """The new state of an inner transform, ``update(finite, g, *s)`` for every leaf of its trees.

    On a CPU XLA would first update the state of all leaves and then compute all new parameters,
    from a state that has left the caches again. So leaves wait for those before them. On several
    devices they do not: they would exchange an element for it.
    """
    structure: Any = jax.tree.structure(gradient)
    leaves = list(zip(*map(structure.flatten_up_to, (gradient, *state)), strict=True))

    def update_all(finite, leaves, turn=math.inf):
        rows, waiting = [], 0
        for leaf in leaves:
            rows.append(update(finite, *leaf))
            waiting += jnp.size(leaf[0])
            if waiting >= turn:
                finite, waiting = _after(finite, rows[-1][0], apart=True), 0
        return rows

    if sum(jnp.size(leaf[0]) for leaf in leaves) > TURN and jax.device_count() == 1:
        in_turns = functools.partial(update_all, turn=TURN)
        rows = jax.lax.platform_dependent(finite, leaves, cpu=in_turns, default=update_all)
    else:
        rows = update_all(finite, leaves)
    columns = zip(*rows, strict=True) if rows else [()] * len(state)
    return [jax.tree.unflatten(structure, column) for column in columns]


def _in_one_kernel(param: Any, part: Any) -> bool:
    """Whether a GPU computes the memory and the new parameters of a leaf at once."""
    return jnp.size(param) > SMALL and jnp.shape(part) == jnp.shape(param)


def part_before(params: PyTree, thinning: Thinning) -> PyTree:
    """The part of the parameters that goes into the memory, read before these are overwritten.

    See :func:`in_order`.
    """
    leaves, structure = jax.tree.flatten(params)
    parts = jax.tree.leaves(thinning.part(params))
    apart = [i for i, leaf in enumerate(leaves) if not _in_one_kernel(leaf, parts[i])]
    copies = jax.lax.optimization_barrier(siblings([parts[i] for i in apart]))
    for i, copy in zip(apart, copies, strict=True):
        parts[i] = copy
    return jax.tree.unflatten(structure, parts)


def in_order(values: PyTree, params: PyTree, part: PyTree, memory: PyTree) -> PyTree:
    """``values``, scalars, which XLA must compute after what reads the parameters.

    New parameters are written over the old ones, without a copy of these, only where the program
    shows that all that reads the old ones has been computed before. On a CPU that is the memory. On
    a GPU it is the part, unless a kernel computes the memory and the parameters of a leaf at once,
    which this would tear apart.
    """

    def wait(value, param, row, z, on_cpu):
        if not on_cpu and _in_one_kernel(param, row):
            return value
        return _after(value, z if on_cpu else row)

    def on(on_cpu):
        return lambda *trees: jax.tree.map(functools.partial(wait, on_cpu=on_cpu), *trees)

    return jax.lax.platform_dependent(values, params, part, memory, cpu=on(True), default=on(False))
