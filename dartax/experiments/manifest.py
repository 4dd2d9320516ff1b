"""The manifest of a checkpoint: its arrays, and checksums of its files and of the manifest."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from dartax.experiments.files import write_whole

PyTree = Any

FILE = "manifest.json"


class DamagedError(Exception):
    """The content of a checkpoint differs from what was saved."""


def write(folder: Path, version: int, tree: PyTree) -> None:
    """Writes the manifest of the checkpoint in ``folder``, which holds ``tree``."""
    content = {"version": version, "arrays": kinds(tree), "files": digests(folder)}
    manifest = {"sha256": _digest(content), **content}
    write_whole(folder / FILE, json.dumps(manifest, indent=1) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """Reads the manifest in ``folder``.

    Raises:
      DamagedError: If the manifest was changed.
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
    """Returns the dtype and shape of each array, by name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file in the subfolders of ``folder``, by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.parent != folder:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
