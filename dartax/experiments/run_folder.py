"""What a run leaves behind: metrics, summary, checkpoints, each whole or absent."""

import csv
import importlib.metadata
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dartax._transform import VERSION
from dartax.experiments.config import ConfigError
from dartax.plot._history import read_rows

PyTree = Any


def write_whole(path: Path, text: str) -> None:
    """Writes ``text`` so that a reader, or a kill, never sees half of it."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def make_folder(workdir: Path) -> None:
    """Makes ``workdir`` where it is missing.

    Raises:
      ConfigError: If it cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"workdir must be a writable folder, got {str(workdir)!r} ({error.strerror}); "
            "pass another --workdir."
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as JSON."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


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

    def __init__(self, path: Path | None, columns: list[str], last_step: int):
        """Opens ``path``, keeping the rows up to ``last_step`` of an earlier part of the run.

        Without a path the rows go nowhere: of several processes only one writes.
        """
        self._file = None
        if path is None:
            return
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines[1:] if line.endswith("\n") and _step(line) <= last_step]
        write_whole(path, ",".join(columns) + "\n" + "".join(kept))
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row; columns that it does not name stay empty."""
        if self._file is not None:
            self._writer.writerow(row)
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class Checkpoints:
    """Orbax checkpoints, named by step; a half-written one is never picked up."""

    def __init__(self, path: Path):
        """Opens the folder ``path``, making it where it is missing.

        Raises:
          ConfigError: If its checkpoints were saved by a dartax with another layout of the state.
        """
        self._manager = ocp.CheckpointManager(
            path.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True),
            metadata={"state_version": VERSION},  # kept from the first time that this is opened
        )
        metadata: Any = self._manager.metadata()
        saved = (metadata.custom_metadata or {}).get("state_version", "none")
        if saved != VERSION and self._manager.all_steps():
            self._manager.close()
            raise ConfigError(
                f"workdir must hold checkpoints of state version {VERSION}, got version {saved} in "
                f"{str(path)!r}; end that run with the dartax that began it, or start again with "
                "another --workdir."
            )

    def save(self, step: int, tree: PyTree) -> None:
        """Saves ``tree`` as of ``step``, writing in the background."""
        self._manager.save(step, args=ocp.args.StandardSave(tree))

    def restore_latest(self, template: PyTree) -> tuple[int, PyTree]:
        """The newest readable checkpoint and its step; (0, ``template``) where there is none."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            except Exception as error:  # any damage: Orbax raises whatever its reader met
                print(
                    f"dartax: checkpoint {step} cannot be read ({type(error).__name__}); "
                    "going back to the one before it.",
                    file=sys.stderr,
                )
                self._manager.delete(step)
        return 0, template

    def close(self) -> None:
        """Waits for the last write."""
        self._manager.wait_until_finished()
        self._manager.close()


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


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    packages = ("dartax", "jax", "jaxlib", "optax", "flax", "numpy")
    return {name: importlib.metadata.version(name) for name in packages}
