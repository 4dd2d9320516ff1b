"""Arrays that a GPU computes in one kernel.

To start a kernel takes a GPU as long as to compute ten thousand elements or more, so that a step of
many small kernels waits for their starts. XLA makes one kernel of many that compute arrays of one
shape, up to its limit for arguments, but only of siblings: those that read a common array.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Arrays of up to so many elements are small: to start a kernel takes longer than to copy them.
SMALL = 1 << 16


def siblings(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """``arrays``, made to read a common array: each is multiplied by its first element, a 1."""
    # The barrier hides that it is a 1. Of a scalar XLA makes no siblings.
    one = jax.lax.optimization_barrier(jnp.ones(2, jnp.float32))[0]
    return [array * one.astype(array.dtype) for array in map(jnp.asarray, arrays)]
