"""Handling of Ctrl-C and SIGTERM, which stop a run."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _in_main_thread() -> bool:
    """Tells whether this thread may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise ``KeyboardInterrupt(SIGTERM)``."""

    def interrupt(signum, _):
        raise KeyboardInterrupt(signum)

    if not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class HeldSignals:
    """Records Ctrl-C and SIGTERM, so that the run can save a checkpoint before it stops.

    A second signal ends the process immediately, even while it waits.

    Attributes:
      signum: Number of the received signal, or 0.
    """

    signum = 0

    def __enter__(self):
        self._before = {}
        if _in_main_thread():
            self._before = {signum: signal.signal(signum, self._hold) for signum in SIGNALS}
        return self

    def __exit__(self, *_):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _hold(self, signum, _):
        self.signum = signum
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
