"""Computations that need not know how their arrays are split over an explicit mesh."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any


def _divisible(spec: PartitionSpec, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """``spec`` without the mesh axes that do not divide ``shape``."""

    def keep(names, size):
        devices = [mesh.shape[name] for name in ((names,) if isinstance(names, str) else names)]
        return None if size % math.prod(devices) else names

    pairs = zip(spec, shape, strict=False)
    return PartitionSpec(*(names and keep(names, size) for names, size in pairs))


def auto_sharded(
    function: Callable[..., PyTree],
    *arguments: PyTree,
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape,
) -> PyTree:
    """``function(*arguments)``, a tree like the first of them, on any mesh.

    An explicit mesh asks of every slice and reshape where its result shall lie. Here XLA chooses,
    and only the result lies where its argument does, as far as the mesh divides it.

    Args:
      function: Of arrays, to a tree with the structure of the first argument.
      *arguments: Trees.
      shape: From the shape of a leaf of the first argument to that of its result.
    """
    shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(arguments)]
    mesh = next((one.mesh for one in shardings if one.mesh.explicit_axes), None)
    if mesh is None:
        return function(*arguments)

    def place(leaf):
        spec = jax.typeof(leaf).sharding.spec
        return NamedSharding(mesh, _divisible(spec, shape(leaf.shape), mesh))

    return jax.sharding.auto_axes(
        function, axes=mesh.explicit_axes, out_sharding=jax.tree.map(place, arguments[0])
    )(*arguments)
