"""The arithmetic of a step, as tree maps: read this to see what a step computes.

``implementation="plain"`` runs it. ``dartax/_fused`` computes the same faster and in less space,
except that its memory z holds only a sample of each large tensor. The tests compare the two. For
every block i, with gradient g, direction u of the inner transform and memory z of the past steps:

    judge        h_i    = -< g_i, z_i >,  |z_i|^2,  |g_i|^2       over all leaves of the block
    directions   u_i    = what the inner transform makes of the gradient
    move         update = rate_i * u_i,     z_i <- keep_i * z_i + weight_i * u_i,    |u_i|^2

A step that is not ``taken`` leaves the inner state as it was, and its direction is 0.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dartax._averages import f32
from dartax._blocks import LARGEST_ROOT, Blocks
from dartax._trees import PyTree


def empty_memory(params: PyTree, dtype: Any, whole: bool = True) -> PyTree:
    """The memory before the first step, whole; in ``_fused`` only if ``whole`` says so."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)


def memory_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the memory of a parameter of this shape."""
    return shape


def random_words(
    key: jax.Array, count: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The key of step ``count`` and random uint32 words; keys are raw threefry data, ``[2]``."""
    step_key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), count)
    return jax.random.key_data(step_key), jax.random.bits(step_key, shape, "uint32")


def judge(
    gradient: PyTree, memory: PyTree, blocks: Blocks
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Every block's hypergradient, and squared lengths of the memory and the gradient, ``[K]``."""
    g = [f32(leaf) for leaf in jax.tree.leaves(gradient)]
    z = [f32(leaf) for leaf in jax.tree.leaves(memory)]
    h = per_block([-jnp.sum(x * y) for x, y in zip(g, z, strict=True)], blocks)
    squares = per_block([jnp.sum(leaf**2) for leaf in g], blocks)
    lengths = per_block([jnp.sum(leaf**2) for leaf in z], blocks)
    return h, lengths, squares


def directions(
    inner: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    inner_state: PyTree,
    params: PyTree,
    taken: jax.Array,
    blocks: Blocks,
    extra_args: dict[str, Any],
) -> tuple[PyTree, PyTree, PyTree, jax.Array]:
    """The direction, the part of it that enters the memory (here all), and the new inner state.

    Also whether the step is taken: not if it was to be skipped before, and not if the squared norm
    of the direction of a block is not finite.
    """
    direction, new_state = inner.update(updates, inner_state, params, **extra_args)
    squares = per_block([jnp.sum(f32(leaf) ** 2) for leaf in jax.tree.leaves(direction)], blocks)
    taken &= jnp.all(jnp.isfinite(squares))
    direction = select(taken, direction, jax.tree.map(jnp.zeros_like, direction))
    return direction, direction, select(taken, new_state, inner_state), taken


def part(params: PyTree, memory: PyTree, blocks: Blocks) -> PyTree:
    """The part of the parameters that goes into the memory, here all."""
    return params


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
    """The updates, the new memory and the squared lengths of what was added to it.

    ``rates``, ``weights`` and ``keep`` are ``[K]``, and so are the lengths, before the weights.
    ``reads_params`` says whether the direction was computed from the parameters too.
    """
    block = jax.tree.unflatten(jax.tree.structure(memory), blocks.of_leaf)
    updates = jax.tree.map(lambda u, i: scale(u, rates[i]), direction, block)
    memory = jax.tree.map(
        lambda z, u, i: accumulate(z, u, weights[i], keep[i]), memory, remembered, block
    )
    squares = per_block([jnp.sum(f32(leaf) ** 2) for leaf in jax.tree.leaves(remembered)], blocks)
    return updates, memory, squares


def scale(direction: jax.Array, rate: jax.Array) -> jax.Array:
    """``rate * direction`` in the dtype of the direction, multiplied in float32 at least."""
    dtype = jnp.float64 if direction.dtype == jnp.float64 else jnp.float32
    return (rate.astype(dtype) * direction.astype(dtype)).astype(direction.dtype)


def accumulate(
    memory: jax.Array, direction: jax.Array, weight: jax.Array, keep: jax.Array
) -> jax.Array:
    """``keep * memory + weight * direction`` in float32, in the dtype of the memory."""
    # A larger element could make later inner products infinite.
    most = np.float32(min(LARGEST_ROOT, float(jnp.finfo(memory.dtype).max)))
    return jnp.clip(keep * f32(memory) + weight * f32(direction), -most, most).astype(memory.dtype)


def select(taken: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` where the step is taken, ``old`` where it is skipped, in the dtypes of ``old``."""
    like = lambda n, o: jnp.asarray(n, jnp.result_type(o))  # noqa: E731
    return jax.tree.map(lambda n, o: jnp.where(taken, like(n, o), o), new, old)


def per_block(of_leaves: Sequence[jax.Array] | jax.Array, blocks: Blocks) -> jax.Array:
    """Sums the scalars of the leaves over every block, ``[K]``."""
    sums = jnp.zeros(blocks.num_blocks, jnp.float32)
    return sums.at[np.array(blocks.of_leaf, int)].add(jnp.array(of_leaves, jnp.float32))
