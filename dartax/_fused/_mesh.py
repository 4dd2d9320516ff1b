"""Whether arrays are split over several devices, and computations that need not know how."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dartax._trees import PyTree


def is_split(tree: PyTree) -> bool:
    """Whether any array may be split over several devices: whether it has a mesh of several.

    Under ``jax.jit`` the arrays of an automatic mesh do not tell along which axes they are split,
    so one that is the same on all devices counts as well. Inside ``jax.shard_map``, whose axes are
    manual, an array lies on one device.
    """

    def split(leaf):
        mesh = jax.typeof(leaf).sharding.mesh
        return any(
            size > 1 and kind != AxisType.Manual
            for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        )

    return any(map(split, jax.tree.leaves(tree)))


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

    On an explicit mesh, every slice and reshape must say how its result is sharded. Here XLA
    chooses, and only the result is sharded like the first argument, where the mesh divides it.

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
