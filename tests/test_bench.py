import json
import re
from pathlib import Path

import pytest

from dartax.experiments import cli
from dartax.experiments.traffic import traffic


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
        (["--compile-for", "none"], "compile-for must be a file that can be read, got 'none' .* pass e.g. configs/bench/h100.txtpb."),
        (["--compile-for", __file__], "compile-for must describe a GPU .* pip install jax-cuda12-plugin==.* or fix the description."),
    ],
)  # fmt: skip
def test_bad_bench(arguments, match, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert re.search(match.replace("?", "[?]"), capsys.readouterr().err)


def test_traffic_of_a_program():
    hlo = """HloModule step

%fused_add (a: f32[3,2]) -> f32[3,2] {
  %a = f32[3,2]{1,0} parameter(0)
  ROOT %b = f32[3,2]{1,0} add(%a, %a)
}

ENTRY %main (x: f32[3,2], k: s4[8], z: bf16[0]) -> (f32[3,2], pred[6]) {
  %x = f32[3,2]{1,0} parameter(0)
  %k = s4[8]{0:E(4)} parameter(1)
  %z = bf16[0]{0} parameter(2)
  %copy = bf16[0]{0} copy(%z)
  %fusion = (f32[3,2]{1,0}, /*index=1*/pred[6]{0}) fusion(%x, /*index=1*/%k), kind=kLoop, calls=%fused_add
  %first = f32[3,2]{1,0} get-tuple-element(%fusion), index=0
  %rest = pred[6]{0} get-tuple-element(%fusion), index=1
  ROOT %all = (f32[3,2]{1,0}, pred[6]{0}) tuple(%first, %rest)
}
"""
    assert traffic(hlo) == (1, 24 + 4 + 24 + 6)


def test_traffic_of_a_slice():
    """A kernel reads no more of an operand than what its slices need."""
    hlo = """HloModule step

%fused (a: f32[8,2], b: f32[8,2]) -> bf16[2,2] {
  %a = f32[8,2]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  %root = f32[8,2]{1,0} sqrt(%b)
  %sum = f32[8,2]{1,0} add(%a, %root)
  %rows = f32[2,2]{1,0} slice(%sum), slice={[0:8:4], [0:2]}
  ROOT %c = bf16[2,2]{1,0} convert(%rows)
}

%fused.1 (a: f32[8,2]) -> f32[8,2] {
  %a = f32[8,2]{1,0} parameter(0)
  %rows = f32[2,2]{1,0} slice(%a), slice={[0:2], [0:2]}
  %first = f32[] reduce(%rows), to_apply=%sum
  %all = f32[8,2]{1,0} broadcast(%first), dimensions={}
  ROOT %b = f32[8,2]{1,0} add(%all, %a)
}

ENTRY %main (x: f32[8,2], y: f32[8,2]) -> (bf16[2,2], f32[8,2]) {
  %x = f32[8,2]{1,0} parameter(0)
  %y = f32[8,2]{1,0} parameter(1)
  %fusion = bf16[2,2]{1,0} fusion(%x, %y), kind=kLoop, calls=%fused
  %fusion.1 = f32[8,2]{1,0} fusion(%y), kind=kLoop, calls=%fused.1
  ROOT %all = (bf16[2,2]{1,0}, f32[8,2]{1,0}) tuple(%fusion, %fusion.1)
}
"""
    assert traffic(hlo) == (2, 8 + 16 + 16 + 64 + 64)


def test_traffic_of_a_gather():
    hlo = """HloModule step

%fused (a: f32[8,2], i: s32[4]) -> f32[4] {
  %a = f32[8,2]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  ROOT %b = f32[4]{0} gather(%a, %i), offset_dims={}, collapsed_slice_dims={0}
}

ENTRY %main (x: f32[8,2], i: s32[4]) -> f32[4] {
  %x = f32[8,2]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  ROOT %fusion = f32[4]{0} fusion(%x, %i), kind=kLoop, calls=%fused
}
"""
    assert traffic(hlo) == (1, 16 + 16 + 16)


def test_traffic_of_values_that_are_used_twice():
    """Sixty times over, there are 2**60 ways from the operand to the slices."""
    values = "\n".join(
        f"  %x{i + 1} = f32[8]{{0}} add(%x{i}, %y{i})\n"
        f"  %y{i + 1} = f32[8]{{0}} multiply(%x{i}, %y{i})"
        for i in range(60)
    )
    hlo = f"""HloModule step

%fused (x0: f32[8], y0: f32[8]) -> f32[2] {{
  %x0 = f32[8]{{0}} parameter(0)
  %y0 = f32[8]{{0}} parameter(1)
{values}
  %slice.1 = f32[2]{{0}} slice(%x60), slice={{[0:2]}}
  %slice.2 = f32[2]{{0}} slice(%y60), slice={{[0:2]}}
  ROOT %sum = f32[2]{{0}} add(%slice.1, %slice.2)
}}

ENTRY %main (x: f32[8], y: f32[8]) -> f32[2] {{
  %x = f32[8]{{0}} parameter(0)
  %y = f32[8]{{0}} parameter(1)
  ROOT %fusion = f32[2]{{0}} fusion(%x, %y), kind=kLoop, calls=%fused
}}
"""
    assert traffic(hlo) == (1, 8 + 32 + 32)
