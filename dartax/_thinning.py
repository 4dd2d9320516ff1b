"""Which elements of a large tensor the memory of past steps holds.

The hypergradient of a block is an inner product over all its elements. Some of them tell as well
whether its steps were too long or too short: with n elements, m of which are in the sample S,

    h = -< g, z >    is estimated by    -(n / m) < g[S], z[S] >

so that the memory z of the others need not be kept, and a step neither reads nor writes it.

The gradient of a matrix is a sum of outer products, one for every example, of what goes into the
layer and what comes back from the next one. A few whole rows would tell of a few inputs only, and
resonate with what repeats in them, such as the lines of an image. So the columns take turns: each
bunch of rows gives one element of every column, but groups of columns have it from different rows.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dartax._mesh import auto_sharded
from dartax._siblings import siblings
from dartax._sums import sums

PyTree = Any

# Kept is one element in so many, ...
MOST = 48
# ... but no fewer than this: the fewer, the more noise there is in the hypergradient. And all of a
# tensor that is not SMALL times as large.
LEAST, SMALL = 1 << 14, 8
# From so many rows of a bunch; each is read as a whole.
TURNS = 8
# So many neighbouring columns have the same rows: they share lines of the memory.
WIDTH = 16
# A mesh that splits a tensor among so many devices, or a number that divides it, splits the rows
# of the sample in the same way.
DEVICES = 16


class Sample(NamedTuple):
    """Bunches of ``step`` rows along ``axis``, ``number`` of them, each of which gives one row.

    It is put together from ``turns`` rows of the bunch, evenly spaced, the first one included.
    """

    axis: int
    number: int
    step: int
    turns: int

    @functools.partial(jax.jit, static_argnums=0)
    def take(self, tensor: jax.Array) -> jax.Array:
        """Those elements of a tensor."""
        axis, number, step, turns = self
        starts = [turn * step // turns for turn in range(turns)]
        rows = [
            jax.lax.slice_in_dim(tensor, start, start + (number - 1) * step + 1, step, axis)
            for start in starts
        ]
        shape = rows[0].shape
        turn = np.arange(shape[-1]) // WIDTH % turns
        # Slices and choices, no gather, which XLA would split among devices by moving the tensor,
        # and a CPU computes one element at a time. Half of the rows are left after each bit of the
        # turn. (``select_n`` among all at once becomes half as many operations more.)
        for bit in range((turns - 1).bit_length()):
            here = jax.lax.broadcast_in_dim(turn >> bit & 1 == 1, shape, (len(shape) - 1,))
            pairs = itertools.zip_longest(rows[::2], rows[1::2])
            rows = [even if odd is None else jax.lax.select(here, odd, even) for even, odd in pairs]
        return rows[0]

    @functools.partial(jax.jit, static_argnums=0)
    def gather(self, tensor: jax.Array) -> jax.Array:
        """What :meth:`take` gives. On a GPU that would read every row that it chooses from."""
        axis, number, step, turns = self
        if tensor.ndim == 1:
            return tensor[: number * step : step]
        last = tensor.ndim - 1
        shape = [1] * last + [tensor.shape[-1]]
        shape[axis] = number
        # Computed, not constants, of which there would be one for every tensor.
        bunch = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        turn = jax.lax.broadcasted_iota(jnp.int32, shape, last) // WIDTH % turns
        rows = bunch * step + turn * step // turns
        return jnp.take_along_axis(tensor, rows, axis, mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class Thinning:
    """What is kept of tensors: of large ones a sample, of others all.

    Attributes:
      least: Number of elements that are always kept; ``math.inf`` keeps all.
    """

    least: float = LEAST

    def sample(self, shape: tuple[int, ...]) -> Sample | None:
        """What is kept of a tensor of this shape; ``None`` where all is."""
        size = math.prod(shape)
        if size <= SMALL * self.least:
            return None
        # Along the last axis a row would be a single number of every line of the memory.
        axis = int(np.argmax(shape[:-1] or shape))
        parts = math.gcd(shape[axis], DEVICES)
        length = shape[axis] // parts
        fewest = math.ceil(length / min(MOST, size / self.least))
        # Where their number divides the length, every device has all of its own rows.
        even = (n for n in range(fewest, 2 * fewest) if length % n == 0)
        number = next(even, length // (length // fewest))
        step = length // number
        groups = math.ceil(shape[-1] / WIDTH) if len(shape) > 1 else 1
        return Sample(axis, parts * number, step, min(step, TURNS, groups)) if step > 1 else None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what is kept of a tensor of this shape."""
        sample = self.sample(shape)
        return (
            (*shape[: sample.axis], sample.number, *shape[sample.axis + 1 :]) if sample else shape
        )

    def part(self, tree: PyTree) -> PyTree:
        """A tree with what is kept of every leaf."""
        leaves, structure = jax.tree.flatten(tree)
        large = [i for i, leaf in enumerate(leaves) if self.sample(jnp.shape(leaf))]
        parts = _parts(self, [leaves[i] for i in large]) if large else []
        for i, part in zip(large, parts, strict=True):
            leaves[i] = part
        return jax.tree.unflatten(structure, leaves)

    def rest_is_finite(self, tree: PyTree) -> jax.Array:
        """Whether the leaves of which only a part is kept are finite."""
        large = [leaf for leaf in jax.tree.leaves(tree) if self.sample(jnp.shape(leaf))]
        # A sum takes half as long as any() of a predicate. One that leaves float32 is no loss: the
        # square of some element does so too.
        return jnp.all(jnp.isfinite(sums(operator.pos, large)))


@functools.partial(jax.jit, static_argnums=0)
def _parts(thinning: Thinning, leaves: list[jax.Array]) -> list[jax.Array]:
    """What is kept of large leaves, which ``init`` computes by one program, not slice by slice."""
    samples = [thinning.sample(leaf.shape) for leaf in leaves]

    def parts(part: Callable[[Sample, jax.Array], jax.Array], leaves: list[jax.Array]):
        pairs = zip(samples, leaves, strict=True)
        return [part(sample, leaf) for sample, leaf in pairs if sample]

    take = functools.partial(parts, Sample.take)
    if jax.device_count() > 1:
        of_siblings = lambda leaves: siblings(take(leaves))  # noqa: E731
        return auto_sharded(of_siblings, leaves, shape=thinning.shape)
    gather = lambda leaves: siblings(parts(Sample.gather, leaves))  # noqa: E731
    return jax.lax.platform_dependent(leaves, cuda=gather, rocm=gather, default=take)
