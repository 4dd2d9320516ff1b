"""Complex leaves as pairs of real ones: the step itself knows only real numbers.

The real and the imaginary parts of a leaf stand side by side along its last axis, in one block. So
inner products are the real parts of complex ones, and squares are those of the modulus. Gradients
are those that optax takes: the conjugates of what ``jax.grad`` gives.
"""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def is_complex(leaf: Any) -> bool:
    """Whether ``leaf`` is a complex array or number."""
    return jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.complexfloating)


def pair_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that :func:`in_pairs` gives a complex leaf of this shape."""
    return (*shape[:-1], 2 * shape[-1]) if shape else (2,)


def in_pairs(tree: PyTree) -> PyTree:
    """``tree`` with a real leaf ``[..., 2n]`` for every complex one, ``[..., n]``."""

    def pair(leaf: Any) -> Any:
        if not is_complex(leaf):
            return leaf
        leaf = jnp.atleast_1d(leaf)
        return jnp.concatenate([leaf.real, leaf.imag], axis=-1)

    return jax.tree.map(pair, tree)


def out_of_pairs(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` with complex leaves where ``like`` has them."""

    def unpair(leaf: jax.Array, like: Any) -> jax.Array:
        if not is_complex(like):
            return leaf
        real, imaginary = jnp.split(leaf, 2, axis=-1)
        return jax.lax.complex(real, imaginary).reshape(jnp.shape(like))

    return jax.tree.map(unpair, tree, like)
