"""Files that are complete or absent, even after a kill, and streams that never fail."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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


class Unfailing:
    """A text stream that drops what it cannot write: its reader is gone, or the disk is full.

    A command is run for its files, not for what it prints, so it must not fail on output.
    """

    def __init__(self, stream: Any):
        # There is none if its file descriptor was closed, as by ``2>&-``.
        self._stream = Path(os.devnull).open("w") if stream is None else stream  # noqa: SIM115
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes ``text`` if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes if that is possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            # Python would try again when it ends, and fail.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unfailing_streams() -> Iterator[None]:
    """Makes ``sys.stdout`` and ``sys.stderr`` :class:`Unfailing`."""
    streams: Any = sys.stdout, sys.stderr
    ours: Any = [Unfailing(stream) for stream in streams]
    sys.stdout, sys.stderr = ours
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
        sys.stdout, sys.stderr = streams
