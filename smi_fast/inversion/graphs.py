"""The CUDA graphs of an inverter, kept from batch to batch.

A graph reads and writes fixed memory. So while a phase is replayed the state of the batch lives in
memory that the inverter owns: it is copied there before the phase, and away from there after it.
"""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from smi_fast.engine.weights import WeightCopy
from smi_fast.inversion.cuda_graph import CapturedCall, GraphMemory, NotCapturable
from smi_fast.inversion.settings import Settings
from smi_fast.inversion.state import InversionState
from smi_fast.objectives import CrossEntropy, L2Norm, Objective, TotalVariation

# Iterations from which on a capture pays, which takes as long as several of them.
WORTH = 20
# Iterations of a larger graph, which has one launch for all of them.
STEPS = 10
# Phases whose graphs are kept at once: five of each of three sizes of a batch.
MOST = 15
# Objectives that read nothing but their inputs. Others may hold tensors of their own, which a graph
# would go on reading.
STATELESS = (CrossEntropy, L2Norm, TotalVariation)
# The tensors of a state that an iteration reads or writes.
TENSORS = (
    "targets",
    "parameters",
    "kept",
    "shift",
    "flip",
    "background",
    "frozen",
    "exp_avg",
    "exp_avg_sq",
    "iteration",
    "record",
)


class PhaseGraphs:
    """The graphs of one phase: one for each set of objectives that are due, and where all of them
    always are one of several iterations.

    They read the weights that an engine folded, and hold them, whatever the engine does meanwhile.

    Args:
        state: whose tensors stay where they are.
        memory: of the graphs.
    """

    def __init__(self, state: InversionState, memory: GraphMemory) -> None:
        self._state, self._memory = state, memory
        # By the objectives that are due, and the number of iterations.
        self._calls: dict[tuple[tuple[bool, ...], int], CapturedCall] = {}
        self._held: dict[tuple[tuple[bool, ...], int], tuple[object, ...]] = {}
        self._taken: Counter[tuple[bool, ...]] = Counter()

    def advance(self, number: int, most: int, left: int) -> int:
        """Take one iteration or more, by a graph where one is worth it; return how many.

        Args:
            number: of the next iteration.
            most: iterations that may be taken before the loop does something else.
            left: iterations until the end of the phase.

        Raises:
            NotCapturable: an iteration can't be captured; the message names the objective.
        """
        settings = self._state.settings
        due = settings.due(number)
        always = all(objective.every == 1 for objective in settings.objectives)
        large = always and most >= STEPS and self._taken[due] + left >= STEPS * WORTH
        count = STEPS if large and (due, 1) in self._calls else 1
        self._taken[due] += count
        if self._taken[due] - count + left < WORTH and (due, count) not in self._calls:
            self._state.step(number=number)
        else:
            self._call(due, count, number)
        return count

    def _call(self, due: tuple[bool, ...], count: int, number: int) -> None:
        state, key = self._state, (due, count)

        def iterations() -> None:
            for _ in range(count):
                state.step(number=number)

        if key not in self._calls:
            device = state.settings.teacher.device
            self._calls[key] = CapturedCall(iterations, device, state.generator, self._memory)
        call = self._calls[key]
        replayed = call.captured
        try:
            call()
        except NotCapturable as error:
            name = _objective_in(error.__cause__)
            if name is None:
                raise
            raise NotCapturable(f"the objective {name} failed: {error}") from error.__cause__
        if not replayed:
            self._held[key] = state.settings.teacher.derived()


class Graphs:
    """The graphs of one inverter. They share one stream and one pool of memory.

    Those of a phase serve the next batch of the same size, as long as the teacher's weights are the
    same. They are kept where an iteration reads nothing but the state and the teacher.

    Args:
        settings: of the inverter.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._lock = settings, Lock()
        self._memory = GraphMemory()
        self._phases: dict[Hashable, PhaseGraphs] = {}
        self._tensors: dict[Hashable, Tensor] = {}
        self._weights: WeightCopy | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has no graphs yet."""
        return Graphs, (self._settings,)

    def begin(self) -> None:
        """Before a batch: forget what was captured with other weights."""
        if self._weights is not None and self._weights.changed():
            self._forget()

    @contextmanager
    def of(self, state: InversionState) -> Iterator[PhaseGraphs]:
        """The graphs of the phase that a state is in.

        An inversion inside of another one, by a callback or another thread, has graphs of its own.
        """
        if not self._lock.acquire(blocking=False):
            yield PhaseGraphs(state, GraphMemory())
            return
        try:
            if not self._keeps(state):
                yield PhaseGraphs(state, self._memory)
                return
            try:
                yield self._kept(state)
            finally:
                for name, own in _tensors_of(state):
                    setattr(state, name, own.clone())
        finally:
            self._lock.release()

    def _keeps(self, state: InversionState) -> bool:
        settings = state.settings
        return (
            settings is self._settings
            and settings.augment is None
            and state.lengths is None
            and all(type(objective) in STATELESS for objective in settings.objectives)
        )

    def _kept(self, state: InversionState) -> PhaseGraphs:
        """Move a state into the memory of the graphs, which are new where there are none yet."""
        key = (_surroundings(), *((name, *_kind(own)) for name, own in _tensors_of(state)))
        if key not in self._phases and len(self._phases) >= MOST:
            self._forget()
        for name, own in _tensors_of(state):
            kind = name, *_kind(own)
            if kind not in self._tensors:
                self._tensors[kind] = torch.empty_like(own, memory_format=torch.contiguous_format)
            setattr(state, name, self._tensors[kind].copy_(own))
        if self._weights is None:
            self._weights = WeightCopy(self._settings.teacher.vit)
        if key not in self._phases:
            self._phases[key] = PhaseGraphs(copy.copy(state), self._memory)
        return self._phases[key]

    def _forget(self) -> None:
        self._phases, self._tensors, self._weights = {}, {}, None


def _objective_in(error: BaseException | None) -> str | None:
    """The name of the objective that raised an error, or in which something else did."""
    names = []
    for frame, _ in traceback.walk_tb(None if error is None else error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, Objective):
            names.append(owner.name)
    return names[-1] if names else None


def _tensors_of(state: InversionState) -> Iterator[tuple[str, Tensor]]:
    found = ((name, getattr(state, name)) for name in TENSORS)
    return ((name, own) for name, own in found if own is not None)


def _kind(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _surroundings() -> tuple[Hashable, ...]:
    """The settings of torch that decide which kernels an iteration has."""
    return (
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.backends.cuda.matmul.fp32_precision,
    )
