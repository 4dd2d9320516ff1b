"""Checkpoints of a run: one file each, whole or absent, and checked when read."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from dartax._state import VERSION
from dartax.experiments.config import ConfigError
from dartax.experiments.files import write_whole

PyTree = Any

KEPT = 2
SUFFIX = ".msgpack"


class Checkpoints:
    """Files ``STEP.msgpack``: a SHA-256, and behind it what it is of, written by Flax.

    Nothing that is there is ever deleted but by a newer checkpoint: a damaged file is set aside,
    and a file of another run is refused.
    """

    def __init__(self, folder: Path):
        """Opens ``folder``, making it where it is missing.

        Raises:
          ConfigError: If its checkpoints were saved by an earlier dartax, as folders.
        """
        self._folder = folder
        folder.mkdir(exist_ok=True)
        if any(path.name.isdecimal() for path in folder.iterdir()):
            raise self._refused("those of an earlier dartax")
        for partial in folder.glob(f"*{SUFFIX}.part"):  # a kill left it
            partial.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}{SUFFIX}"

    def _steps(self) -> list[int]:
        names = [path.stem for path in self._folder.glob(f"*{SUFFIX}")]
        return sorted(int(name) for name in names if name.isdecimal())

    def _refused(self, found: str) -> ConfigError:
        return ConfigError(
            f"workdir must hold checkpoints of state version {VERSION}, got {found} in "
            f"{str(self._folder)!r}; end that run with the dartax that began it, or start again "
            "with another --workdir."
        )

    def save(self, step: int, tree: PyTree) -> None:
        """Saves ``tree``, of NumPy arrays, as of ``step``, and deletes all but the newest ones."""
        state = serialization.to_state_dict(tree)
        content = serialization.msgpack_serialize({"version": VERSION, "state": state})
        write_whole(self._path(step), hashlib.sha256(content).digest() + content)
        for old in self._steps()[:-KEPT]:
            self._path(old).unlink()

    def restore_latest(self, template: PyTree) -> tuple[int, PyTree]:
        """The newest checkpoint that is not damaged, and its step; (0, ``template``) without any.

        Args:
          template: The tree that was saved, or the shapes and dtypes of its arrays.

        Raises:
          ConfigError: If it is of another model, another optimizer or another version of dartax.
          OSError: If it cannot be read, which says nothing about its content.
        """
        for step in reversed(self._steps()):
            try:
                return step, self.restore(step, template)
            except DamagedError:
                path = self._path(step)
                aside = path.with_suffix(f"{SUFFIX}.damaged")
                path.replace(aside)
                print(
                    f"dartax: checkpoint {step} is damaged and was renamed to {aside}; going back "
                    "to the one before it, or to the beginning.",
                    file=sys.stderr,
                )
        return 0, template

    def restore(self, step: int, template: PyTree) -> PyTree:
        """The checkpoint of ``step``, as NumPy arrays."""
        raw = self._path(step).read_bytes()
        digest, content = raw[:32], raw[32:]
        if hashlib.sha256(content).digest() != digest:
            raise DamagedError
        try:
            saved = serialization.msgpack_restore(content)
            version, state = saved["version"], saved["state"]
        except (KeyError, TypeError, ValueError) as error:  # with a checksum, yet not our own
            raise DamagedError from error
        if version != VERSION:
            raise self._refused(f"version {version}")
        try:
            tree = serialization.from_state_dict(template, state)
        except ValueError as error:  # other names
            raise self._of_another(step, str(error)) from error
        for (path, leaf), array in zip(
            jax.tree_util.tree_leaves_with_path(template), jax.tree.leaves(tree), strict=True
        ):
            if np.shape(array) != leaf.shape or array.dtype != leaf.dtype:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise self._of_another(
                    step,
                    f"{name} is {array.dtype}{list(np.shape(array))} there, "
                    f"{leaf.dtype}{list(leaf.shape)} here",
                )
        return tree

    def _of_another(self, step: int, difference: str) -> ConfigError:
        return ConfigError(
            "workdir must hold checkpoints of this model and optimizer, got "
            f"{str(self._path(step))!r} of another ({difference}); put back the one that belongs "
            "there, or start again with another --workdir."
        )


class DamagedError(Exception):
    """A checkpoint whose content is not what was saved."""
