"""What the tests read of a run folder."""

import csv
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp


def rows_of(workdir):
    """metrics.csv as text, without the column of wall times."""
    with (Path(workdir) / "metrics.csv").open() as file:
        return [
            {name: cell for name, cell in row.items() if name != "wall_s"}
            for row in csv.DictReader(file)
        ]


def steps_of(workdir):
    """The steps of the checkpoints that are finished, ascending."""
    manifests = Path(workdir, "checkpoints").glob("step_*/manifest.json")
    steps = [path.parent.name.removeprefix("step_") for path in manifests]
    return sorted(int(step) for step in steps if step.isdecimal())


def saved_tree(workdir, step):
    """The arrays of a checkpoint in dictionaries and lists, on one device."""
    path = Path(workdir, f"checkpoints/step_{step}/arrays").absolute()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path)
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            getattr(metadata, "item_metadata", metadata),
        )
        return checkpointer.restore(path, template)


def final_state(workdir):
    """The step and the arrays of the last checkpoint."""
    step = steps_of(workdir)[-1]
    return step, jax.tree.leaves(saved_tree(workdir, step))


def assert_same_run(first, second):
    assert rows_of(first) == rows_of(second)
    (step, leaves), (other_step, other_leaves) = final_state(first), final_state(second)
    assert step == other_step
    for leaf, other in zip(leaves, other_leaves, strict=True):
        np.testing.assert_array_equal(leaf, other)
