"""float16: inner transforms compute in float32, where squares neither underflow nor overflow."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dartax._trees import PyTree


def widened(tree: PyTree) -> PyTree:
    """``tree`` with float32 in place of float16."""
    is_half = lambda x: jnp.result_type(x) == jnp.float16  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if is_half(x) else x, tree)


def as_half(direction: jax.Array, like: Any) -> jax.Array:
    """Casts ``direction`` to float16, clipped to its range, if ``like`` is float16."""
    if jnp.result_type(like) != jnp.float16:
        return direction
    most = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(direction, -most, most).astype(jnp.float16)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``inner``, which sees float32 in place of float16 gradients and parameters."""
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates, state, params=None, **extra_args):
        wide = None if params is None else widened(params)
        directions, state = inner.update(widened(updates), state, wide, **extra_args)
        return jax.tree.map(as_half, directions, updates), state

    return optax.GradientTransformationExtraArgs(
        lambda params: inner.init(widened(params)), update_fn
    )
