"""The manifest of a checkpoint: what its arrays are, and a SHA-256 of every file and of itself."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from dartax.experiments.files import write_whole

PyTree = Any

FILE = "manifest.json"


class DamagedError(Exception):
    """A checkpoint whose content is not what was saved."""


def write(folder: Path, version: int, tree: PyTree) -> None:
    """Writes the manifest of the files below ``folder``, which hold ``tree``."""
    content = {"version": version, "arrays": kinds(tree), "files": digests(folder)}
    manifest = {"sha256": _digest(content), **content}
    write_whole(folder / FILE, json.dumps(manifest, indent=1) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``.

    Raises:
      DamagedError: If it is not as it was written.
    """
    raw = (folder / FILE).read_bytes()
    try:
        content = json.loads(raw)
        if content.pop("sha256") == _digest(content):
            return content
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise DamagedError from error
    raise DamagedError


def kinds(tree: PyTree) -> dict[str, str]:
    """The dtype and shape of every array, by name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below ``folder`` but the manifest, by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.parent != folder:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
