"""What ``dartax train`` promises under faults, each row of a table held by a test.

==================================================  ==========================================  ====
fault                                               what happens                                exit
==================================================  ==========================================  ====
``kill -9`` at any moment                           the same command ends bit for bit where an
                                                    unbroken run ends
Ctrl-C, SIGTERM                                     a checkpoint at the next row of
                                                    ``metrics.csv``; the command that resumes   130, 143
a second one of them                                ends the process at once                    130, 143
a full disk, also in the middle of a file           a sentence; resumes once there is room      1
a file that cannot be read, too little memory       a sentence; nothing is touched              1
a damaged checkpoint                                is set aside; the one before it goes on     0
a checkpoint of another model, optimizer, version   a sentence; nothing is touched              2
a damaged ``summary.json``                          is written again                            0
a ``metrics.csv`` with rows missing                 a sentence; nothing is touched              2
two runs on one folder                              the second one is refused                   2
data cut short or altered                           a sentence                                  2
a mistake in the configuration                      a sentence; nothing is touched              2
a pickle in place of any file that is read          is never run; as a damaged file             0, 2
==================================================  ==========================================  ====

"Bit for bit" is ``assert_same_run``: every row of ``metrics.csv``, wall times apart, and every
array of the last checkpoint. Twenty kills in place of one: ``DARTAX_KILLS=20``.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import sklearn.datasets
from run_folders import assert_same_run, saved_tree, steps_of

from dartax.experiments import checkpoints, cli, data, manifest, plots, run_folder, train
from dartax.experiments import config as config_lib
from dartax.experiments.config import Config, ModelConfig, OptimizerConfig
from dartax.experiments.run_folder import read_metrics
from dartax.experiments.signals import HeldSignals
from dartax.experiments.train import train_and_evaluate

# Where TensorStore fails, its threads find the event loop of Orbax closed; nothing can be told them,
# and it may come out during a later test. For those of other files, see pyproject.toml.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# An epoch has 22 steps, with rows, and checkpoints, at 10, 20 and 22 of them.
TINY = Config(
    epochs=3, log_steps=10, checkpoint_seconds=0.0, mesh=(1,), model=ModelConfig(hidden=(8,))
)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """They take longer than all else; test_experiments.py looks at them."""
    monkeypatch.setattr(plots, "draw", lambda *_: [])


@pytest.fixture
def dartax(capsys):
    """Runs the command, and returns its status and the sentences that it said."""

    def run(*arguments):
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            status = stopped.code
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert "ERROR:" not in said
        return status, [line for line in said.splitlines() if line.startswith("dartax: ")]

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``whole``, an unbroken run, and ``stopped``, one stopped at step 42, mid-epoch."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda *_: [])
        train_and_evaluate(dataclasses.replace(TINY, workdir=str(folder / "whole")), progress=False)
        stopped = dataclasses.replace(TINY, workdir=str(folder / "stopped"))
        with signal_at_step(42, signal.SIGTERM), pytest.raises(KeyboardInterrupt):
            train_and_evaluate(stopped, progress=False)
    assert steps_of(folder / "stopped") == [32, 42]
    return folder


@pytest.fixture
def stopped(runs, tmp_path):
    """A copy of the stopped run, and the configuration that resumes it."""
    shutil.copytree(runs / "stopped", tmp_path / "a")
    config_lib.save(dataclasses.replace(TINY, workdir="a"), tmp_path / "a.toml")
    return tmp_path / "a"


@contextlib.contextmanager
def at_step(step, act):
    """Acts as the row of ``step`` is about to be written."""
    write = run_folder.MetricsFile.write

    def acting(self, row):
        if row["step"] == step:
            act()
        write(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.MetricsFile, "write", acting)
        yield


def signal_at_step(step, signum):
    return at_step(step, lambda: os.kill(os.getpid(), signum))


def content(folder):
    """Every file below ``folder``; the lock, which is empty, and parts of files do not count."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock" and path.suffix != ".part"
    }


# Kills


def test_a_run_killed_at_random_ends_where_an_unbroken_one_ends(dartax, capsys):
    kills = int(os.environ.get("DARTAX_KILLS", "1"))
    config = dataclasses.replace(TINY, epochs=8 * (1 + kills), workdir="killed")
    config_lib.save(config, Path("killed.toml"))
    command = [sys.executable, "-m", "dartax.experiments.cli", "train", "killed.toml"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(Path("compiled").absolute())}
    moments = random.Random(0)
    metrics = Path("killed/metrics.csv")
    for _ in range(kills):
        before = len(read_metrics(metrics))
        with subprocess.Popen(
            command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment
        ) as process:
            deadline = time.monotonic() + 200
            # It trains again as soon as rows are dropped or added.
            while len(read_metrics(metrics)) in (before, 0):
                assert process.poll() is None, "the run ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(moments.uniform(0.0, 0.2))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        if "DARTAX_KILLS" in os.environ:
            with capsys.disabled():
                step, writing = (
                    int(read_metrics(metrics)[-1]["step"]),
                    len(steps_of("killed")) < len(list(Path("killed/checkpoints").iterdir())),
                )
                print(f"killed after step {step}{', while writing a checkpoint' * writing}")
    assert dartax("train", "killed.toml") == (0, [])
    train_and_evaluate(dataclasses.replace(config, workdir="whole"), progress=False)
    assert_same_run("killed", "whole")


@pytest.mark.slow
def test_a_kill_at_any_step_of_writing_leaves_a_run_that_ends_the_same(monkeypatch, tmp_path):
    """What is on the disk before every change of it is what a kill at that moment leaves."""
    config = dataclasses.replace(
        TINY, epochs=1, optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3)
    )
    left = {}
    opened = Path.open

    def leave():
        found = {}
        for path in Path("run").rglob("*"):
            found[path.relative_to("run")] = None
            if path.is_file():
                with opened(path, "rb") as file:
                    found[path.relative_to("run")] = file.read()
        # What moved while it was read was never on the disk like that.
        if all(path.parent in found for path in found if path.parent != Path()):
            left[str(sorted(found.items()))] = found

    def before(function):
        def called(*arguments, **options):
            with contextlib.suppress(FileNotFoundError):  # Orbax, in its threads, moves them
                leave()
            return function(*arguments, **options)

        return called

    with monkeypatch.context() as patch:
        for owner, names in (
            (Path, ("mkdir", "open", "replace", "unlink")),
            (os, ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")),
            (run_folder.MetricsFile, ("write",)),
        ):
            for name in names:
                patch.setattr(owner, name, before(getattr(owner, name)))
        train_and_evaluate(dataclasses.replace(config, workdir="run"), progress=False)

    assert len(left) > 15
    for number, found in enumerate(left.values()):
        workdir = tmp_path / str(number)
        workdir.mkdir()
        for name, raw in sorted(found.items()):
            if raw is None:
                (workdir / name).mkdir()
            else:
                (workdir / name).write_bytes(raw)
        train_and_evaluate(dataclasses.replace(config, workdir=str(workdir)), progress=False)
        assert_same_run(workdir, "run")
        assert not list(workdir.rglob("*.part"))


# Signals


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_says_how_to_resume(signum, status, dartax, runs):
    config_lib.save(dataclasses.replace(TINY, checkpoint_seconds=1e9), Path("a.toml"))
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with signal_at_step(32, signum):
        assert dartax("train", "a.toml", "--workdir", "a b") == (
            status,
            [
                "dartax: stopped; the same command resumes the run: dartax train a.toml --workdir 'a b'"
            ],
        )
    assert steps_of("a b") == [32]
    assert before == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert dartax("train", "a.toml", "--workdir", "a b") == (0, [])
    assert_same_run("a b", runs / "whole")


def test_a_second_signal_ends_the_process_at_once():
    with HeldSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.signum == signal.SIGINT
        # The system's own action: no Python has to run for it.
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_before_the_first_step_is_a_stop_too(dartax, monkeypatch):
    monkeypatch.setattr(data, "digits", lambda: os.kill(os.getpid(), signal.SIGTERM))
    config_lib.save(TINY, Path("a.toml"))
    assert dartax("train", "a.toml") == (
        143,
        ["dartax: stopped; the same command resumes the run: dartax train a.toml"],
    )


# Disks


@contextlib.contextmanager
def no_file_beyond(size):
    """Writes end, in the middle, at ``size`` bytes of a file, as they do on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Half a compiled program would stay in the cache of the tests.
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


# A row of metrics.csv is cut, or one of the files of a checkpoint: those of the arrays, the metadata.
@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "room",
    [
        pytest.param(20, marks=pytest.mark.slow),
        1000,
        pytest.param(2000, marks=pytest.mark.slow),
        6000,
    ],
)
def test_a_disk_that_is_full_in_the_middle_of_a_file(room, dartax, stopped, runs):
    rows = (stopped / "metrics.csv").stat().st_size
    with no_file_beyond(rows + room) as fill, at_step(44, fill):
        status, said = dartax("train", "a.toml")
    assert status == 1
    assert said == [
        "dartax: the files of a run must be readable and writable, got [Errno 27] File too large; "
        "fix that, and the same command resumes the run: dartax train a.toml"
    ]
    assert not list(stopped.rglob("*.part"))
    assert steps_of(stopped) == [32, 42]
    assert len(list((stopped / "checkpoints").iterdir())) == 2
    row_is_whole = (stopped / "metrics.csv").read_bytes().endswith(b"\n")
    assert row_is_whole == (room > 20)
    # Still full: the same again, and nothing is lost.
    before = content(stopped)
    with no_file_beyond(200) as fill:
        fill()
        assert dartax("train", "a.toml")[0] == 1
    assert content(stopped) == before
    assert dartax("train", "a.toml") == (0, [])
    assert_same_run(stopped, runs / "whole")


def test_a_file_system_that_is_full(dartax, stopped, runs, tmp_path):
    def mount(*options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", *options, "tmpfs", tmp_path / "small"], capture_output=True
        ).returncode

    (tmp_path / "small").mkdir()
    if shutil.which("mount") is None or mount("-o", "size=1m"):
        pytest.skip("a small file system can only be mounted by root")
    try:
        workdir = tmp_path / "small" / "a"
        shutil.copytree(stopped, workdir)
        filler = tmp_path / "small" / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        status, said = dartax("train", "a.toml", "--workdir", workdir)
        assert (status, len(said)) == (1, 1)
        assert "got [Errno 28] No space left on device" in said[0]
        filler.unlink()
        assert dartax("train", "a.toml", "--workdir", workdir) == (0, [])
        assert_same_run(workdir, runs / "whole")
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(
    error, dartax, stopped, monkeypatch
):
    def read(self, step, template):
        raise error

    monkeypatch.setattr(checkpoints.Checkpoints, "restore", read)
    before = content(stopped)
    status, said = dartax("train", "a.toml")
    assert (status, len(said)) == (1, 1)
    assert "must be readable and writable, got" in said[0]
    assert content(stopped) == before


# Damage to the run folder


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


BOMB = pickle.dumps(Bomb())


def one(run, name):
    """The file, also by a pattern: what Orbax writes has names of chance."""
    (path,) = run.glob(name)
    return path


def cut(name):
    return lambda run: os.truncate(one(run, name), one(run, name).stat().st_size * 2 // 3)


def put(name, raw):
    return lambda run: (one(run, name) if "*" in name else run / name).write_bytes(raw)


def append(name, raw):
    return lambda run: put(name, (run / name).read_bytes() + raw)(run)


def flip(name):
    def damage(run):
        raw = bytearray(one(run, name).read_bytes())
        raw[len(raw) // 2] ^= 1
        one(run, name).write_bytes(raw)

    return damage


def remove(name):
    return lambda run: one(run, name).unlink()


def resave(change=lambda tree: tree, version=checkpoints.VERSION):
    """Saves the newest checkpoint again after a change."""

    def damage(run):
        tree = change(saved_tree(run, 42))
        shutil.rmtree(run / "checkpoints/step_42")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "VERSION", version)
            checkpoints.Checkpoints(run / "checkpoints").save(42, tree)

    return damage


def other_width(tree):
    tree["params"]["Dense_0"]["bias"] = np.zeros(9, np.float32)
    return tree


def without_a_layer(tree):
    del tree["params"]["Dense_0"]
    return tree


def sign(run):
    """Makes the manifest of the newest checkpoint anew, as only a forger would."""
    path = run / "checkpoints/step_42"
    kinds = manifest.read(path)["arrays"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "kinds", lambda _: kinds)
        manifest.write(path, checkpoints.VERSION, None)


def both(*damages):
    return lambda run: [damage(run) for damage in damages]


NEWEST, OLDER = "checkpoints/step_42/arrays/d/*", "checkpoints/step_32/arrays/d/*"
MANIFEST = "checkpoints/step_42/manifest.json"
METADATA = "checkpoints/step_42/arrays/_METADATA"
ASIDE = r"checkpoint 42 is damaged and was renamed to .*step_42.damaged; going back to the one before it"
EARLIER = ["workdir must hold checkpoints of state version .* got those of an earlier dartax"]
NOT_REACHED = "metrics.csv must reach step 42, as the checkpoint does, got rows up to step"

# What is done to a stopped run, the status of the command that resumes it, and what it says.
DAMAGES = {
    "nothing": (lambda run: None, 0, []),
    "newest checkpoint cut short": (cut(NEWEST), 0, [ASIDE]),
    "newest checkpoint empty": (put(NEWEST, b""), 0, [ASIDE]),
    "one bit of it changed": (flip(NEWEST), 0, [ASIDE]),
    "one bit of its manifest changed": (flip(MANIFEST), 0, [ASIDE]),
    "its manifest cut short": (cut(MANIFEST), 0, [ASIDE]),
    "its manifest missing, as if it had never been finished": (remove(MANIFEST), 0, []),
    "one of its files missing": (remove(METADATA), 0, [ASIDE]),
    "both cut short": (both(cut(NEWEST), cut(OLDER)), 0, [ASIDE, "checkpoint 32 is damaged"]),
    "only the older one cut short": (cut(OLDER), 0, []),
    "half-written files left behind": (
        both(put(MANIFEST + ".part", b"half"), put("metrics.csv.part", b"half")), 0, []),
    "checkpoint of another width": (
        resave(other_width), 2,
        [r"workdir must hold checkpoints of this model and optimizer, got 'a/checkpoints/step_42' of another \(params/Dense_0/bias is float32\[9\] there, float32\[8\] here\); put back"]),
    "checkpoint of another depth": (
        resave(without_a_layer), 2, [r"of this model and optimizer, got .* of another \(.*Dense_0"]),
    "checkpoint of another version": (
        resave(version=99), 2,
        [r"workdir must hold checkpoints of state version \d+, got version 99 in 'a/checkpoints'; finish that run with the dartax that began it"]),
    "checkpoints of an earlier dartax": (put("checkpoints/66.msgpack", b""), 2, EARLIER),
    "older ones": (lambda run: (run / "checkpoints/66").mkdir(), 2, EARLIER),
    "metrics.csv missing": (lambda run: (run / "metrics.csv").unlink(), 2, [NOT_REACHED + " 0; put that file back"]),
    "metrics.csv cut short": (cut("metrics.csv"), 2, [NOT_REACHED]),
    "metrics.csv of something else": (
        put("metrics.csv", b"day,rain\n1,2\n"), 2, ["metrics.csv must begin with the columns step,epoch,.* got 'day,rain"]),
    "a row without its end": (append("metrics.csv", b"44,2,0.1,0."), 0, []),
    "lines behind the last row": (append("metrics.csv", b"\nnonsense\n\xff\0\n"), 0, []),
    "config.toml cut short": (cut("config.toml"), 2, ["a/config.toml'|with another"]),
    "summary.json cut short": (put("summary.json", b'{"test_loss": 0.1'), 0, ["summary.json is damaged; writing it again"]),
    "summary.json of something else": (put("summary.json", b"[]"), 0, ["summary.json is damaged"]),
    "a pickle as the newest checkpoint": (put(NEWEST, BOMB), 0, [ASIDE]),
    "a pickle as its metadata, with a checksum": (
        both(put(METADATA, BOMB), sign), 2, ["workdir must hold checkpoints that Orbax .* reads, got 'a/checkpoints/step_42'"]),
    "a pickle as its arrays, with a checksum": (
        both(put(NEWEST, BOMB), sign), 2, ["workdir must hold checkpoints that Orbax .* reads, got 'a/checkpoints/step_42'"]),
    "a pickle as its manifest": (put(MANIFEST, BOMB), 0, [ASIDE]),
    "a pickle as summary.json": (put("summary.json", BOMB), 0, ["summary.json is damaged"]),
    "a pickle as metrics.csv": (put("metrics.csv", BOMB), 2, ["metrics.csv must begin with the columns"]),
    "a pickle as config.toml": (put("config.toml", BOMB), 2, ["CONFIG must be valid TOML, got 'a/config.toml'"]),
}  # fmt: skip


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_mended_or_refused(name, dartax, stopped, runs):
    damage, status, sentences = DAMAGES[name]
    damage(stopped)
    before = content(stopped)
    found, said = dartax("train", "a.toml")
    assert (found, len(said)) == (status, len(sentences)), said
    for sentence, expected in zip(said, sentences, strict=True):
        assert re.search(expected, sentence), sentence
    assert not Path("exploded").exists()
    if status == 0:
        assert_same_run(stopped, runs / "whole")
        for aside in stopped.rglob("*.damaged"):
            was = aside.relative_to(stopped).with_suffix("")
            assert {was / name: raw for name, raw in content(aside).items()} == {
                name: raw for name, raw in before.items() if name.is_relative_to(was)
            }
        assert len(list(stopped.rglob("*.damaged"))) == len([s for s in said if "renamed" in s])
    else:
        assert content(stopped) == before


# Two runs at a time


def test_a_second_run_on_a_folder_is_refused(dartax, stopped, runs):
    before = content(stopped)
    with run_folder.held(stopped):
        assert dartax("train", "a.toml") == (
            2,
            [
                "dartax: workdir must belong to one run at a time, got 'a', which another dartax "
                "train is using; wait for it, stop it, or pass another --workdir."
            ],
        )
    assert content(stopped) == before
    # A process that was killed left the file, and no lock.
    assert (stopped / "lock").exists()
    assert dartax("train", "a.toml") == (0, [])


# Data; test_experiments.py and test_tasks.py cut and alter those that are downloaded


@pytest.mark.parametrize("damage", ["altered", "cut"])
def test_damaged_digits(damage, dartax, monkeypatch):
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x[1000, 20] += 1

    def load(**_):
        if damage == "cut":
            raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        return x, y

    monkeypatch.setattr(sklearn.datasets, "load_digits", load)
    config_lib.save(TINY, Path("a.toml"))
    status, said = dartax("train", "a.toml")
    assert status == 2
    assert (
        "digits must be as scikit-learn publishes them, got different content; reinstall" in said[0]
    )


def test_a_pickle_as_data(dartax, monkeypatch, tmp_path):
    monkeypatch.setenv("DARTAX_DATA_DIR", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    for name in data.MNIST_SHA256:
        (tmp_path / "mnist" / name).write_bytes(BOMB)
    config_lib.save(dataclasses.replace(TINY, dataset="mnist"), Path("a.toml"))
    status, said = dartax("train", "a.toml")
    assert (status, len(said)) == (2, 1)
    assert "must be the published MNIST file, got" in said[0]
    np.savez(tmp_path / data.CIFAR_FILE, train_images=np.array([Bomb()]))
    with pytest.raises(data.DataError, match="must be an npz file with uint8 arrays"):
        data.cifar10()
    (tmp_path / data.CIFAR_FILE).write_bytes(BOMB)
    with pytest.raises(data.DataError, match="must be an npz file with uint8 arrays"):
        data.cifar10()
    assert not Path("exploded").exists()


# Mistakes in the configuration


MISTAKES = {
    "epoch = 3": "epoch is not a key of the configuration; did you mean 'epochs'?",
    "[optimizer]\nscedule = 'linear'": "optimizer.scedule is not .* did you mean 'schedule'?",
    "[optimizer]\nname = 'dartt'": "optimizer.name must be one of .* got 'dartt'; did you mean 'dart'?",
    "[optimizer]\nname = []": r"optimizer.name must be one of .* got \[\]",
    "epochs = '3'": "epochs must be of type int, got '3'",
    "epochs = true": "epochs must be of type int, got True",
    "epochs = 1.5": "epochs must be of type int, got 1.5",
    "epochs = 2020-01-01": "epochs must be of type int, got datetime.date",
    "epochs = {}": "epochs must be of type int, got {}",
    "[epochs]": "epochs must be of type int, got {}",
    "epochs = 0": "epochs must be an int of at least 1, got 0",
    "epochs = -1": "epochs must be an int of at least 1, got -1",
    f"epochs = {10**30}": r"epochs must make fewer than 2\*\*31 steps, got 1000000000000000000000000000000 epochs",
    f"epochs = {'9' * 5000}": "CONFIG must be valid TOML, got 'bad.toml'",
    f"batch_size = {10**30}": "batch_size must be at most the 1438 training examples, got 1000",
    "batch_size = 0": "batch_size must be an int of at least 1, got 0",
    "log_steps = -3": "log_steps must be an int of at least 1, got -3",
    "seed = -1": r"seed must be an int in \[0, 2\*\*32\), got -1",
    f"seed = {2**32}": r"seed must be an int in \[0, 2\*\*32\), got 4294967296",
    "workdir = ''": "workdir must be a folder, got ''",
    'workdir = "a\\u0000b"': r"workdir must be a folder, got 'a\\x00b'",
    f"workdir = '{'a' * 300}'": "workdir must be a writable folder, got 'aaa.*File name too long",
    "workdir = 'bad.toml'": r"workdir must be a writable folder, got 'bad.toml' \(File exists\)",
    f"mesh = [{10**30}]": "mesh must have at most the .* devices that JAX finds",
    "mesh = [1, 2, 3]": "mesh must hold one or two numbers of devices",
    "checkpoint_seconds = nan": "checkpoint_seconds must be a non-negative number, got nan",
    "checkpoint_seconds = -1": "checkpoint_seconds must be a non-negative number, got -1.0",
    f"checkpoint_seconds = -{10**400}": "checkpoint_seconds must be a non-negative number, got -inf",
    "model = 3": r"model must be a table, got 3; write \[model\] above it",
    "[model]\nhidden = [0]": r"model.hidden must hold widths from 1 to 100000, got \[0\]",
    f"[model]\nhidden = [{10**30}]": "model.hidden must hold widths from 1 to 100000, got",
    "[model]\nhidden = ['a']": r"model.hidden\[0\] must be of type int, got 'a'",
    "[model]\nhidden = {}": r"model.hidden must be of type tuple\[int, ...\], got {}",
    "[optimizer]\nlearning_rate = nan": "learning_rate must be a non-negative number, got nan",
    "[optimizer]\nlearning_rate = -1": "learning_rate must be a non-negative number, got -1",
    "[optimizer]\nlearning_rate = inf": "learning_rate must be a non-negative number, got inf",
    f"[optimizer]\nlearning_rate = {10**400}": "learning_rate must be a non-negative number, got inf",
    "[optimizer]\nwarmup = 1.0": r"optimizer.warmup must be a part of the run in \[0, 1\), got 1.0",
    "[optimizer]\nkey = -1": r"optimizer.key must be an int in \[0, 2\*\*32\), got -1",
    "[optimizer]\noptions = 3": r"optimizer.options must be of type dict\[str, float\], got 3",
    "[optimizer.options]\ninit_rate = 'x'": "optimizer.options.init_rate must be of type float, got 'x'",
    "[optimizer.options]\ninit_rate = nan": "optimizer.options: init_rate must be a number of at least 1e-12, got nan",
    "[optimizer.options]\nint_rate = 1": "int_rate is not an option of dart; did you mean 'init_rate'?",
    "epochs = = 3": "CONFIG must be valid TOML, got 'bad.toml'",
    "epochs = 3\nepochs = 4": "CONFIG must be valid TOML, got 'bad.toml'",
    "a = " + "[" * 10_000: "CONFIG must be valid TOML, got 'bad.toml'",
    "\xff": "CONFIG must be valid TOML, got 'bad.toml'",
    "--epochs -1": "epochs must be an int of at least 1, got -1",
    "--optimizer.options.int-rate 1": "int_rate is not an option of dart; did you mean 'init_rate'?",
    "--checkpoint-seconds nan": "checkpoint_seconds must be a non-negative number, got nan",
    "--batch-size 5000": "batch_size must be at most the 1438 training examples, got 5000",
}  # fmt: skip
# Those that only tyro can see, and what it names.
PARSING_MISTAKES = {
    "--epoch 3": "--epoch, 3.*--epochs INT",
    "--optimizer.scedule linear": "--optimizer.scedule.*--optimizer.schedule",
    "--optimizer 3": "--optimizer",
    "--epochs many": "--epochs.*'many'",
    "--epochs nan": "--epochs.*'nan'",
    "--epochs": "--epochs",
    "--epochs 3 4": "4",
    "--epochs=": "--epochs.*''",
    "--model.hidden 8 a": "--model.hidden.*'a'",
    "--optimizer.name dartt": "dartt.*--optimizer.name",
    "--optimizer.options.init-rate x": "--optimizer.options.init-rate.*'x'",
    "--optimizer.options init_rate": "--optimizer.options.init[-_]rate",
    "--processes many": "--processes.*many",
    "stray": "stray",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[:40])
def test_mistakes_get_one_sentence(mistake, dartax):
    on_the_command_line = mistake.startswith("--")
    text = "" if on_the_command_line else mistake
    Path("bad.toml").write_bytes(text.encode("latin-1"))
    status, said = dartax("train", "bad.toml", *(mistake.split() if on_the_command_line else []))
    assert (status, len(said)) == (2, 1)
    assert re.search(MISTAKES[mistake], said[0]), said[0][:400]
    assert content(Path()) == {Path("bad.toml"): text.encode("latin-1")}


@pytest.mark.parametrize("mistake", PARSING_MISTAKES)
def test_mistakes_that_tyro_sees_name_the_flag(mistake, capsys):
    Path("a.toml").write_text("")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "a.toml", *mistake.split()])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.search(PARSING_MISTAKES[mistake], said, re.DOTALL), said
    assert "Traceback" not in said
    assert content(Path()) == {Path("a.toml"): b""}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("words", ["train --epochs 1 a.toml", "train a.toml --epochs 1"])
def test_the_file_may_stand_anywhere(words, dartax):
    config_lib.save(dataclasses.replace(TINY, workdir="a"), Path("a.toml"))
    assert dartax(*words.split()) == (0, [])
    assert read_metrics(Path("a/metrics.csv"))[-1]["epoch"] == 1


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_a_backend_of_matplotlib_in_the_environment_does_not_matter(backend):
    code = "import sys; from dartax.experiments import cli; sys.exit(cli.main(['plot', 'nothing']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MPLBACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("dartax: RUN must be a run folder")


class Failing(io.TextIOBase):
    """A stream on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        raise OSError(28, "No space left on device")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("stream", [None, Failing()])
def test_what_cannot_be_printed_ends_no_run(stream, monkeypatch):
    config_lib.save(dataclasses.replace(TINY, epochs=1, workdir="a"), Path("a.toml"))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        assert cli.main(["train", "a.toml"]) == 0
        assert sys.stdout is sys.stderr is stream
    assert (Path("a") / "summary.json").exists()


def test_a_reader_that_has_gone_is_no_error():
    command = f"{sys.executable} -m dartax.experiments.cli train --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("workdir", ["b\udcff", "a\nb"])
def test_a_folder_that_cannot_be_written_as_text_is_refused(workdir, dartax):
    config_lib.save(TINY, Path("a.toml"))
    status, (said,) = dartax("train", "a.toml", "--workdir", workdir)
    assert status == 2
    assert f"workdir must be printable UTF-8, got {workdir!a}" in said
    assert list(Path().iterdir()) == [Path("a.toml")]


def test_a_workdir_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert Config(workdir="~/runs/x").workdir == "/somewhere/runs/x"
    assert Config(workdir="runs/~x").workdir == "runs/~x"


def test_a_diverged_run_is_told_and_its_summary_is_json(capsys):
    options = {"learning_rate": 1e30}
    optimizer = OptimizerConfig(name="adamw", **options)
    config_lib.save(dataclasses.replace(TINY, workdir="a", optimizer=optimizer), Path("a.toml"))
    assert cli.main(["train", "a.toml"]) == 0
    assert "The run diverged: its test loss is not finite" in capsys.readouterr().out

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    summary = json.loads(Path("a/summary.json").read_text(), parse_constant=refuse)
    assert summary["test_loss"] is None
    assert cli.main(["report", "a"]) == 0
    assert "The run diverged" in Path("a/report.html").read_text()
    # A finished run is only told again.
    assert cli.main(["train", "a.toml"]) == 0


@pytest.mark.parametrize("words", [["train"], ["train", "--epochs", "3"], ["train", "--epochs", "3", "a.toml", "b.toml"]])  # fmt: skip
def test_train_needs_a_file(words, dartax):
    config_lib.save(TINY, Path("a.toml"))
    status, said = dartax(*words)
    assert (status, len(said)) == (2, 1)
    assert "train must be followed by CONFIG, a TOML file, got" in said[0]


@pytest.mark.parametrize("words", [["train", "--help"], ["train", "a.toml", "--help"], ["train", "a.toml", "-h"]])  # fmt: skip
def test_help_lists_the_keys(words, capsys):
    config_lib.save(dataclasses.replace(TINY, log_steps=123), Path("a.toml"))
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "--optimizer.learning-rate" in shown
    assert ("(default: 123)" in shown) == ("a.toml" in words)


def test_configurations_that_are_no_files(dartax, tmp_path):
    for name, match in (("missing.toml", "No such file"), (str(tmp_path), "Is a directory")):
        status, said = dartax("train", name)
        assert (status, len(said)) == (2, 1)
        assert f"CONFIG must be a readable TOML file, got '{name}' ({match}" in said[0]


def test_options_on_the_command_line_stand_beside_those_of_the_file(monkeypatch):
    trained = []

    def stop(config):
        trained.append(config)
        raise config_lib.ConfigError("stopped")

    monkeypatch.setattr(train, "train_and_evaluate", stop)

    def parse(config, words):
        config_lib.save(config, Path("a.toml"))
        assert cli.main(["train", "a.toml", *words.split()]) == 2
        return trained.pop()

    for there in ({}, {"init_rate": 1e-4}, {"weight_decay": 0.2}):
        config = dataclasses.replace(TINY, optimizer=OptimizerConfig(options=there))
        for words in ("--optimizer.options.weight-decay 0", "--optimizer.options.weight_decay=0", "--optimizer.options weight-decay 0"):  # fmt: skip
            assert parse(config, words).optimizer.options == {**there, "weight_decay": 0.0}
    words = "--optimizer.options init_rate 1 --optimizer.options.weight-decay 2"
    assert parse(TINY, words).optimizer.options == {"init_rate": 1.0, "weight_decay": 2.0}
    changed = parse(config, "--model.hidden --seed=3 --checkpoint_seconds 1")
    assert (changed.model.hidden, changed.seed, changed.checkpoint_seconds) == ((), 3, 1.0)
    assert changed == dataclasses.replace(
        config, model=ModelConfig(hidden=()), seed=3, checkpoint_seconds=1.0
    )
