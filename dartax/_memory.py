"""The memory of past steps, which the next gradient is compared with.

    z_t = horizon * z_{t-1} + weight_t * u_t

is a tree like the parameters, or of a sample of them (``_thinning.py``). At horizon 0 it is the
last direction alone, which some transforms can give again from their state: then nothing is kept of
it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dartax._blocks import LARGEST_ROOT
from dartax._thinning import Thinning

PyTree = Any


def empty(params: PyTree, dtype: Any, kept: bool) -> PyTree:
    """The memory before the first step; arrays without elements where it is not kept."""

    def leaf(p):
        if not kept:
            return jnp.zeros((0,) * jnp.ndim(p), dtype)
        return jnp.zeros_like(p, dtype=dtype)  # lies where the parameters lie

    return jax.tree.map(leaf, params)


def rebuild(direction: PyTree, weight: PyTree) -> PyTree:
    """The memory at horizon 0, from the direction of the last step."""
    return jax.tree.map(lambda u, w: w * u.astype(jnp.float32), direction, weight)


def accumulate(
    direction: jax.Array, weight: jax.Array, last: jax.Array, kept: jax.Array
) -> jax.Array:
    """z_t = kept * z_{t-1} + weight * u_t, in float32, kept in the dtype of the buffer."""
    z = kept * last.astype(jnp.float32) + weight * direction.astype(jnp.float32)
    # Of greater ones the inner product with any gradient would be infinite.
    most = np.float32(min(LARGEST_ROOT, float(jnp.finfo(last.dtype).max)))
    return jax.lax.clamp(-most, z, most).astype(last.dtype)


def part_before(params: PyTree, thinning: Thinning) -> PyTree:
    """The part of the parameters that goes into the memory, read before these are overwritten.

    See :func:`in_order`.
    """

    def kept(param, part):
        whole = jnp.shape(part) == jnp.shape(param)
        return part if whole else jax.lax.optimization_barrier(part)

    return jax.tree.map(kept, params, thinning.part(params))


def in_order(values: PyTree, params: PyTree, part: PyTree, memory: PyTree) -> PyTree:
    """``values``, non-negative scalars, which XLA must compute after what reads the parameters.

    New parameters are written over the old ones, without a copy of these, only where the program
    shows that all that reads the old ones has been computed before. On a CPU that is the memory. On
    a GPU it is the part of a large leaf; of another one a kernel computes the memory and the
    parameters at once, which this would tear apart.

    It shows nothing where the leaf is split over an explicit mesh: its first element lies on one
    device.
    """

    def wait(value, param, row, z, on_cpu):
        first = z if on_cpu else row
        fused = not on_cpu and jnp.shape(row) == jnp.shape(param)
        if fused or first.size == 0 or any(jax.typeof(first).sharding.spec):
            return value
        never = jnp.isnan(first[(0,) * first.ndim]) & (value < 0)
        return jnp.where(never, jnp.nan, value)

    def on(on_cpu):
        return lambda *trees: jax.tree.map(functools.partial(wait, on_cpu=on_cpu), *trees)

    return jax.lax.platform_dependent(values, params, part, memory, cpu=on(True), default=on(False))
