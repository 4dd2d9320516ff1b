"""What the tests read of a run folder."""

import csv
from pathlib import Path

import jax
import numpy as np
from flax import serialization


def rows_of(workdir):
    """metrics.csv as text, without the column of wall times."""
    with (Path(workdir) / "metrics.csv").open() as file:
        return [
            {name: cell for name, cell in row.items() if name != "wall_s"}
            for row in csv.DictReader(file)
        ]


def steps_of(workdir):
    """The steps of the checkpoints, ascending."""
    return sorted(int(path.stem) for path in Path(workdir, "checkpoints").glob("*.msgpack"))


def final_state(workdir):
    """The step and the arrays of the last checkpoint."""
    step = steps_of(workdir)[-1]
    raw = (Path(workdir) / "checkpoints" / f"{step}.msgpack").read_bytes()
    return step, jax.tree.leaves(serialization.msgpack_restore(raw[32:])["state"])


def assert_same_run(first, second):
    assert rows_of(first) == rows_of(second)
    (step, leaves), (other_step, other_leaves) = final_state(first), final_state(second)
    assert step == other_step
    for leaf, other in zip(leaves, other_leaves, strict=True):
        np.testing.assert_array_equal(leaf, other)
