"""Arrays that a GPU computes in one kernel.

Starting a kernel takes a GPU as long as computing ten thousand elements or more, so a step of many
small kernels waits for their starts. XLA fuses kernels that compute arrays of one shape, up to its
limit for arguments, but only siblings: those that read a common array.

Gain: see ``_sums.py``; the two are measured together.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Starting a kernel takes longer than copying this many elements.
LAUNCH_BOUND = 1 << 16


def siblings(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """``arrays``, each multiplied by the 1 that is the first element of an array they all read."""
    # The barrier hides the value from XLA. A common scalar would not make them siblings.
    one = jax.lax.optimization_barrier(jnp.ones(2, jnp.float32))[0]
    return [array * one.astype(array.dtype) for array in map(jnp.asarray, arrays)]
