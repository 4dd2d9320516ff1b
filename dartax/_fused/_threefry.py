"""The bits of ``jax.random`` in a form that compiles faster.

Threefry-2x32 (Salmon et al., `Parallel Random Numbers: As Easy as 1, 2, 3
<https://doi.org/10.1145/2063384.2063405>`_, 2011) turns a counter of two words into two random
words by 20 rounds. On a CPU ``jax.random`` loops over them, which becomes many small programs. Here
they are written out, as one program.

Gain: on a CPU a step of 24 tensors compiles in a fifth less time (``dartax bench --sizes 1e7x24``).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)

Words = tuple[jax.Array, jax.Array]


def _threefry(key: jax.Array, counter: Words) -> Words:
    """Two random words from key data, uint32 ``[2]``, and two words of a counter, uint32."""
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
    """Data of ``jax.random.fold_in`` from key data and a non-negative int32."""
    words = jnp.stack(_threefry(key, (jnp.uint32(0), number.astype(jnp.uint32))))
    # The barrier, as the one below: each kernel that reads the words would compute them again.
    return jax.lax.optimization_barrier(words)


def random_words(
    key: jax.Array, count: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """See :func:`dartax._plain.random_words`."""
    step_key = fold_in(key, count)
    number = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    high, low = _threefry(step_key, (jnp.zeros_like(number), number))
    return step_key, jax.lax.optimization_barrier(high ^ low)
