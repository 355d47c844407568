"""How far an inversion is: a bar in a terminal, a line per stop in a log file."""

from __future__ import annotations

import sys
import time
from typing import NoReturn

from tqdm import tqdm

from smi_fast.inversion.state import InversionState


class Progress:
    """Shows the progress of one batch on stderr.

    Args:
        iterations: T of the run.
        shown: whether to show anything.
    """

    def __init__(self, iterations: int, shown: bool) -> None:
        self._iterations, self._shown = iterations, shown
        self._in_terminal = sys.stderr.isatty()
        self._start = time.perf_counter()
        self._bar = _bar(iterations, "it", shown and self._in_terminal)

    def show(self, state: InversionState, number: int) -> None:
        """Move the bar behind iteration ``number``."""
        if not self._bar.disable:
            self._bar.set_postfix_str(self._words(state, number), refresh=False)
        self._bar.update(number + 1 - self._bar.n)

    def end_phase(self, state: InversionState) -> None:
        """Write a line where there is no terminal whose bar could be redrawn."""
        done = state.done()
        if self._shown and not self._in_terminal and done:
            line = f"iteration {done} of {self._iterations}: {self._words(state, done - 1)}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()

    def _words(self, state: InversionState, number: int) -> str:
        objectives = state.settings.objectives
        name, value = objectives[0].name, float(state.record[number, -1 - len(objectives)])
        seconds = (time.perf_counter() - self._start) * self._iterations / (number + 1)
        rate = len(state.kept) / seconds if seconds else 0.0
        return f"{name} {value:.3f}, kept {state.kept.shape[1]}, {rate:.3g} images/s"


class ImagesProgress:
    """Shows on stderr how many images of a batch are finished.

    Args:
        images: B.
        shown: whether to show anything.
    """

    def __init__(self, images: int, shown: bool) -> None:
        self._images, self._done = images, 0
        in_terminal = sys.stderr.isatty()
        self._lines = shown and not in_terminal
        self._start = time.perf_counter()
        self._bar = _bar(images, "images", shown and in_terminal)

    def show(self, finished: int) -> None:
        """Count further images that are finished."""
        self._done += finished
        self._bar.update(finished)

    def close(self) -> None:
        """End the bar; write a line where there is no terminal."""
        self._bar.close()
        if self._lines:
            seconds = time.perf_counter() - self._start
            line = f"finished {self._done} of {self._images} images in {seconds:.1f} s"
            print(line, file=sys.stderr, flush=True)


def _bar(total: int, unit: str, shown: bool) -> tqdm[NoReturn]:
    """A bar that goes when it ends below the bar of a pool, and stays otherwise."""
    return tqdm(total=total, disable=not shown, unit=unit, leave=None, dynamic_ncols=True)
