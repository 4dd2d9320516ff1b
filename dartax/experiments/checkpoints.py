"""Checkpoints of a run: Orbax writes them, a manifest finishes them and is checked on return."""

import contextlib
import errno
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dartax._state import VERSION
from dartax.experiments import manifest
from dartax.experiments.config import ConfigError
from dartax.experiments.devices import is_first_process

PyTree = Any

KEPT = 2
PREFIX = "step_"
# Errors of the system that are of files; others are of a process that was lost.
OF_FILES = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
)


class Checkpoints:
    """Folders ``step_N``: ``arrays``, which Orbax writes, and then ``manifest.json``.

    A folder without a manifest was never finished. Nothing that was is ever deleted but by a newer
    checkpoint: a damaged one is set aside, and one of another run is refused.
    """

    def __init__(self, folder: Path):
        """Opens ``folder``, making it where it is missing.

        Raises:
          ConfigError: If its checkpoints were saved by an earlier dartax.
        """
        self._folder = folder
        folder.mkdir(exist_ok=True)
        if any(path.stem.isdecimal() for path in folder.iterdir()):
            raise self._refused("those of an earlier dartax")
        if is_first_process():  # which alone changes what is there
            for path in folder.glob(f"{PREFIX}*"):
                if not (path / manifest.FILE).exists() and path.suffix != ".damaged":
                    shutil.rmtree(path)

    def _path(self, step: int) -> Path:
        return self._folder / f"{PREFIX}{step}"

    def _steps(self) -> list[int]:
        names = [path.name.removeprefix(PREFIX) for path in self._folder.glob(f"{PREFIX}*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, tree: PyTree) -> None:
        """Saves ``tree`` as of ``step``, by all processes, and deletes all but the newest ones.

        Raises:
          OSError: If it cannot be written; nothing of it stays.
        """
        path = self._path(step)
        try:
            with _orbax() as checkpointer:
                checkpointer.save((path / "arrays").absolute(), args=ocp.args.StandardSave(tree))
            if not is_first_process():
                return
            manifest.write(path, VERSION, tree)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)  # a full disk needs the room
            raise
        for old in self._steps()[:-KEPT]:
            (self._path(old) / manifest.FILE).unlink()  # what a kill leaves is not damaged
            shutil.rmtree(self._path(old))

    def newest(self, template: PyTree) -> int:
        """The newest step whose checkpoint is not damaged; 0 without any. For one process.

        Args:
          template: The tree that was saved, or the shapes and dtypes of its arrays.

        Raises:
          ConfigError: If it is of another model, another optimizer or another version of dartax.
          OSError: If it cannot be read, which says nothing about its content.
        """
        for step in reversed(self._steps()):
            try:
                self._check(step, template)
                return step
            except manifest.DamagedError:
                aside = self._path(step)
                while aside.exists():
                    aside = aside.with_name(f"{aside.name}.damaged")
                self._path(step).replace(aside)
                print(
                    f"dartax: checkpoint {step} is damaged and was renamed to {aside}; going back "
                    "to the one before it, or to the beginning.",
                    file=sys.stderr,
                )
        return 0

    def _check(self, step: int, template: PyTree) -> None:
        path = self._path(step)
        content = manifest.read(path)
        if content["version"] != VERSION:
            raise self._refused(f"version {content['version']}")
        if manifest.digests(path) != content["files"]:
            raise manifest.DamagedError
        here, there = manifest.kinds(template), content["arrays"]
        for name in sorted(here | there):
            if here.get(name) != there.get(name):
                raise ConfigError(
                    "workdir must hold checkpoints of this model and optimizer, got "
                    f"{str(path)!r} of another ({name} is {there.get(name, 'missing')} there, "
                    f"{here.get(name, 'missing')} here); put back the one that belongs there, or "
                    "start again with another --workdir."
                )

    def restore(self, step: int, template: PyTree) -> PyTree:
        """The checkpoint of ``step``, which ``newest`` has checked, by all processes.

        Args:
          step: The step.
          template: Shapes, dtypes and shardings of the arrays.
        """
        path = self._path(step)
        try:
            with _orbax() as checkpointer:
                return checkpointer.restore(
                    (path / "arrays").absolute(), args=ocp.args.StandardRestore(template)
                )
        except (OSError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax raises whatever its reader met
            raise ConfigError(
                f"workdir must hold checkpoints that Orbax {ocp.__version__} reads, got "
                f"{str(path)!r}, as it was saved ({type(error).__name__}); install the Orbax that "
                "saved it, or start again with another --workdir."
            ) from error

    def _refused(self, found: str) -> ConfigError:
        return ConfigError(
            f"workdir must hold checkpoints of state version {VERSION}, got {found} in "
            f"{str(self._folder)!r}; end that run with the dartax that began it, or start again "
            "with another --workdir."
        )


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """What saves and restores; an error of the system is an ``OSError``, however it is worded.

    What the threads of Orbax print of an error, a traceback each, goes nowhere.
    """
    with (
        contextlib.redirect_stderr(io.StringIO()),
        ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer,
    ):
        try:
            yield checkpointer
        except OSError:
            time.sleep(1.0)  # the threads may still have a word to say
            raise
        except ValueError as error:  # TensorStore's, with the words of the system in it
            time.sleep(1.0)
            for code in OF_FILES:
                if os.strerror(code) in str(error):
                    raise OSError(code, os.strerror(code)) from error
            raise
