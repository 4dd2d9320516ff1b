"""Which rows of a large tensor the memory of past steps holds.

The hypergradient of a block is an inner product over all its elements. Some of them tell as well
whether its steps were too long or too short: with n elements, m of which lie in the rows R,

    h = -< g, z >    is estimated by    -(n / m) < g[R], z[R] >

so that the memory z of the other rows need not be kept, and a step neither reads nor writes it.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dartax._mesh import auto_sharded

PyTree = Any

# Kept is one in so many rows, ...
MOST = 32
# ... but no fewer elements than this: the fewer, the more noise there is in the hypergradient.
LEAST = 1 << 16
# A mesh that splits a tensor among so many devices, or a number that divides it, splits the rows
# that are kept in the same way.
DEVICES = 16


class Rows(NamedTuple):
    """``number`` rows of a tensor along ``axis``, one every ``step``, from the first on."""

    axis: int
    number: int
    step: int


@dataclasses.dataclass(frozen=True)
class Thinning:
    """What is kept of tensors: of large ones some rows, of others all.

    Attributes:
      least: Number of elements that are always kept; ``math.inf`` keeps all.
    """

    least: float = LEAST

    def rows(self, shape: tuple[int, ...]) -> Rows | None:
        """Those that are kept of a tensor of this shape; ``None`` where all are."""
        size = math.prod(shape)
        if size <= 2 * self.least:
            return None
        # Along the last axis a row would be a single number of every line of the memory.
        axis = int(np.argmax(shape[:-1] or shape))
        parts = math.gcd(shape[axis], DEVICES)
        length = shape[axis] // parts
        fewest = math.ceil(length / min(MOST, size / self.least))
        # Where their number divides the length, every device has all of its own rows.
        number = next((n for n in range(fewest, 2 * fewest) if length % n == 0), fewest)
        return Rows(axis, parts * number, length // number) if number < length else None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what is kept of a tensor of this shape."""
        rows = self.rows(shape)
        return (*shape[: rows.axis], rows.number, *shape[rows.axis + 1 :]) if rows else shape

    def part(self, tree: PyTree) -> PyTree:
        """A tree with what is kept of every leaf."""

        def kept(leaf):
            if (rows := self.rows(jnp.shape(leaf))) is None:
                return leaf
            axis, number, step = rows
            return jax.lax.slice_in_dim(leaf, 0, number * step, step, axis)

        if all(self.rows(jnp.shape(leaf)) is None for leaf in jax.tree.leaves(tree)):
            return tree
        return auto_sharded(lambda tree: jax.tree.map(kept, tree), tree, shape=self.shape)

    def rest_is_finite(self, tree: PyTree) -> jax.Array:
        """Whether the leaves of which only a part is kept are finite."""
        large = [leaf for leaf in jax.tree.leaves(tree) if self.rows(jnp.shape(leaf))]
        # A sum takes half as long as any() of a predicate. One that leaves float32 is no loss: the
        # square of some element does so too.
        sums = [jnp.sum(leaf.astype(jnp.float32)) for leaf in large]
        return jnp.all(jnp.isfinite(jnp.asarray(sums)))
