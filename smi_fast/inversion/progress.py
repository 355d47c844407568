"""How far an inversion is: a bar in a terminal, a line per stop in a log file."""

from __future__ import annotations

import sys
import time

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
        self._bar = tqdm(
            total=iterations,
            disable=not (shown and self._in_terminal),
            unit="it",
            leave=None,  # below the bar of a pool it goes when the batch is done
            dynamic_ncols=True,
        )

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
