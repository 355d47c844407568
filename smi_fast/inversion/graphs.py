"""The CUDA graphs of an inverter, kept from batch to batch.

A graph reads and writes fixed memory. So while a phase is replayed the state of the batch lives in
memory that the inverter owns: it is copied there before the phase, and away from there after it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from smi_fast.engine.weights import WeightCopy
from smi_fast.inversion.cuda_graph import CapturedCall, GraphMemory
from smi_fast.inversion.settings import Settings
from smi_fast.inversion.state import InversionState
from smi_fast.objectives import CrossEntropy, L2Norm, TotalVariation

# Iterations from which on a capture pays, which takes as long as several of them.
WORTH = 20
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
    """The graphs of one phase, one for each set of objectives that are due.

    They read the weights that an engine folded, and hold them, whatever the engine does meanwhile.

    Args:
        state: whose tensors stay where they are.
        memory: of the graphs.
    """

    def __init__(self, state: InversionState, memory: GraphMemory) -> None:
        self._state, self._memory = state, memory
        self._calls: dict[tuple[bool, ...], CapturedCall] = {}
        self._held: dict[tuple[bool, ...], tuple[object, ...]] = {}
        self._taken: Counter[tuple[bool, ...]] = Counter()

    def step(self, number: int, left: int) -> None:
        """Take an iteration, by a graph where one is worth it.

        Args:
            number: of the iteration.
            left: iterations until the end of the phase, with this one.
        """
        state, due = self._state, self._state.settings.due(number)
        if due not in self._calls and self._taken[due] + left < WORTH:
            self._taken[due] += 1
            state.step(number=number)
            return
        if due not in self._calls:
            step = partial(state.step, number=number)
            device = state.settings.teacher.device
            self._calls[due] = CapturedCall(step, device, state.generator, self._memory)
        call = self._calls[due]
        replayed = call.captured
        call()
        if not replayed:
            self._held[due] = state.settings.teacher.derived()


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
