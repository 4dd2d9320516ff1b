import json
import re
from pathlib import Path

import pytest

from dartax.experiments import cli


def test_bench_measures_and_draws(capsys):
    arguments = ["--sizes", "200x2", "1e3x4", "--rounds", "2", "--workdir", "runs/a"]
    names = ["sgd", "paper_dart", "prodigy", "dart_channel"]
    assert cli.main(["bench", *arguments, "--draws", "100", "--optimizers", *names]) == 0
    table = capsys.readouterr().out
    content = json.loads(Path("runs/a/bench.json").read_text())
    assert list(content["sizes"]) == ["200x2", "1000x4"]
    for results in content["sizes"].values():
        assert list(results) == ["adamw", *names]
        assert results["adamw"]["ratio"] == 1.0
        assert all(
            value > 0
            for row in results.values()
            for key, value in row.items()
            if key != "state_bytes"
        )
        # Two moments; the estimate of the distance and the start as well; one direction.
        assert results["adamw"]["state_bytes"] == pytest.approx(8, rel=0.1)
        assert results["prodigy"]["state_bytes"] == pytest.approx(16, rel=0.2)
        assert results["sgd"]["state_bytes"] < results["paper_dart"]["state_bytes"]
    assert table.count("prodigy") == 2
    assert content["draws"]["count"] == 100
    assert content["draws"]["ratio"] == content["draws"]["jax_ms"] / content["draws"]["fast_ms"]
    assert "100 gamma draws with gradient" in table
    assert max(map(len, table.splitlines())) <= 100
    assert Path("runs/a/bench.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--sizes", "1e7"], "sizes must be PARAMETERSxTENSORS, at least 2 tensors and as many parameters, got '1e7'; pass e.g. 1e7x24."),
        (["--sizes", "10x20"], "sizes must be PARAMETERSxTENSORS, .* got '10x20'"),
        (["--sizes", "infx2"], "sizes must be PARAMETERSxTENSORS, .* got 'infx2'"),
        (["--optimizers", "dartt"], "optimizers must be known, got 'dartt'; did you mean 'dart'?"),
        (["--rounds", "0"], "rounds must be at least 1, got 0; pass 10."),
        (["--draws", "-1"], "draws must be at least 0, got -1; pass 1000000."),
        (["--dtype", "int8"], "dtype must be float32, bfloat16 or float16, got 'int8'"),
        (["--workdir", "/dev/null/a"], "workdir must be a writable folder, got '/dev/null/a'"),
    ],
)  # fmt: skip
def test_bad_bench(arguments, match, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert re.search(match.replace("?", "[?]"), capsys.readouterr().err)
