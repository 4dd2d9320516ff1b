"""The memory of past steps, which the next gradient is compared with.

    z_t = memory_decay * z_{t-1} + weight_t * u_t

is a tree like the parameters, or of a sample of them (``_thinning.py``). At memory_decay 0 it is the
last direction alone, which some transforms can give again from their state: then nothing is kept of
it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dartax._blocks import LARGEST_ROOT

PyTree = Any


def empty(params: PyTree, dtype: Any, kept: bool) -> PyTree:
    """The memory before the first step; arrays without elements where it is not kept."""

    def leaf(p):
        if not kept:
            return jnp.zeros((0,) * jnp.ndim(p), dtype)
        return jnp.zeros_like(p, dtype=dtype)  # lies where the parameters lie

    return jax.tree.map(leaf, params)


def rebuild(direction: PyTree, weight: PyTree) -> PyTree:
    """The memory at memory_decay 0, from the direction of the last step."""
    return jax.tree.map(lambda u, w: w * u.astype(jnp.float32), direction, weight)


@jax.jit
def accumulate(
    direction: jax.Array, weight: jax.Array, last: jax.Array, kept: jax.Array
) -> jax.Array:
    """z_t = kept * z_{t-1} + weight * u_t, in float32, kept in the dtype of the buffer."""
    z = kept * last.astype(jnp.float32) + weight * direction.astype(jnp.float32)
    # Of greater ones the inner product with any gradient would be infinite.
    most = np.float32(min(LARGEST_ROOT, float(jnp.finfo(last.dtype).max)))
    return jax.lax.clamp(-most, z, most).astype(last.dtype)
