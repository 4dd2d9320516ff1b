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


def final_state(workdir):
    """The arrays of the last checkpoint."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    path = (Path(workdir) / "checkpoints").absolute()
    with ocp.CheckpointManager(path, item_handlers=ocp.StandardCheckpointHandler()) as manager:
        step = manager.latest_step()
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            dict(manager.item_metadata(step)),
        )
        return step, jax.tree.leaves(manager.restore(step, args=ocp.args.StandardRestore(template)))


def assert_same_run(first, second):
    assert rows_of(first) == rows_of(second)
    (step, leaves), (other_step, other_leaves) = final_state(first), final_state(second)
    assert step == other_step
    for leaf, other in zip(leaves, other_leaves, strict=True):
        np.testing.assert_array_equal(leaf, other)
