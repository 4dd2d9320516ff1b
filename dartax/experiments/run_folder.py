"""The files of a run, except its checkpoints, and the lock on its folder.

The checkpoint holds the state of a run. All other files are written before the checkpoint, or can
be made again. A run writes config.toml first. A row of metrics.csv is on the disk before the
checkpoint of its step. A resumed run drops the rows after the checkpoint. At the end, a run makes
the pictures, rates.txt and summary.json, in this order, from metrics.csv and the checkpoint.
"""

import contextlib
import csv
import importlib.metadata
import json
import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock

from dartax._history import read_csv
from dartax._version import __version__
from dartax.experiments.config import ConfigError
from dartax.experiments.files import write_whole

# Numbers that summary.json must hold.
SUMMARY_FIGURES = ("test_loss", "test_accuracy", "train_loss", "steps", "epochs", "wall_s")


def make_folder(workdir: Path) -> None:
    """Makes ``workdir`` if it does not exist.

    Raises:
      ConfigError: If it cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(workdir, error) from error


def _not_writable(workdir: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"workdir must be a writable folder, got {str(workdir)!r} ({error.strerror}); "
        "pass another --workdir."
    )


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Locks ``workdir`` against a second run; the system releases the lock when the process ends.

    Raises:
      ConfigError: If another process holds the lock.
    """
    try:
        lock = filelock.FileLock(workdir / "lock", blocking=False).acquire()
    except filelock.Timeout as error:
        raise ConfigError(
            f"workdir must belong to one run at a time, got {str(workdir)!r}, which another "
            "dartax train is using; wait for it, stop it, or pass another --workdir."
        ) from error
    except OSError as error:
        raise _not_writable(workdir, error) from error
    with lock:
        yield


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as JSON, which has no word for NaN and infinity: they become null."""

    def strict(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: strict(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [strict(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_whole(path, json.dumps(strict(content), indent=2, allow_nan=False) + "\n")


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """Reads ``summary.json``; returns ``None`` if it is missing or damaged."""
    try:
        summary = json.loads((workdir / "summary.json").read_text())
        # (A figure that is not finite is null.)
        complete = all(isinstance(summary[name], int | float | None) for name in SUMMARY_FIGURES)
    except (FileNotFoundError, KeyError, RecursionError, TypeError, ValueError):
        return None
    return summary if complete else None


def is_finished(workdir: Path) -> bool:
    """Whether a finished run is there; no if the folder cannot be looked at, as training tells."""
    try:
        return (workdir / "summary.json").exists()
    except (OSError, ValueError):
        return False


def outcome(summary: dict[str, Any]) -> str:
    """The result of a run in words; figures that are not finite are null in a summary."""
    loss, accuracy = summary["test_loss"], summary["test_accuracy"]
    if loss is None or accuracy is None:
        return "The run diverged: its test loss is not finite"
    return f"Test loss {loss:.4f}, test accuracy {100 * accuracy:.2f} %"


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Reads ``metrics.csv``; returns no rows if it does not exist.

    Raises:
      ConfigError: If a cell is not a number.
    """
    try:
        return read_csv(path) if path.exists() else []
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _step(line: str) -> float:
    """Returns the step of a row of ``metrics.csv``; infinity if the row is damaged."""
    cell = line.split(",", 1)[0]
    return int(cell) if cell.isdecimal() else math.inf


class MetricsFile:
    """Writes ``metrics.csv``: a header, then one row per logging interval."""

    def __init__(self, path: Path, columns: Sequence[str], last_step: int):
        """Opens ``path`` and drops the rows after ``last_step``.

        Raises:
          ConfigError: If the columns differ, or the rows do not reach ``last_step``.
        """
        text = path.read_text(errors="replace") if path.exists() else ""
        header, *lines = text.splitlines(keepends=True) or [""]
        kept = [line for line in lines if line.endswith("\n") and _step(line) <= last_step]
        expected = ",".join(columns) + "\n"
        if header not in ("", expected):
            raise ConfigError(
                f"{path} must begin with the columns {expected[:40]}..., got {header[:40]!r}; "
                "finish that run with the dartax that began it, or start again with another "
                "--workdir."
            )
        reached = _step(kept[-1]) if kept else 0
        if reached != last_step:
            raise ConfigError(
                f"{path} must reach step {last_step}, as the checkpoint does, got rows up to step "
                f"{reached}; put that file back, or start again with another --workdir."
            )
        write_whole(path, expected + "".join(kept))
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row; missing columns stay empty."""
        self._writer.writerow(row)
        self._file.flush()

    def sync(self) -> None:
        """Waits until the rows are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def git_commit() -> str | None:
    """Returns the commit of dartax, followed by -dirty if there are local changes.

    Returns ``None`` for an installed copy, even if it lies inside another repository.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str | None]:
    """Returns the versions of the packages that affect a result, ``None`` if one is missing."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    # What is installed of a checkout may say an older version than its files.
    packages = ("jax", "jaxlib", "optax", "flax", "numpy")
    return {"dartax": __version__, **{name: version(name) for name in packages}}
