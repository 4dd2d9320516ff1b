"""Several real processes of one run, joined by jax.distributed on this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from run_folders import assert_same_run, final_state, steps_of

from dartax.experiments import cli, devices
from dartax.experiments import config as config_lib
from dartax.experiments.config import Config, ModelConfig
from dartax.experiments.run_folder import held, read_metrics
from dartax.experiments.train import train_and_evaluate

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="two processes need a GPU each, and there may be one"
)

# An epoch has three checkpoints, which take longer than all else: enough of them to be interrupted.
EPOCHS = 8


def config(workdir, epochs):
    return Config(
        epochs=epochs, workdir=workdir, checkpoint_seconds=0.0, model=ModelConfig(hidden=(16,))
    )


@contextlib.contextmanager
def two_processes(workdir, epochs):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    config_lib.save(config(workdir, epochs), Path("two.toml"))
    command = [sys.executable, "-m", "dartax.experiments.cli", "train", "two.toml"]
    command += ["--coordinator", f"localhost:{port}", "--processes", "2", "--process-id"]
    # One device each, in place of the eight of the tests: of a flag that comes twice, the last counts.
    one = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    environment = {**os.environ, "XLA_FLAGS": one}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, str(number)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for number in range(2)
        ]
        for process in processes:
            stack.callback(process.kill)
        yield processes


def run_to_the_end(workdir, epochs):
    with two_processes(workdir, epochs) as processes:
        outputs = [process.communicate(timeout=300) for process in processes]
        for process, (_, errors) in zip(processes, outputs, strict=True):
            assert process.returncode == 0, errors
    return [output for output, _ in outputs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an unbroken run of two processes, and what each of them printed."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        return folder / "run", run_to_the_end("run", 3)


def test_two_processes_end_where_one_ends(whole):
    workdir, (first, second) = whole
    assert "Test loss" in first
    assert "Test loss" not in second
    summary = train_and_evaluate(config("runs/one", 3), progress=False)
    assert summary["processes"] == 1
    (step, leaves), (other_step, other_leaves) = final_state(workdir), final_state("runs/one")
    assert step == other_step
    for leaf, other in zip(leaves, other_leaves, strict=True):
        # The memory of past steps, in bfloat16, sums up roundings of terms as large as its largest
        # elements, by a spacing of which it may be off.
        half = leaf.dtype.itemsize < 4
        leaf, other = (np.asarray(array, np.float64) for array in (leaf, other))
        atol = 2**-8 * np.max(np.abs(other), initial=0.0) if half else 1e-4
        np.testing.assert_allclose(leaf, other, rtol=1e-2 if half else 1e-3, atol=atol)


def wait_for_a_checkpoint(workdir, process, after=()):
    deadline = time.monotonic() + 200
    while steps_of(workdir) in ([], after):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_two_processes_survive_the_loss_of_one_and_stop_together():
    run_to_the_end("runs/whole", EPOCHS)
    with two_processes("runs/killed", EPOCHS) as (survivor, victim):
        wait_for_a_checkpoint("runs/killed", survivor)
        victim.send_signal(signal.SIGKILL)
        _, message = survivor.communicate(timeout=200)
    assert survivor.returncode == 1
    assert "dartax: process 0 of 2 cannot go on without the others" in message
    assert "the same commands resume the run." in message
    assert "Traceback" not in message
    assert read_metrics(Path("runs/killed/metrics.csv"))[-1]["epoch"] < EPOCHS

    before = steps_of("runs/killed")
    with two_processes("runs/killed", EPOCHS) as processes:
        wait_for_a_checkpoint("runs/killed", processes[0], after=before)
        processes[1].send_signal(signal.SIGTERM)
        for process in processes:
            _, message = process.communicate(timeout=200)
            assert process.returncode == 143, message
            assert "dartax: stopped; the same command resumes the run: dartax train" in message
            assert "Traceback" not in message
    assert before < steps_of("runs/killed")
    assert read_metrics(Path("runs/killed/metrics.csv"))[-1]["epoch"] < EPOCHS

    run_to_the_end("runs/killed", EPOCHS)
    assert_same_run("runs/killed", "runs/whole")


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_a_process_lost_while_a_checkpoint_is_saved(kind, monkeypatch, capsys):
    """JAX words it as either, by where it happens."""

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="1"), devices.exit_if_left_alone():
        raise kind("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    assert "process 0 of 2 cannot go on without the others" in capsys.readouterr().err
    with pytest.raises(ValueError, match="another"), devices.exit_if_left_alone():
        raise ValueError("another")


@pytest.mark.slow
def test_two_processes_are_refused_together():
    Path("runs/held").mkdir(parents=True)
    with held(Path("runs/held")), two_processes("runs/held", 1) as processes:
        messages = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "dartax: workdir must belong to one run at a time, got 'runs/held'" in messages[0]
    assert (
        "dartax: a run must begin in all of its processes, got an error in another one of the 2; "
        "see its message." in messages[1]
    )


@pytest.mark.parametrize(
    "arguments", [["--distributed"], ["--coordinator", "localhost:1", "--processes", "2"]]
)
def test_processes_that_cannot_be_joined(arguments, capsys):
    config_lib.save(config("runs/a", 1), Path("a.toml"))
    # JAX is running here already, as it is in nobody's first call.
    assert cli.main(["train", "a.toml", *arguments]) == 2
    assert (
        "--distributed must find a cluster, or be given --coordinator HOST:PORT"
        in capsys.readouterr().err
    )
    assert not Path("runs/a").exists()
