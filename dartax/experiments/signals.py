"""Ctrl-C and SIGTERM: how a run is told to stop."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _in_main_thread() -> bool:
    """Whether this thread may set handlers: no other one gets signals."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """SIGTERM raises ``KeyboardInterrupt(SIGTERM)``, as Ctrl-C raises one without a number."""

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
    """Ctrl-C and SIGTERM, held back so that the run can save a checkpoint.

    The second one has its plain effect and ends the process at once, whatever it waits for.

    Attributes:
      signum: Number of the signal that came; 0 before one does.
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
