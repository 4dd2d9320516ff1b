"""What a step is for a GPU: its kernels, and the bytes that they move."""

import json
from pathlib import Path

import pytest

from dartax.experiments import cli

GPU = Path(__file__).parents[2] / "configs/bench/h100.txtpb"
pytest.importorskip("jax_cuda12_plugin", reason="compiling for a GPU needs JAX's plugin for it")


def test_a_gpu_has_one_kernel_for_the_arrays_of_a_leaf(capsys):
    """Moments, memory and parameters move once, with weight decay too; 6 more are the dots."""
    names = ["dart", "dart_weight_decay", "dart_memory_decay_0", "dart_momentum", "dart_optax_adam"]
    arguments = ["--compile-for", str(GPU), "--sizes", "1e6x24", "--workdir", "a"]
    assert cli.main(["bench", *arguments, "--optimizers", *names]) == 0
    assert "NVIDIA H100" in capsys.readouterr().out
    (rows,) = json.loads(Path("a/compiled.json").read_text())["sizes"].values()
    assert {name: round(row["bytes"]) for name, row in rows.items()} == {
        "adamw": 28,
        "dart": 38,
        "dart_weight_decay": 38,
        "dart_memory_decay_0": 38,
        "dart_momentum": 30,
        "dart_optax_adam": 38,
    }
    # One for each of the 12 matrices, as for many a bias; what is summed over all of a shape takes
    # a few.
    assert rows["dart"]["kernels"] <= 51
