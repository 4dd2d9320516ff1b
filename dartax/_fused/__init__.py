"""The step of ``dartax/_plain.py`` in less time and memory, arranged for XLA.

It has the same functions, with the same results to rounding, except that the memory holds a sample
of each large tensor (``_sample.py``): |z|^2 and |u|^2 are then those of the sample, and h is
estimated from it. Each idea beyond the formulas has a file of its own, with the figure that it
gains and the command that shows it:

    ../_fusable.py   inner transforms that skip a step by themselves, and give a part of their
                     direction again
    _sample.py       a sample of each large tensor stands for all of it in the memory
    _order.py        leaf after leaf on a CPU
    _sums.py         inner products of many tensors in a few kernels on a GPU
    _siblings.py     small arrays in one kernel on a GPU
    _mesh.py         arrays that are split over devices
    _threefry.py     random bits that compile faster
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dartax import _plain
from dartax._blocks import Blocks
from dartax._fusable import choose, fusable, zero_unless
from dartax._fused._order import after_memory
from dartax._fused._sample import part_like, sample_shape, take_samples
from dartax._fused._sums import sums
from dartax._fused._threefry import random_words
from dartax._trees import PyTree

__all__ = [
    "directions",
    "empty_memory",
    "judge",
    "memory_shape",
    "move",
    "part",
    "random_words",
    "select",
]

memory_shape = sample_shape
# Leaves of one shape are traced once.
_accumulate, _scale = jax.jit(_plain.accumulate), jax.jit(_plain.scale)


def empty_memory(params: PyTree, dtype: Any, whole: bool = False) -> PyTree:
    """The memory before the first step: a sample of each large tensor, unless ``whole``."""

    def sampled(leaf):
        large = not whole and sample_shape(jnp.shape(leaf)) != jnp.shape(leaf)
        return take_samples([leaf], [jnp.zeros([], jnp.int32)])[0] if large else leaf

    # zeros_like, so that the memory lies where the parameters lie.
    return _plain.empty_memory(jax.tree.map(sampled, params), dtype)


def judge(
    gradient: PyTree, memory: PyTree, blocks: Blocks
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See :func:`dartax._plain.judge`."""
    # Without the barrier XLA shares this computation with a later one, writing the result out and
    # reading it twice. For the squares of the gradient that would make a step of 10 M parameters in
    # 24 tensors 2.5 times as long on a CPU (dartax bench --sizes 1e7x24).
    gradient, memory = jax.lax.optimization_barrier((gradient, memory))
    part = jax.tree.leaves(part_like(memory, gradient, phases(blocks)))
    whole = jax.tree.leaves(gradient)
    dots = sums(operator.mul, part, jax.tree.leaves(memory))
    sizes = [jnp.size(x) / max(jnp.size(y), 1) for x, y in zip(whole, part, strict=True)]
    if any(size != 1 for size in sizes):
        dots *= np.array(sizes, np.float32)
    lengths = sums(jnp.square, jax.tree.leaves(memory))
    h, squares = (per_block(x, blocks) for x in (-dots, sums(jnp.square, whole)))
    return h, per_block(lengths, blocks), squares


def phases(blocks: Blocks) -> list[jax.Array]:
    """Rows by which the sample of every leaf has moved on, n int32 scalars."""
    return [_scalars(index, (blocks.phase,))[0] for index in blocks.index]


def directions(
    inner: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    inner_state: PyTree,
    params: PyTree,
    taken: jax.Array,
    blocks: Blocks,
    extra_args: dict[str, Any],
) -> tuple[PyTree, PyTree, PyTree, jax.Array]:
    """See :func:`dartax._plain.directions`; a part of the direction goes into the memory."""
    update = fusable(inner)
    part_of = functools.partial(part_like, extra_args["step_memory"], phases=phases(blocks))
    if update is None or not update.finite:
        direction, new_state = inner.update(updates, inner_state, params, **extra_args)
        squares = per_block(sums(jnp.square, jax.tree.leaves(direction)), blocks)
        taken &= jnp.all(jnp.isfinite(squares))
        direction = zero_unless(taken, direction)
        return direction, part_of(direction), select(taken, new_state, inner_state), taken
    extra_args = {**extra_args, "taken": taken}
    direction, inner_state = update(updates, inner_state, params, **extra_args)
    if update.again is None:
        return direction, part_of(direction), inner_state, taken
    return direction, update.again(updates, inner_state, taken, part_of), inner_state, taken


def part(params: PyTree, memory: PyTree, blocks: Blocks) -> PyTree:
    """See :func:`dartax._plain.part`."""
    return part_like(memory, params, phases=phases(blocks))


def move(
    direction: PyTree,
    remembered: PyTree,
    memory: PyTree,
    rates: jax.Array,
    weights: jax.Array,
    keep: jax.Array,
    blocks: Blocks,
    *,
    reads_params: bool = False,
) -> tuple[PyTree, PyTree, jax.Array]:
    """See :func:`dartax._plain.move`; the lengths are those of the part that the memory holds."""
    structure: Any = jax.tree.structure(memory)
    rows = [_scalars(index, (rates, weights, keep)) for index in blocks.index]
    leaf_rates, leaf_weights, leaf_keep = (
        jax.tree.unflatten(structure, [row[i] for row in rows]) for i in range(3)
    )
    memory = jax.tree.map(_accumulate, memory, remembered, leaf_weights, leaf_keep)
    if reads_params:
        leaf_rates = after_memory(leaf_rates, memory)
    squares = per_block(sums(jnp.square, jax.tree.leaves(remembered)), blocks)
    return jax.tree.map(_scale, direction, leaf_rates), memory, squares


def select(taken: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """See :func:`dartax._plain.select`."""
    return jax.tree.map(lambda n, o: choose(taken, n, o), new, old)


def per_block(of_leaves: jax.Array, blocks: Blocks) -> jax.Array:
    """See :func:`dartax._plain.per_block`; nothing to sum where every leaf is a block."""
    if blocks.num_blocks == len(blocks.of_leaf):
        return of_leaves
    return _plain.per_block(of_leaves, blocks)


@jax.jit
def _scalars(index: jax.Array, values: tuple[jax.Array, ...]) -> list[jax.Array]:
    """The values of one block, for a leaf.

    The index is an argument of the program. A constant would make every leaf's kernels a program
    of their own: on a CPU 24 tensors would take 1.5 times as long to compile, and 148 tensors twice
    as long (``dartax bench --sizes 1e7x24 1.24e8x148``).
    """
    return [jax.lax.dynamic_slice(value, [index], [1]).reshape(()) for value in values]
