"""The devices and processes of a run: a mesh with a data axis and a model axis, and its shardings.

A single device is a mesh of size one. If a run has several processes, the mesh spans the devices of
all of them. All processes hold the same data and run the same program.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dartax.experiments.config import ConfigError

PyTree = Any

DATA, MODEL = "data", "model"


def join_processes(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of this run, before this process uses a device.

    JAX detects missing arguments on a cluster (Slurm, Open MPI, Kubernetes, TPU).

    Args:
      coordinator: Address of process 0, such as ``localhost:1234``.
      processes: Number of processes.
      process_id: Number of this process, in [0, processes).

    Raises:
      ConfigError: If the processes cannot be joined.
    """
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            "--distributed must find a cluster, or be given --coordinator HOST:PORT, --processes N "
            f"and --process-id I of 0 to N - 1, got {coordinator}, {processes} and {process_id} "
            f"({str(error).splitlines()[0]}); pass all three."
        ) from error


def exit_alone(status: int) -> None:
    """Ends this process if it has joined others. A normal exit would wait for them."""
    if jax.distributed.is_initialized():
        sys.stderr.flush()
        if is_first_process():
            time.sleep(2.0)  # the end of process 0 ends the others: let them print their messages
        os._exit(status)


def is_first_process() -> bool:
    """Tells whether this process writes the files of the run."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Waits until all processes have called this function."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def largest(*values: int) -> list[int]:
    """Returns, in every process, the largest of each value over all processes."""
    if jax.process_count() == 1:
        return list(values)
    return multihost_utils.process_allgather(np.asarray(values)).max(axis=0).tolist()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises an error in all processes if one of them raises an error inside."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    (failed,) = largest(error is not None)
    if error is not None:
        raise error
    if failed:
        raise ConfigError(
            f"a run must begin in all of its processes, got an error in another one of the "
            f"{jax.process_count()}; see its message."
        )


@contextlib.contextmanager
def exit_if_left_alone() -> Iterator[None]:
    """Ends this process with a message if another process of the run is lost.

    The next sum over the devices then raises an error. A normal exit would wait for the lost
    process until the timeout of JAX, which takes minutes.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # Gloo, which communicates between CPUs, causes errors of both types.
        if jax.process_count() == 1 or (isinstance(error, ValueError) and "Gloo" not in str(error)):
            raise
        print(
            f"\ndartax: process {jax.process_index()} of {jax.process_count()} cannot go on "
            f"without the others ({str(error).splitlines()[0]}); start all of them again, and the "
            "same commands resume the run.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def make_mesh(shape: Sequence[int], batch_size: int) -> Mesh:
    """Makes the mesh of a run, with the axes ``data`` and ``model``.

    Args:
      shape: Number of devices along the data axis and, optionally, along the model axis. If empty,
        the data axis gets as many devices as divide the batch.
      batch_size: Examples per step, which are split over the data axis.

    Raises:
      ConfigError: If ``shape`` does not fit the devices or the batch.
    """
    available = len(jax.devices())
    if not shape:
        shape = [max(n for n in range(1, available + 1) if batch_size % n == 0)]
    data, model = (*shape, 1)[:2]
    if data * model > available:
        raise ConfigError(
            f"mesh must have at most the {available} devices that JAX finds, got "
            f"{list(shape)}; pass e.g. --mesh {available}."
        )
    if batch_size % data:
        raise ConfigError(
            f"batch_size must be a multiple of the {data} devices of the data axis, got "
            f"{batch_size}; pass --batch-size {data * max(1, batch_size // data)} or another mesh."
        )
    devices = jax.devices()[: data * model]
    idle = set(range(jax.process_count())) - {device.process_index for device in devices}
    if idle:
        raise ConfigError(
            f"mesh must have devices of all {jax.process_count()} processes, got {list(shape)} of "
            f"{available} devices; pass --mesh {available}, and a --batch-size that it divides."
        )
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=types, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh, batch: jax.Array) -> jax.Array:
    """Splits the first axis of ``batch`` over the data axis."""
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec(DATA)))


def state_shardings(
    mesh: Mesh, optimizer: optax.GradientTransformation, params: PyTree, opt_state: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns the shardings of the parameters and the optimizer state, from trees of shapes.

    The last axis of a parameter is split over the model axis if the sizes allow it. State arrays
    with the shape of their parameter are sharded like it. All others are replicated.
    """

    def last_axis(leaf: Any) -> NamedSharding:
        if leaf.ndim == 0 or leaf.shape[-1] % mesh.shape[MODEL]:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), MODEL))

    def beside(leaf: Any, param: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # belongs to another part of a partition
            return leaf
        return sharding if leaf.shape == param.shape else replicated(mesh)

    of_params = jax.tree.map(last_axis, params)
    of_state = optax.tree.map_params(
        optimizer,
        beside,
        opt_state,
        params,
        of_params,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    return of_params, of_state


def placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Adds shardings to the shapes and dtypes of arrays."""

    def place(sharding, part):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part
        )

    return jax.tree.map(place, shardings, shapes)


def own_shards(tree: PyTree) -> PyTree:
    """Returns the part of each array that is on the first device of this process."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)
