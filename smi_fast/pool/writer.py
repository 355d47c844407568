"""A thread that writes a batch while the next one is inverted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """Writes batches in a thread, one at a time."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, "smi_fast writer")
        self._last: Future[None] | None = None

    def write(self, job: Callable[[], None]) -> None:
        """Start a job once the one before is done, whose error is raised here."""
        self.wait()
        self._last = self._threads.submit(job)

    def wait(self) -> None:
        """Wait for the last job, and raise its error."""
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An error of the body goes on; that of the last job would hide it.
        self._threads.shutdown()
        if kind is None:
            self.wait()
