"""Files that are whole or absent, whenever a process is killed or a disk is full."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes ``content`` beside ``path``, and moves it there once it is on the disk."""
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk needs the room
        raise
    partial.replace(path)
