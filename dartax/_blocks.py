"""Parameter blocks: which leaf of the parameter tree takes which learning rate."""

import functools
import math
import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dartax._siblings import SMALL
from dartax._sums import sums

PyTree = Any
Blocks = PyTree | Callable[[str], Hashable] | None
Shape = Callable[[tuple[int, ...]], tuple[int, ...]]

# The squares of numbers from here on leave float32.
LARGEST_ROOT = 2.0**64


class BlockIndex(NamedTuple):
    """Which of the K blocks each of the n leaves belongs to.

    Attributes:
      of_leaf: The block of every leaf, uint32 ``[n]``.
      digits: The uint32 scalars 0, 1, ..., b - 1, b the root of K rounded up. Two of them tell
        any block to :func:`spread`; without leaves one scalar.
    """

    of_leaf: jax.Array
    digits: tuple[jax.Array, ...] | jax.Array


def _base(num_blocks: int) -> int:
    """The root of the number of blocks, rounded up."""
    return math.isqrt(max(num_blocks - 1, 0)) + 1


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as text: ``('Dense_0', 'kernel')`` is ``Dense_0/kernel``."""
    # Flax nnx holds every array in a variable, whose path ends with an attribute of its own.
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_params(params: PyTree) -> None:
    """Raises unless ``params`` has leaves and all are real floating arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(params)

    # Nodes of optax without leaves are no mistake: the MaskedNode of a partition label that nobody
    # has, and the placeholder that optax.tree.map_params calls init with.
    def is_node(node: Any) -> bool:
        containers = (dict, list, tuple, type(None))
        return isinstance(node, optax.MaskedNode) or not isinstance(node, containers)

    if not jax.tree.leaves(params, is_leaf=is_node):
        raise ValueError(
            f"params must have at least one array, got the empty tree {params!r}; "
            "pass the parameters of your model."
        )
    for path, leaf in leaves:
        if not (hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)):
            raise TypeError(
                f"params must be arrays, got {leaf!r} at '{path_name(path)}'; take it out."
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
            fix = "optax.contrib.split_real_and_imaginary" if is_complex else "optax.masked"
            raise TypeError(
                f"params must have real floating dtypes, got {dtype} at '{path_name(path)}'; "
                f"leave it to another transform with {fix}."
            )


def check_updates(name: str, updates: PyTree, template: PyTree, shape: Shape) -> None:
    """Raises unless the gradient has the tree structure and shapes of ``template``.

    Args:
      name: Of the argument.
      updates: The gradient, or another tree like the parameters.
      template: The memory of past steps.
      shape: From the shape of a parameter to that of its memory.
    """
    structures: list[Any] = [jax.tree.structure(tree) for tree in (updates, template)]
    if structures[0] == structures[1]:
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(template), strict=True
        )
        for (path, update), leaf in pairs:
            given, kept = jnp.shape(update), shape(jnp.shape(update))
            if kept != leaf.shape:
                thinned = f", of which the state would keep {kept}," if kept != given else ""
                raise ValueError(
                    f"{name} must have the shapes of the parameters given to init, got "
                    f"{given}{thinned} instead of {leaf.shape} at '{path_name(path)}'; "
                    "call init again after changing the model."
                )
            if jnp.issubdtype(jnp.result_type(update), jnp.complexfloating):
                raise TypeError(
                    f"{name} must be real, got {jnp.result_type(update)} at '{path_name(path)}'; "
                    "take the gradient of a real loss with respect to real parameters."
                )
        return
    got = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(updates)}
    want = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(template)}
    missing, extra = sorted(want - got), sorted(got - want)
    raise ValueError(
        f"{name} must have the tree structure of the parameters given to init, got "
        + (f"missing {missing} and unknown {extra}" if missing or extra else "other containers")
        + "; pass the same tree as to init."
    )


def number_blocks(params: PyTree, blocks: Blocks) -> tuple[list[int], int]:
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
    elif callable(blocks):
        labels = [blocks(path_name(p)) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    else:
        try:
            labels = jax.tree.leaves(
                jax.tree.map(
                    lambda label, subtree: jax.tree.map(lambda _: label, subtree), blocks, params
                )
            )
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"blocks must be a pytree of labels with the structure of params or a prefix of "
                f"it, got {jax.tree.structure(blocks)}; None and tuples are containers, not labels."
            ) from error
    number: dict[Hashable, int] = {}
    try:
        index = [number.setdefault(label, len(number)) for label in labels]
    except TypeError as error:
        raise TypeError(
            f"blocks must give hashable labels, got {labels!r}; use strings or ints."
        ) from error
    return index, len(number)


def block_index(numbers: list[int], num_blocks: int) -> BlockIndex:
    """What :func:`number_blocks` found, as arrays for the state to hold."""
    digits = tuple(jnp.asarray(digit, jnp.uint32) for digit in range(_base(num_blocks)))
    # One array is a prefix of any tuple, which optax.tree.map_params needs: it calls init with a
    # tree that has no leaves.
    return BlockIndex(jnp.asarray(numbers, jnp.uint32), digits if numbers else digits[0])


def check_same_blocks(
    numbers: list[int], num_blocks: int, index: BlockIndex, kept_blocks: int
) -> None:
    """Raises unless a state of ``kept_blocks`` blocks was made for the blocks of this optimizer.

    Of a traced state, inside ``jax.jit``, only their number can be read.
    """
    other = f"{num_blocks} blocks instead of {kept_blocks}" if num_blocks != kept_blocks else ""
    if not other and not isinstance(index.of_leaf, jax.core.Tracer):
        differ = np.asarray(index.of_leaf) != np.array(numbers, np.uint32)
        other = f"others for {np.sum(differ)} of {len(numbers)} leaves" if np.any(differ) else ""
    if other:
        raise ValueError(
            f"blocks must be those that the state was made for, got {other}; build the optimizer "
            "as it was then, or call init again."
        )


def block_dots(
    left: PyTree, right: PyTree, numbers: list[int], num_blocks: int, whole: PyTree = None
) -> jax.Array:
    """Inner product of two trees over every block, accumulated in float32; ``[K]``.

    Where they are parts of larger trees, ``whole`` and another, it is that of these, as far as the
    parts tell.
    """
    leaves = jax.tree.leaves(left)
    if not leaves:
        return jnp.zeros(num_blocks, jnp.float32)
    dots = sums(operator.mul, leaves, jax.tree.leaves(right))
    wholes = jax.tree.leaves(left if whole is None else whole)
    sizes = [(jnp.size(x), jnp.size(y)) for x, y in zip(wholes, leaves, strict=True)]
    if any(size != part for size, part in sizes):
        dots *= np.array([size / max(part, 1) for size, part in sizes], np.float32)
    if num_blocks == len(numbers):  # blocks are numbered in the order of the leaves
        return dots
    return jnp.zeros(num_blocks, jnp.float32).at[np.array(numbers)].add(dots)


def either(condition: jax.Array, values: jax.Array, others: Any) -> jax.Array:
    """``jnp.where(condition, values, others)`` for a scalar condition, computed once.

    XLA computes elementwise arithmetic of small arrays again in every kernel that reads its result,
    here in those of every leaf, but a reduction only once.
    """
    first = jnp.array([[True], [False]])
    rows = jnp.where(first, values, others)
    return jnp.max(jnp.where(first == condition, rows, -jnp.inf), axis=0)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _scalars(
    block: tuple[jax.Array, jax.Array],
    values: tuple[jax.Array, ...],
    base: int,
    large: tuple[bool, ...],
) -> list[jax.Array]:
    # The barrier gives a leaf values of its own. On a GPU common ones make siblings of the kernels
    # of small arrays; what XLA tears apart for that is read twice, which costs more of large ones.
    own_block, own = jax.lax.optimization_barrier((block, values))
    scalars = []
    for common_value, own_value, is_large in zip(values, own, large, strict=True):
        value, digits = (own_value, own_block) if is_large else (common_value, block)
        place = digits[0] * np.uint32(base) + digits[1]
        scalars.append(jax.lax.dynamic_slice(value, [place], [1]).reshape(()))
    return scalars


def spread(
    numbers: list[int], index: BlockIndex, *columns: tuple[jax.Array, PyTree]
) -> list[PyTree]:
    """For each of ``columns``, values ``[K]`` and a tree, one like that of the blocks' scalars.

    The scalars of a leaf are meant as factors of that leaf. A constant index into the values would
    make every leaf's kernels a program of their own, at some 10 ms of compilation each; arguments
    leave one program for all leaves of a shape. And to hand over an argument takes the host a
    microsecond or more: so there is not one for each leaf, but a few digits, two of which make the
    number of any block.
    """
    values = tuple(value for value, _ in columns)
    trees = [tree for _, tree in columns]
    structure: Any = jax.tree.structure(trees[0])
    rows = zip(*map(jax.tree.leaves, trees), strict=True)
    base, of_leaves = _base(len(values[0])), []
    for number, row in zip(numbers, rows, strict=True):
        block = index.digits[number // base], index.digits[number % base]
        large = tuple(jnp.size(leaf) > SMALL for leaf in row)
        of_leaves.append(_scalars(block, values, base, large))
    return [
        jax.tree.unflatten(structure, [leaf[i] for leaf in of_leaves]) for i in range(len(values))
    ]


@functools.partial(jax.jit, static_argnums=(1, 2))
def matrix_rms(tree: PyTree, numbers: tuple[int, ...], num_blocks: int) -> jax.Array:
    """Root mean square of the elements of every block's matrices, at most 2**64, ``[K]``.

    It is 0 without any, and for elements whose squares vanish in float32.

    Matrices are leaves of two or more dimensions. Biases start at 0 and the scales of a
    normalization at 1, whatever the size of the weights that they belong to.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    pairs = zip(leaves, numbers, strict=True)
    matrices = [(leaf, number) for leaf, number in pairs if leaf.ndim >= 2]
    if not matrices:
        return jnp.zeros(num_blocks, jnp.float32)
    chosen, blocks = [leaf for leaf, _ in matrices], [number for _, number in matrices]
    size = np.zeros(num_blocks, np.float32)
    np.add.at(size, blocks, [leaf.size for leaf in chosen])
    squares = block_dots(chosen, chosen, blocks, num_blocks)
    return jnp.minimum(jnp.sqrt(squares / np.maximum(size, 1)), LARGEST_ROOT)
