"""Sums over each of many arrays.

Starting a kernel takes a GPU as long as summing a small array, and a large array needs two kernels.
So arrays of one shape are summed together: small ones as rows of one array, large ones each over
its last axis, many in one kernel, and then what is left of them as rows of one array.

Gain: a step of 124 M parameters in 148 tensors takes 74 kernels (``dartax bench --compile-for
configs/bench/h100.txtpb --sizes 1.24e8x148``). An earlier version, with separate scalars for each
leaf, took 141 in place of 431, or 204 without ``_siblings.py``. On a CPU it gains nothing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dartax._fused._mesh import is_split
from dartax._fused._siblings import LAUNCH_BOUND, siblings

Term = Callable[..., jax.Array]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sum(term: Term, axes: tuple[int, ...], *arrays: jax.Array) -> jax.Array:
    # Only the term is summed: XLA turns sum(x * y) into a dot, which is not one fused loop.
    return jnp.sum(term(*(array.astype(jnp.float32) for array in arrays)), axes)


def one_by_one(term: Term, *columns: Sequence[jax.Array]) -> jax.Array:
    """See :func:`sums`."""
    rows = zip(*columns, strict=True)
    return jnp.stack([_sum(term, tuple(range(row[0].ndim)), *row) for row in rows])


def _stack(arrays: Sequence[jax.Array]) -> jax.Array:
    # The barrier: one loop that computed all these arrays while it sums them would branch into a
    # loop for each. With 148 tensors that takes 1.6 times as long to compile for a GPU.
    return jax.lax.optimization_barrier(jnp.stack(arrays))


def together(term: Term, *columns: Sequence[jax.Array]) -> jax.Array:
    """See :func:`sums`."""
    rows = list(zip(*columns, strict=True))
    alike: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        alike.setdefault(tuple(map(jax.typeof, row)), []).append(place)
    found = []
    for places in alike.values():
        group = [rows[place] for place in places]
        first = group[0][0]
        axes = tuple(range(1, first.ndim + 1))
        if first.size <= LAUNCH_BOUND or first.ndim < 2:
            found.append(_sum(term, axes, *map(_stack, zip(*group, strict=True))))
        else:
            ours, *others = zip(*group, strict=True)
            pairs = zip(siblings(ours), *others, strict=True)
            lines = jnp.stack([_sum(term, (first.ndim - 1,), *row) for row in pairs])
            found.append(jnp.sum(lines, axes[:-1]))
    order = np.argsort([place for places in alike.values() for place in places])
    return jnp.concatenate(found)[order]


@functools.partial(jax.jit, static_argnums=0)
def sums(term: Term, *columns: Sequence[jax.Array]) -> jax.Array:
    """The sums of ``term(x, y, ...)`` over all elements of x, y, ..., for n of each; ``[n]``.

    Args:
      term: Elementwise function of float32 arrays.
      *columns: Its arguments, n arrays each; those in one place have one shape.
    """
    if not columns[0]:
        return jnp.zeros(0, jnp.float32)
    # Arrays on several devices would be moved to lie together.
    if is_split(columns):
        return one_by_one(term, *columns)
    return jax.lax.platform_dependent(
        *columns,
        cpu=functools.partial(one_by_one, term),
        default=functools.partial(together, term),
    )
