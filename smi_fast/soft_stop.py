"""The first Ctrl-C ends a job after the batch at work, the second at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

_SENTENCE = b"\nstopping after this batch; Ctrl-C again ends it at once\n"


class SoftStop:
    """Takes the first Ctrl-C while its block runs, in the main thread.

    A program that has its own handler of the signal, or ignores it, keeps that.

    Attributes:
        wanted: whether Ctrl-C has come.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._installed = False

    def __enter__(self) -> SoftStop:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._stop)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not sys.stderr: the signal may have come amid a write to it.
        os.write(2, _SENTENCE)
