"""The iterations between two stops: taken one by one, or replayed from CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smi_fast.inversion.graphs import Graphs, PhaseGraphs
from smi_fast.inversion.progress import Progress
from smi_fast.inversion.state import InversionState
from smi_fast.objectives import UserTerm

# With CUDA graphs: check for NaN and update the progress display every this many iterations.
CHECK_EVERY = 50

Callback = Callable[[int, Tensor, Tensor], None]


class NonFinite(Exception):
    """Leaves the loop with the name of the objective that is not finite, or "gradient"."""


class Loop:
    """Runs one inversion, phase by phase.

    Args:
        state: changed.
        stops: iterations of the stops. The iteration before each scores importance.
        progress: shows how far the run is.
        callback: called after each iteration, see :meth:`smi_fast.SparseInverter.invert`.
        graphs: of the inverter; by default none are kept.
    """

    def __init__(
        self,
        state: InversionState,
        stops: frozenset[int],
        progress: Progress,
        callback: Callback | None,
        graphs: Graphs | None = None,
    ) -> None:
        self._state, self._stops = state, stops
        self._graphs = Graphs(state.settings) if graphs is None else graphs
        self._progress, self._callback = progress, callback

    def run(self, iterations: range) -> Tensor | None:
        """Take the iterations of a phase; return the importance that the next stop reads.

        Raises:
            NonFinite: an objective or the gradient is infinite or not a number.
        """
        return self._replayed(iterations) if self._can_capture() else self._one_by_one(iterations)

    def _can_capture(self) -> bool:
        """A plain function as an objective may read a tensor on the host, a class may not."""
        settings = self._state.settings
        plain = any(isinstance(objective, UserTerm) for objective in settings.objectives)
        return settings.graph and settings.teacher.device.type == "cuda" and not plain

    def _one_by_one(self, iterations: range) -> Tensor | None:
        importance = None
        for number in iterations:
            importance = self._checked_step(number)
            self._progress.show(self._state, number)
            self._call_back(number)
        return importance

    def _checked_step(self, number: int) -> Tensor | None:
        state = self._state
        found = state.evaluate(score=number + 1 in self._stops, number=number)
        name = state.non_finite(slice(number, number + 1))
        if name is not None:
            raise NonFinite(name)
        state.update(found.parameters)
        return found.importance

    def _replayed(self, iterations: range) -> Tensor | None:
        """As :meth:`_one_by_one`, with CUDA graphs.

        The iteration before a stop is in no graph, because only it scores importance.
        """
        with self._graphs.of(self._state) as phase:
            return self._replayed_by(phase, iterations)

    def _replayed_by(self, phase: PhaseGraphs, iterations: range) -> Tensor | None:
        state, importance = self._state, None
        scored = iterations.stop - 1 if iterations.stop in self._stops else None
        number = first = iterations.start
        saved = state.save()
        while number < iterations.stop:
            check = min(first + CHECK_EVERY, iterations.stop)
            try:
                if number == scored:
                    importance = state.step(score=True, number=number)
                    number += 1
                else:
                    most = (check if scored is None else min(check, scored)) - number
                    most = most if self._callback is None else 1
                    number += phase.advance(number, most, iterations.stop - number)
                self._call_back(number - 1)
            except KeyboardInterrupt:
                self._settle(first, saved)
                raise
            if number == check:
                repeated = self._settle(first, saved)
                importance = importance if repeated is None else repeated
                self._progress.show(state, number - 1)
                first, saved = number, state.save()
        return importance

    def _settle(self, first: int, saved: list[Tensor]) -> Tensor | None:
        """Check the iterations since ``saved``.

        If one was not finite, restore ``saved`` and repeat them one by one, so that the error can
        name the iteration and the objective.
        """
        end, importance = self._state.done(), None
        if self._state.non_finite(slice(first, end)) is not None:
            self._state.restore(saved)
            for number in range(first, end):
                importance = self._checked_step(number)
        return importance

    def _call_back(self, number: int) -> None:
        if self._callback is not None:
            with torch.no_grad():
                self._callback(number, self._state.images(), self._state.kept)
