import json
import re
from pathlib import Path

import numpy as np
import pytest

from dartax.experiments import cli, soak

SHIPPED = Path(__file__).parents[1] / "configs" / "soak" / "soak.json"


def test_soak_records_and_draws(capsys):
    assert cli.main(["soak", "--steps", "1000", "--workdir", "runs/a"]) == 0
    table = capsys.readouterr().out
    content = json.loads(Path("runs/a/soak.json").read_text())
    assert list(content["records"]) == list(soak.OPTIMIZERS)
    for record in content["records"].values():
        # What drifts is only seen where it is recorded.
        assert {"loss", "concentration", "moments.hyper_nu", "last_draw.share"} <= set(record)
        assert all(len(values) == soak.POINTS for values in record.values())
        assert record["skipped"][-1] == content["faults"] == 1
        assert record["loss"][-1] < record["loss"][0]
        assert record["count"] == list(range(10, 1001, 10))
    assert table.count("moments.hyper_nu") == len(soak.OPTIMIZERS)
    assert Path("runs/a/soak.png").stat().st_size > 20_000


@pytest.mark.parametrize("steps", ["0", "150", "-100"])
def test_bad_steps(steps, capsys):
    assert cli.main(["soak", "--steps", steps]) == 2
    match = rf"steps must be a positive multiple of 100, got {steps}; pass \d+00\."
    assert re.search(match, capsys.readouterr().err)


def test_a_million_steps_ended_well():
    content = json.loads(SHIPPED.read_text())
    assert content["steps"] == 1_000_000
    for record in content["records"].values():
        for values in record.values():
            assert np.all(np.isfinite(soak.series(values)))
        assert record["skipped"][-1] == content["faults"]
        # No worse late than early, and nothing that moves in the first half stands still after it.
        assert np.mean(record["loss"][-10:]) < np.mean(record["loss"][:10])
        for field in ("loss", "concentration", "moments.hyper_mu", "moments.hyper_nu"):
            assert len(set(record[field][50:])) > 25, field
