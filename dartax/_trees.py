"""The trees that users pass: the names of their leaves, and checks with the place of a mistake."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dartax._complex import in_pairs, is_complex, pair_shape

PyTree = Any
Shapes = Callable[[tuple[int, ...]], tuple[int, ...]]


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as text: ``('Dense_0', 'kernel')`` is ``Dense_0/kernel``.

    A single array, whose path is empty, is ``array``.
    """
    # Flax nnx holds every array in a variable, whose path ends with an attribute of its own.
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/") or "array"


def path_names(tree: PyTree) -> list[str]:
    """The paths of all leaves as text, no two alike.

    Where a key has a slash, as in ``{"a/b": x, "a": {"b": y}}``, the later one of two equal paths
    is ``a/b#2``.
    """
    names: dict[str, None] = {}  # in the order of the leaves
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        name = unique = path_name(path)
        number = 1
        while unique in names:
            number += 1
            unique = f"{name}#{number}"
        names[unique] = None
    return list(names)


def at(path: Any) -> str:
    """Where a leaf is, for a message; nothing at the root."""
    return f" at '{path_name(path)}'" if path else ""


def check_params(params: PyTree) -> None:
    """Raises unless ``params`` has leaves and all are floating or complex arrays."""
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
        is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
        if not (is_array or isinstance(leaf, int | float | complex)):
            raise TypeError(
                f"params must be arrays, got a {type(leaf).__name__}{at(path)}; pass what is "
                'trained, such as model.init(key, x)["params"] (Linen), nnx.state(model, '
                "nnx.Param) or eqx.filter(model, eqx.is_inexact_array)."
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"params must have floating or complex dtypes, got {dtype}{at(path)}; pass what is "
                "trained, such as nnx.state(model, nnx.Param), or freeze it with optax.partition "
                "and optax.set_to_zero."
            )


def params_of(updates: PyTree, params: PyTree) -> PyTree:
    """``params`` without the parts for which ``updates`` has ``None``.

    As in optax, ``params`` may be a whole model, with functions and numbers that are not trained.
    """
    structures: list[Any] = [jax.tree.structure(tree) for tree in (updates, params)]
    if params is None or structures[0] == structures[1]:
        return params
    try:
        trained = lambda update, part: None if update is None else part  # noqa: E731
        return jax.tree.map(trained, updates, params, is_leaf=lambda node: node is None)
    except (TypeError, ValueError):
        return params  # a tree of another kind, which the checks tell


def checked(trees: dict[str, PyTree], memory: PyTree, memory_shape: Shapes) -> list[PyTree]:
    """The trees as real arrays; they must be like the parameters given to ``init``.

    Args:
      trees: Arguments by name: ``updates``, ``params`` and others, which may be ``None``.
      memory: The memory of past steps, which holds all of a parameter or a sample of it.
      memory_shape: From the shape of a parameter to that of its sample.
    """
    trees = {**trees, "params": params_of(trees["updates"], trees["params"])}
    for name, tree in trees.items():
        if tree is not None or name == "updates":
            _check_tree(name, tree, memory, memory_shape)
    trees["updates"] = jax.tree.map(jnp.asarray, trees["updates"])
    return [in_pairs(tree) for tree in trees.values()]


def _check_tree(name: str, updates: PyTree, memory: PyTree, memory_shape: Shapes) -> None:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (updates, memory)]
    if structures[0] != structures[1]:
        got, want = (
            {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (updates, memory)
        )
        differ = {"missing": sorted(want - got), "unknown": sorted(got - want)}
        wrong = [f"{how} {names}" for how, names in differ.items() if names]
        raise ValueError(
            f"{name} must have the tree structure of the parameters given to init, got "
            + (" and ".join(wrong) or "other containers")
            + "; pass the same tree as to init, or call init again for another model."
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(memory), strict=True)
    for (path, update), leaf in pairs:
        given = jnp.shape(update)
        shapes = {False: given, True: pair_shape(given)}
        fits = {kind: leaf.shape in (own, memory_shape(own)) for kind, own in shapes.items()}
        if fits[is_complex(update)]:
            continue
        if fits[not is_complex(update)]:
            kind, fix = "complex", "pass the conjugate of what jax.grad gives"
            if is_complex(update):
                kind, fix = "real", "take the gradient of a real loss"
            raise TypeError(
                f"{name} must be {kind} where the parameters are, got {jnp.result_type(update)} at "
                f"'{path_name(path)}'; {fix}."
            )
        sample = memory_shape(given)
        sampled = f" (its sample has {sample})" if sample != given else ""
        raise ValueError(
            f"{name} must have the shapes of the parameters given to init, got "
            f"{given}{sampled} instead of {leaf.shape} at '{path_name(path)}'; "
            "call init again after changing the model or the implementation."
        )


def check_inner_state(
    inner: optax.GradientTransformation, inner_state: PyTree, like: PyTree
) -> None:
    """Raises if ``inner_state`` has another structure than what ``inner`` makes of ``like``."""
    try:
        want = jax.eval_shape(inner.init, like)
    except Exception:
        return  # it needs values
    structures: list[Any] = [jax.tree.structure(tree) for tree in (inner_state, want)]
    if structures[0] != structures[1]:
        raise ValueError(
            "inner and blocks must be those that the state was made for, got a "
            f"{type(inner_state).__name__} as inner state, and {type(want).__name__} is what they "
            "ask for; build the optimizer as it was then, or call init again."
        )
