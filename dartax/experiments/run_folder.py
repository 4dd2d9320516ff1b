"""What a run leaves behind, apart from its checkpoints, and who may write it.

The state of a run is its checkpoint: all else is written before it, or made from what is there.
config.toml comes first, whole. A row of metrics.csv is on the disk before the checkpoint of its
step is, and rows beyond the checkpoint are dropped by whoever resumes. Pictures, rates.txt and at
last summary.json are made from both, again where they are missing.
"""

import contextlib
import csv
import fcntl
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dartax._history import read_rows
from dartax.experiments.config import ConfigError
from dartax.experiments.files import write_whole

# What summary.json must say of the end of the run.
SUMMARY_FIGURES = ("test_loss", "test_accuracy", "train_loss", "steps", "epochs", "wall_s")


def make_folder(workdir: Path) -> None:
    """Makes ``workdir`` where it is missing.

    Raises:
      ConfigError: If it cannot be made.
    """
    with _asked_to_be_writable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _asked_to_be_writable(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"workdir must be a writable folder, got {str(workdir)!r} ({error.strerror}); "
            "pass another --workdir."
        ) from error


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Holds ``workdir`` against a second run; the system lets go of it with the process.

    Raises:
      ConfigError: If another process holds it.
    """
    with _asked_to_be_writable(workdir):
        file = (workdir / "lock").open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"workdir must be of one run at a time, got {str(workdir)!r}, which another "
                "dartax train holds; wait for it, stop it, or pass another --workdir."
            ) from error
        yield


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as JSON."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """The summary of a finished run; ``None`` where it is missing, or damaged, with a sentence."""
    try:
        summary = json.loads((workdir / "summary.json").read_text())
        figures = [summary[name] for name in SUMMARY_FIGURES]
    except FileNotFoundError:
        return None
    except (KeyError, RecursionError, TypeError, ValueError):
        figures = [None]
    if all(isinstance(figure, int | float) for figure in figures):
        return summary
    print(
        f"dartax: {workdir / 'summary.json'} is damaged; writing it again from the checkpoint.",
        file=sys.stderr,
    )
    return None


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The rows of ``metrics.csv``; an empty cell is ``None``, a row cut short ends the file."""
    try:
        return read_rows(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _step(line: str) -> float:
    """The step of a row; infinite where the row has none."""
    cell = line.split(",", 1)[0]
    return int(cell) if cell.isdecimal() else math.inf


class MetricsFile:
    """``metrics.csv``: a header, then a row per logging interval, flushed as it is written."""

    def __init__(self, path: Path | None, columns: Sequence[str], last_step: int):
        """Opens ``path``, keeping the rows up to ``last_step`` of an earlier part of the run.

        Without a path the rows go nowhere: of several processes only one writes.

        Raises:
          ConfigError: If the rows are of something else, or do not reach ``last_step``.
        """
        self._file = None
        if path is None:
            return
        text = path.read_text(errors="replace") if path.exists() else ""
        header, *lines = text.splitlines(keepends=True) or [""]
        kept = [line for line in lines if line.endswith("\n") and _step(line) <= last_step]
        expected = ",".join(columns) + "\n"
        if header not in ("", expected):
            raise ConfigError(
                f"{path} must begin with the columns {expected[:40]}..., got {header[:40]!r}; end "
                "that run with the dartax that began it, or start again with another --workdir."
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
        """Appends a row; columns that it does not name stay empty."""
        if self._file is not None:
            self._writer.writerow(row)
            self._file.flush()

    def sync(self) -> None:
        """Waits until the rows are on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def git_commit() -> str | None:
    """The commit that dartax was imported from, with -dirty after local changes.

    ``None`` for an installed copy, also where it lies inside the repository of something else.
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
    """Versions of the packages that decide a result; ``None`` for a checkout that is not installed.

    Such a one can be imported, from the path, and is told apart by :func:`git_commit`.
    """

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("dartax", "jax", "jaxlib", "optax", "flax", "numpy")
    return {name: version(name) for name in packages}
