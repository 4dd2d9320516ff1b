"""The bits of ``jax.random``, in a form that compiles in a quarter of its time.

Threefry-2x32 (Salmon et al., `Parallel Random Numbers: As Easy as 1, 2, 3
<https://doi.org/10.1145/2063384.2063405>`_, 2011) turns a counter of two words into two random
words by 20 rounds. ``jax.random`` has a loop over them on a CPU, which is many small programs; here
they are written out, one program. For few draws: of many the time of compilation matters little.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)

Words = tuple[jax.Array, jax.Array]


def _threefry(key: jax.Array, counter: Words) -> Words:
    """Two random words from a key, uint32 ``[2]``, and two words of a counter, uint32."""
    keys = key[0], key[1], key[0] ^ key[1] ^ _PARITY
    left, right = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            left += right
            rotated = (right << np.uint32(rotation)) | (right >> np.uint32(32 - rotation))
            right = left ^ rotated
        left += keys[(group + 1) % 3]
        right += keys[(group + 2) % 3] + np.uint32(group + 1)
    return left, right


@jax.jit
def fold_in(key: jax.Array, number: jax.Array) -> jax.Array:
    """``jax.random.fold_in`` of a threefry key, not the data of one, and an int32 or uint32."""
    counter = jnp.uint32(0), jnp.asarray(number).astype(jnp.uint32)
    words = jnp.stack(_threefry(jax.random.key_data(key), counter))
    # The barrier, as the one below: kernels that read the words would each compute them again.
    return jax.random.wrap_key_data(jax.lax.optimization_barrier(words), impl="threefry2x32")


@functools.partial(jax.jit, static_argnums=(1, 2))
def bits(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """``jax.random.bits`` of a threefry key, uint32 or uint64, of fewer than 2**32 words."""
    number = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    high, low = _threefry(jax.random.key_data(key), (jnp.zeros_like(number), number))
    if jnp.dtype(dtype) == jnp.uint64:
        words = high.astype(dtype) << 32 | low.astype(dtype)
    else:
        words = high ^ low
    return jax.lax.optimization_barrier(words)
