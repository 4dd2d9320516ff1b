"""Atomic writes: a file is complete or absent, even after a kill or on a full disk."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes ``content`` to a temporary file, syncs it, and renames it to ``path``."""
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)  # the disk may be full
        raise
    partial.replace(path)
