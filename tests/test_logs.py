"""What was logged is read back with the readers of TensorBoard and of Weights & Biases."""

import dataclasses
import importlib.util
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from dartax.experiments import cli, logs
from dartax.experiments import config as config_lib
from dartax.experiments.config import Config, ConfigError, ModelConfig
from dartax.experiments.run_folder import read_metrics
from dartax.experiments.train import train_and_evaluate

CONFIG = Config(
    epochs=2, log_steps=11, mesh=(1,), workdir="runs/a", model=ModelConfig(hidden=(16,))
)


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    return scalars, events.Histograms("rates/log10")


def log_rows(config, rows, columns, last_step):
    """Logs rows as a run does that goes on from the checkpoint of a step."""
    opened = logs.open_logs(config, Path(config.workdir), columns, last_step)
    for log in opened:
        for row in rows:
            log.write({name: value for name, value in row.items() if value is not None})
        log.close()


def interrupted(config, step):
    """What a kill leaves that comes after a row was written and before the next checkpoint."""
    columns = list(read_metrics(Path(config.workdir, "metrics.csv"))[0])
    row = {"step": step + 11, "train_loss": 7.0, "rate/Dense_0/bias": 0.5}
    log_rows(config, [row], columns, step)


def test_tensorboard_holds_every_row_once_after_a_kill():
    config = dataclasses.replace(CONFIG, log="tensorboard")
    train_and_evaluate(config, progress=False)
    rows = read_metrics(Path("runs/a/metrics.csv"))
    assert [row["step"] for row in rows] == [11, 22, 33, 44]

    interrupted(config, 22)
    assert read_tensorboard("runs/a/tensorboard")[0]["train_loss"][-1] == (33, 7.0)
    log_rows(config, rows[2:], list(rows[0]), last_step=22)

    scalars, histograms = read_tensorboard("runs/a/tensorboard")
    assert set(scalars) == set(rows[0]) - {"step"}
    for name, events in scalars.items():
        expected = [(row["step"], row[name]) for row in rows if row[name] is not None]
        np.testing.assert_allclose(events, expected, rtol=1e-6)
    assert [histogram.step for histogram in histograms] == [11, 22, 33, 44]
    last = histograms[-1].histogram_value
    rates = [value for name, value in rows[-1].items() if name.startswith("rate/")]
    assert last.num == len(rates) == 4
    np.testing.assert_allclose([last.min, last.max], np.log10([min(rates), max(rates)]), rtol=1e-6)


class FakeRun:
    def __init__(self, **arguments):
        self.arguments, self.rows, self.finished = arguments, [], False

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    """The calls that wandb gets, without its service."""
    runs = []

    def init(**arguments):
        runs.append(FakeRun(**arguments))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    module.init, module.Error = init, RuntimeError
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_wandb_gets_every_row_once_after_a_kill(fake_wandb):
    config = dataclasses.replace(CONFIG, log="wandb")
    train_and_evaluate(config, progress=False)
    rows = read_metrics(Path("runs/a/metrics.csv"))
    Path("runs/a/summary.json").unlink()
    # The kill took the last checkpoint with it: the run goes on from the step before, 22.
    log_rows(config, [*rows[2:], {**rows[-1], "step": 55}], list(rows[0]), last_step=22)

    first, second = fake_wandb
    assert first.arguments["id"] == second.arguments["id"]
    assert second.arguments["resume"] == "allow"
    assert first.arguments["config"]["optimizer"]["name"] == "dart"
    assert first.finished
    assert second.finished
    assert [step for step, _ in first.rows + second.rows] == [11, 22, 33, 44, 55]
    for (_, logged), row in zip(first.rows, rows, strict=True):
        row = {name: value for name, value in row.items() if value is not None and name != "step"}
        assert logged == pytest.approx(row, rel=1e-6)


def test_wandb_that_does_not_start_gets_a_sentence(fake_wandb, monkeypatch, capsys):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    config_lib.save(dataclasses.replace(CONFIG, log="wandb"), Path("a.toml"))
    assert cli.main(["train", "a.toml"]) == 2
    message = capsys.readouterr().err
    assert "log must be one that can start here, got 'wandb' (api_key not configured" in message
    assert "run wandb login, or set WANDB_MODE=offline." in message


def leveldb_records(content, block=2**15):
    """The records of a log of LevelDB, the format of wandb's files after a header of 7 bytes."""
    position, parts = 7, []
    content = bytes(position) + content
    while position + 7 <= len(content):
        if block - position % block < 7:  # the rest of a block that holds no header is empty
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += 7 + length
        parts.append(content[position - length : position])
        if kind in (1, 4):  # a whole record, or its last part
            yield b"".join(parts)
            parts = []


def test_wandb_offline_files(monkeypatch):
    import wandb
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = dataclasses.replace(CONFIG, log="wandb")
    train_and_evaluate(config, progress=False)
    interrupted(config, 22)  # writes step 33, which is there already
    wandb.teardown()

    logged, ids = [], set()
    for path in sorted(Path("runs/a/wandb").glob("offline-run-*/*.wandb")):
        for content in leveldb_records(path.read_bytes()[7:]):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = {
                    item.key or "/".join(item.nested_key): item.value_json
                    for item in record.history.item
                }
                logged.append((int(items["_step"]), float(items["train_loss"])))
    assert len(ids) == 1
    rows = read_metrics(Path("runs/a/metrics.csv"))[:2]
    assert [step for step, _ in logged] == [11, 22, 33, 44]
    np.testing.assert_allclose(logged[:2], [(r["step"], r["train_loss"]) for r in rows], rtol=1e-6)


@pytest.mark.parametrize(("log", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_names_its_extra(log, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError,
        match=f"log must be one whose package is installed, got '{log}' without {package}; pip install 'dartax\\[{log}\\]'",
    ):
        train_and_evaluate(dataclasses.replace(CONFIG, log=log))
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_run_may_be_resumed_with_another_log():
    whole = train_and_evaluate(CONFIG, progress=False)
    Path("runs/a/summary.json").unlink()
    config = dataclasses.replace(CONFIG, log="tensorboard")
    assert train_and_evaluate(config, progress=False) == whole


def test_an_unknown_log():
    Path("bad.toml").write_text("log = 'tensorbord'")
    with pytest.raises(
        ConfigError, match="log must be one of none, .* got 'tensorbord'; did you mean 'tensorb"
    ):
        config_lib.load("bad.toml")
