"""Starts the tests that need eight devices, in processes that have them: here is one."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
FOLDER = "tests/eight_devices/test_devices.py"
PARTS = {
    "meshes": [FOLDER],
    "training runs": [
        "tests/test_experiments.py::test_a_mesh_ends_where_one_device_ends_and_takes_over_its_run",
        "tests/test_experiments.py::test_bad_mesh",
        "tests/test_checkpoints.py::test_a_sharded_checkpoint_restores_into_another_topology",
    ],
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only of a CPU there can be eight")
@pytest.mark.parametrize("part", PARTS)
def test_with_eight_devices(part, pytestconfig):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", pytestconfig.option.markexpr]
    done = subprocess.run(
        [*command, *PARTS[part]],
        cwd=ROOT,
        env={**os.environ, "DARTAX_TEST_DEVICES": "8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{part} failed on eight devices:\n{done.stdout}"
    # One that is skipped there is run nowhere.
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout
