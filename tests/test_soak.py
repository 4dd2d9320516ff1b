import json
import re

import numpy as np
import pytest

from dartax.experiments import cli, soak

STEPS = 2000


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    """What the command wrote, and what it printed."""
    workdir = tmp_path_factory.mktemp("soak")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(
            "builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words)))
        )
        assert cli.main(["soak", "--steps", str(STEPS), "--workdir", str(workdir)]) == 0
    return workdir, json.loads((workdir / "soak.json").read_text()), "\n".join(printed)


def test_soak_records_and_draws(soaked):
    workdir, content, table = soaked
    assert content["steps"] == STEPS
    assert list(content["records"]) == list(soak.OPTIMIZERS)
    for record in content["records"].values():
        # What drifts is only seen where it is recorded.
        assert {"loss", "concentration", "moments.hyper_nu", "last_draw.share"} <= set(record)
        assert all(len(values) == soak.POINTS for values in record.values())
        assert record["count"] == list(range(20, STEPS + 1, 20))
    assert table.count("moments.hyper_nu") == len(soak.OPTIMIZERS)
    assert (workdir / "soak.png").stat().st_size > 20_000


@pytest.mark.parametrize("name", soak.OPTIMIZERS)
def test_a_fault_in_every_thousand_steps_leaves_no_number_infinite(name, soaked):
    _, content, _ = soaked
    record = content["records"][name]
    for field, values in record.items():
        assert np.all(np.isfinite(soak.series(values))), field
    assert record["skipped"][-1] == content["faults"] == 2
    # No worse late than early, and nothing that moves in the first half stands still after it.
    assert np.mean(record["loss"][-10:]) < np.mean(record["loss"][:10])
    for field in ("loss", "concentration", "moments.hyper_mu", "moments.hyper_nu"):
        assert len(set(record[field][50:])) > 25, field


@pytest.mark.parametrize("steps", ["0", "150", "-100"])
def test_bad_steps(steps, capsys):
    assert cli.main(["soak", "--steps", steps]) == 2
    match = rf"steps must be a positive multiple of 100, got {steps}; pass \d+00\."
    assert re.search(match, capsys.readouterr().err)
