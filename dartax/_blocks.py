"""Parameter blocks: which leaf of the parameter tree takes which learning rate."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dartax import _check
from dartax._averages import root
from dartax._trees import PyTree, path_names

Labels = PyTree | Callable[[str], Hashable] | None

# A sample moves on when its count of silent updates exceeds PATIENCE. An update that is heard takes
# HEARD off the count, so a sample stays if more than one update in 21 is heard.
PATIENCE, HEARD = 100, 20
# Squares from here on overflow float32.
LARGEST_ROOT = 2.0**64


class Blocks(NamedTuple):
    """The K blocks of n leaves, numbered in the order of their first leaf.

    Attributes:
      of_leaf: The block of every leaf, n ints.
      num_blocks: K.
      index: The same numbers as n uint32 scalars of the state: arguments of a compiled program.
        If there are no leaves, one empty array.
      phase: Rows by which the samples of the blocks' large tensors have moved on, int32 ``[K]``.
    """

    of_leaf: tuple[int, ...]
    num_blocks: int
    index: Any
    phase: jax.Array

    def sizes(self, tree: PyTree) -> np.ndarray:
        """How many elements of ``tree``, a tree with these leaves, every block has, ``[K]``."""
        sizes = [np.size(leaf) for leaf in jax.tree.leaves(tree)]
        return np.bincount(self.of_leaf, sizes, self.num_blocks).astype(np.float32)


def number_blocks(params: PyTree, blocks: Labels) -> tuple[tuple[int, ...], int]:
    """Numbers the blocks in the order in which their first leaf appears.

    Args:
      params: Parameter tree with n leaves.
      blocks: ``None`` or ``"tensor"`` for one block per leaf, a pytree of labels (the structure of
        ``params`` or a prefix of it), or a function from a leaf's path, such as
        ``"Dense_0/kernel"``, to its label. Leaves with equal labels share a block.

    Returns:
      The block of each of the n leaves, and the number of blocks K.

    Raises:
      ValueError: If a pytree of labels does not fit ``params``.
    """
    labels: list[Any]
    if blocks is None or blocks == "tensor":
        labels = list(range(len(jax.tree.leaves(params))))
    elif _check.is_function(blocks):
        labels = [blocks(path) for path in path_names(params)]
    else:
        try:
            labels = jax.tree.leaves(jax.tree.broadcast(blocks, params))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"blocks must be a pytree of labels with the structure of params or a prefix of "
                f"it, got {jax.tree.structure(blocks)}; None and tuples are containers, not labels."
            ) from error
    number: dict[Hashable, int] = {}
    try:
        of_leaf = tuple(number.setdefault(label, len(number)) for label in labels)
    except TypeError as error:
        raise TypeError(
            f"blocks must give hashable labels, got {labels!r}; use strings or ints."
        ) from error
    return of_leaf, len(number)


def block_index(of_leaf: tuple[int, ...]) -> Any:
    """The numbers of :func:`number_blocks` as arrays for the state to hold."""
    # An array is a prefix of any tuple. optax.tree.map_params needs that: it calls init with a tree
    # that has no leaves.
    return tuple(jnp.asarray(i, jnp.uint32) for i in of_leaf) or jnp.zeros(0, jnp.uint32)


def blocks_of(params: PyTree, labels: Labels, index: Any, phase: jax.Array) -> Blocks:
    """The blocks of a state with :func:`block_index` ``index`` and ``phase``, ``[K]``.

    Raises:
      ValueError: If the state was made for other blocks than ``labels`` gives. Inside ``jax.jit``
        only the number of its blocks can be checked.
    """
    of_leaf, num_blocks = number_blocks(params, labels)
    kept = phase.shape[0]
    other = f"{num_blocks} blocks instead of {kept}" if num_blocks != kept else ""
    if not other and not any(isinstance(i, jax.core.Tracer) for i in index):
        differ = sum(np.any(np.asarray(i) != n) for i, n in zip(index, of_leaf, strict=True))
        other = f"others for {differ} of {len(of_leaf)} leaves" if differ else ""
    if other:
        raise ValueError(
            f"blocks must be those that the state was made for, got {other}; build the optimizer "
            "as it was then, or call init again."
        )
    return Blocks(of_leaf, num_blocks, index, phase)


@jax.jit  # compiled once for every shape
def _sum_of_squares(leaf: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(leaf.astype(jnp.float32)))


def matrix_rms(params: PyTree, of_leaf: tuple[int, ...], num_blocks: int) -> jax.Array:
    """Root mean square of the elements of every block's matrices, at most 2**64, ``[K]``.

    It is 0 for a block without matrices, and where the squares underflow float32.

    Matrices are leaves of two or more dimensions. Biases start at 0 and the scales of a
    normalization at 1, whatever the size of the weights that they belong to.
    """
    pairs = zip(map(jnp.asarray, jax.tree.leaves(params)), of_leaf, strict=True)
    matrices = [(leaf, block) for leaf, block in pairs if leaf.ndim >= 2]
    if not matrices:
        return jnp.zeros(num_blocks, jnp.float32)
    blocks = np.array([block for _, block in matrices])
    sizes = np.bincount(blocks, [leaf.size for leaf, _ in matrices], num_blocks)
    squares = jnp.stack([_sum_of_squares(leaf) for leaf, _ in matrices])
    squares = jnp.zeros(num_blocks, jnp.float32).at[blocks].add(squares)
    return jnp.minimum(root(squares / np.maximum(sizes, 1).astype(np.float32)), LARGEST_ROOT)


def silent_updates(
    before: jax.Array, h: jax.Array, squares: jax.Array, count: jax.Array
) -> jax.Array:
    """How long the sample of every block has been silent, int32 ``[K]``.

    That is its updates with a gradient but without a hypergradient, less HEARD for each update with
    one, in [0, PATIENCE + 1].

    Args:
      before: The same at the last update, ``[K]``.
      h: Hypergradients, ``[K]``.
      squares: Sums of the squares of the gradients, ``[K]``.
      count: Updates so far. Before the first one there is no memory to judge.
    """
    silent = (h == 0) & (squares > 0) & (count > 0)
    heard = jnp.maximum(before - HEARD, 0)
    return jnp.where(h != 0, heard, jnp.minimum(before + silent.astype(jnp.int32), PATIENCE + 1))


def blind(silent_updates: jax.Array, is_sampled: np.ndarray) -> jax.Array:
    """Whether the sample of a block probably lies in rows without gradients, bool ``[K]``.

    Most rows of an embedding table are so. The block then forgets its memory, and its samples move
    on by one row at every update, until one of them is heard.

    Args:
      silent_updates: How long its sample has been silent, ``[K]``.
      is_sampled: Whether the block's memory leaves elements out, ``[K]``.
    """
    return (silent_updates > PATIENCE) & is_sampled
