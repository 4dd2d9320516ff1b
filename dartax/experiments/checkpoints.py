"""Checkpoints of a run: Orbax writes the arrays, and a manifest verifies them."""

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
# System errors about files. Other errors can mean that another process was lost.
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
    """Checkpoints in folders ``step_N``, each with ``arrays`` and then ``manifest.json``.

    A checkpoint without a manifest is incomplete and is deleted. A complete checkpoint is only
    deleted after newer ones were saved. A damaged checkpoint is renamed. A checkpoint of another
    run is an error.
    """

    def __init__(self, folder: Path):
        """Opens ``folder``, and makes it if it does not exist.

        Raises:
          ConfigError: If its checkpoints were saved by an older version of dartax.
        """
        self._folder = folder
        folder.mkdir(exist_ok=True)
        if any(path.stem.isdecimal() for path in folder.iterdir()):
            raise self._refused("those of an earlier dartax")
        if is_first_process():  # only one process may delete
            for path in folder.glob(f"{PREFIX}*"):
                if not (path / manifest.FILE).exists() and path.suffix != ".damaged":
                    shutil.rmtree(path)

    def _path(self, step: int) -> Path:
        return self._folder / f"{PREFIX}{step}"

    def _steps(self) -> list[int]:
        names = [path.name.removeprefix(PREFIX) for path in self._folder.glob(f"{PREFIX}*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, tree: PyTree) -> None:
        """Saves ``tree`` and deletes old checkpoints. All processes must call it.

        Raises:
          OSError: If the checkpoint cannot be written. Its files are deleted.
        """
        path = self._path(step)
        try:
            with _orbax() as checkpointer:
                checkpointer.save((path / "arrays").absolute(), args=ocp.args.StandardSave(tree))
            if not is_first_process():
                return
            manifest.write(path, VERSION, tree)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)  # the disk may be full
            raise
        for old in self._steps()[:-KEPT]:
            # Without a manifest, a half-deleted checkpoint counts as incomplete, not as damaged.
            (self._path(old) / manifest.FILE).unlink()
            shutil.rmtree(self._path(old))

    def newest(self, template: PyTree) -> int:
        """Returns the newest step with a valid checkpoint, or 0. One process must call it.

        Args:
          template: The tree that was saved, or the shapes and dtypes of its arrays.

        Raises:
          ConfigError: If the model, the optimizer or the version of dartax differs.
          OSError: If a file cannot be read. Its content may still be valid.
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
        """Restores the checkpoint of ``step``. All processes must call it, after :meth:`newest`.

        Args:
          step: The step.
          template: Shapes, dtypes and shardings of the arrays.

        Raises:
          ConfigError: If Orbax cannot read the checkpoint.
        """
        path = self._path(step)
        try:
            with _orbax() as checkpointer:
                return checkpointer.restore(
                    (path / "arrays").absolute(), args=ocp.args.StandardRestore(template)
                )
        except (OSError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax raises errors of many kinds
            raise ConfigError(
                f"workdir must hold checkpoints that Orbax {ocp.__version__} reads, got "
                f"{str(path)!r}, which is undamaged ({type(error).__name__}); install the Orbax "
                "that saved it, or start again with another --workdir."
            ) from error

    def _refused(self, found: str) -> ConfigError:
        return ConfigError(
            f"workdir must hold checkpoints of state version {VERSION}, got {found} in "
            f"{str(self._folder)!r}; finish that run with the dartax that began it, or start "
            "again with another --workdir."
        )


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """Opens a checkpointer that raises ``OSError`` for every system error about files.

    Threads of Orbax print a traceback of each error. It is discarded.
    """
    with (
        contextlib.redirect_stderr(io.StringIO()),
        ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer,
    ):
        try:
            yield checkpointer
        except OSError:
            time.sleep(1.0)  # wait for the threads to print
            raise
        except ValueError as error:  # TensorStore includes the text of a system error
            time.sleep(1.0)
            for code in OF_FILES:
                if os.strerror(code) in str(error):
                    raise OSError(code, os.strerror(code)) from error
            raise
