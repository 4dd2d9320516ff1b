"""A sample of a large tensor, which stands for all of it in the memory of past steps.

The hypergradient of a block is an inner product over all its elements. With n elements, and m of
them in the sample S,

    h = -< g, z >    is estimated by    -(n / m) < g[S], z[S] >

so a step neither keeps nor reads nor writes the memory z of the others.

The gradient of a matrix is a sum of outer products, one for every example: what goes into the layer
times what comes back from the next one. A few whole rows would show only a few of the inputs, and
would repeat whatever repeats in them, such as the lines of an image. So the rows are interleaved:
each bunch of rows gives one element of every column, and groups of columns take it from different
rows.

Most rows of an embedding table may have no gradients, and the sample none at all. So a sample has a
*phase*, by which it is moved on in every bunch, row by row until it finds some
(``dartax._blocks.blind``).

Gain: 0.1 to 0.6 bytes of state per parameter in place of 4, and on a CPU a step of 10 M parameters
in 24 tensors takes 1.2 times as long as AdamW's in place of 1.7 (``dartax bench --sizes 1e7x24
--optimizers dart dart_whole_memory``). ``dartax compare configs/compare/thinning.toml`` shows what
it costs: nothing beyond noise on two tasks of three, 0.5 % on the other.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dartax._fused._mesh import auto_sharded, is_split
from dartax._trees import PyTree

Shape = tuple[int, ...]

# A sample holds at least one element in 48, ...
SPARSEST = 48
# ... and at least this many elements. Fewer elements mean more noise in the hypergradient.
MIN_SAMPLE = 1 << 14
# A tensor of up to this many times the smallest sample is kept whole.
WHOLE_UP_TO = 8
# A bunch gives elements from at most this many of its rows; each is read as a whole.
MAX_SOURCES = 8
# This many neighboring columns take the same rows: they share cache lines.
WIDTH = 16
# Where a mesh splits a tensor over a number of devices that divides this, it splits the rows of the
# sample the same way.
DEVICES = 16


class Sample(NamedTuple):
    """``number`` bunches of ``step`` rows along ``axis``, each giving one row.

    That row is interleaved from ``sources`` rows of the bunch, evenly spaced from the first one on.
    """

    axis: int
    number: int
    step: int
    sources: int

    @functools.partial(jax.jit, static_argnums=0)
    def take(self, tensor: jax.Array, phase: jax.Array) -> jax.Array:
        """Those elements of a tensor, ``phase`` rows further on, an int32 scalar."""
        axis, number, step, sources = self
        bunches = jax.lax.slice_in_dim(tensor, 0, number * step, axis=axis)
        shape = bunches.shape
        bunches = bunches.reshape((*shape[:axis], number, step, *shape[axis + 1 :]))
        # A slice for each source: XLA would write out one that they share.
        rows = [
            jax.lax.dynamic_index_in_dim(
                bunches, (source * step // sources + phase) % step, axis + 1, keepdims=False
            )
            for source in range(sources)
        ]
        shape = rows[0].shape
        source = np.arange(shape[-1]) // WIDTH % sources
        # Slices and choices in place of a gather: XLA would move the whole tensor between devices
        # for that, and a CPU gathers one element at a time. Each bit of the source halves the rows.
        for bit in range((sources - 1).bit_length()):
            here = jax.lax.broadcast_in_dim(source >> bit & 1 == 1, shape, (len(shape) - 1,))
            pairs = itertools.zip_longest(rows[::2], rows[1::2])
            rows = [even if odd is None else jax.lax.select(here, odd, even) for even, odd in pairs]
        return rows[0]

    @functools.partial(jax.jit, static_argnums=0)
    def gather(self, tensor: jax.Array, phase: jax.Array) -> jax.Array:
        """What :meth:`take` gives, for a GPU, on which ``take`` reads every row it chooses from.

        Gain: 33 bytes per parameter and step in place of 35 to 36
        (``dartax bench --compile-for configs/bench/h100.txtpb --sizes 1e7x24 1.24e8x148``).
        """
        axis, number, step, sources = self
        last = tensor.ndim - 1
        shape = [1] * last + [tensor.shape[-1] if last else number]
        shape[axis] = number
        # Computed: constants would be large, and one for every tensor.
        bunch = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        source = jax.lax.broadcasted_iota(jnp.int32, shape, last) // WIDTH % sources if last else 0
        rows = bunch * step + (source * step // sources + phase) % step
        return jnp.take_along_axis(tensor, rows, axis, mode="promise_in_bounds")


def sample_of(shape: Shape) -> Sample | None:
    """The sample of a tensor of this shape; ``None`` where it is kept whole."""
    size = math.prod(shape)
    if size <= WHOLE_UP_TO * MIN_SAMPLE:
        return None
    # Slices along the last axis would touch one element per cache line.
    axis = int(np.argmax(shape[:-1] or shape))
    parts = math.gcd(shape[axis], DEVICES)
    length = shape[axis] // parts
    fewest = math.ceil(length / min(SPARSEST, size / MIN_SAMPLE))
    # Where the number divides the length, every device has all of its own rows.
    even = (n for n in range(fewest, 2 * fewest) if length % n == 0)
    number = next(even, length // (length // fewest))
    step = length // number
    groups = math.ceil(shape[-1] / WIDTH) if len(shape) > 1 else 1
    return Sample(axis, parts * number, step, min(step, MAX_SOURCES, groups)) if step > 1 else None


def sample_shape(shape: Shape) -> Shape:
    """Shape of the sample of a tensor of this shape."""
    sample = sample_of(shape)
    return (*shape[: sample.axis], sample.number, *shape[sample.axis + 1 :]) if sample else shape


def part_like(memory: PyTree, tree: PyTree, phases: Sequence[jax.Array]) -> PyTree:
    """The part of a tree that the memory holds: samples of the leaves that it has samples of.

    ``phases`` are those of the n leaves.
    """
    leaves, structure = jax.tree.flatten(tree)
    pairs = enumerate(zip(leaves, jax.tree.leaves(memory), strict=True))
    shapes = [(i, jnp.shape(leaf), jnp.shape(z)) for i, (leaf, z) in pairs]
    sampled = [i for i, given, kept in shapes if given != kept == sample_shape(given)]
    parts = take_samples([leaves[i] for i in sampled], [phases[i] for i in sampled])
    for i, part in zip(sampled, parts, strict=True):
        leaves[i] = part
    return jax.tree.unflatten(structure, leaves)


def take_samples(tensors: Sequence[jax.Array], phases: Sequence[jax.Array]) -> list[jax.Array]:
    """The samples of large tensors."""
    if not tensors:
        return []
    samples = tuple(sample_of(jnp.shape(tensor)) for tensor in tensors)
    return _take(samples, list(tensors), list(phases))


@functools.partial(jax.jit, static_argnums=0)
def _take(
    samples: tuple[Sample, ...], tensors: list[jax.Array], phases: list[jax.Array]
) -> list[jax.Array]:
    """One program for all of them, which ``init`` runs outside of any other."""

    def each(part: Callable[[Sample, jax.Array, jax.Array], jax.Array]):
        return lambda *arrays: [part(*row) for row in zip(samples, *arrays, strict=True)]

    if is_split(tensors):
        return auto_sharded(each(Sample.take), tensors, phases, shape=sample_shape)
    gather, take = each(Sample.gather), each(Sample.take)
    return jax.lax.platform_dependent(tensors, phases, cuda=gather, rocm=gather, default=take)
