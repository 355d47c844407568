"""Learning rates that change during an inversion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from smi_fast.phases import for_phases


@runtime_checkable
class LearningRate(Protocol):
    """A learning rate as a function of the length of a run and of its stops.

    >>> class Halved:
    ...     def rates(self, iterations, stops):
    ...         return [0.2 / 2 ** sum(t >= stop for stop in stops) for t in range(iterations)]
    ...     def __repr__(self):
    ...         return "Halved()"
    >>> SparseInverter(teacher, lr=Halved(), iterations=20).settings.lr.unique()
    tensor([0.1000, 0.2000], dtype=torch.float64)

    A ``repr`` that says it all, such as a dataclass has, belongs to it: a pool stores the ``repr``,
    and is resumed only with an equal one.
    """

    def rates(self, iterations: int, stops: tuple[int, ...]) -> Sequence[float] | Tensor:
        """The learning rate of each iteration.

        Args:
            iterations: T, from 1.
            stops: iterations of the schedule's stops, ascending.

        Returns:
            T numbers above 0.

        Raises:
            ValueError: there is none for such a run.
        """


@dataclass(frozen=True)
class Cosine:
    """Half a period of a cosine, after a linear warm-up; both once, or in equal cycles.

    In iteration i of a cycle of n, of which w warm up, the learning rate is ``lr * (i + 1) / w``
    while i < w, and then ``final + (lr - final) * (1 + cos(pi * (i - w) / (n - w))) / 2``, as the
    published code of DeepInversion and PSAQ-ViT has it. So the last one is a little above
    ``final``.

    >>> [round(rate, 3) for rate in Cosine(0.2, warm_up=0.5, final=0.1).rates(6, ())]
    [0.067, 0.133, 0.2, 0.2, 0.175, 0.125]

    Args:
        lr: the largest learning rate, above 0.
        warm_up: share of each cycle in which the learning rate rises, in [0, 1).
        final: learning rate that the cosine falls to, in [0, lr].
        restarts: how often the cycle starts again, from 0. Adam's moments stay.

    Raises:
        ValueError: one of them out of range.
    """

    lr: float
    warm_up: float = 0.0
    final: float = 0.0
    restarts: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.lr, Real) and math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"expected lr above 0, got {self.lr!r}")
        if not (isinstance(self.warm_up, Real) and 0 <= self.warm_up < 1):
            raise ValueError(f"expected warm_up, a share, in [0, 1), got {self.warm_up!r}")
        if not (isinstance(self.final, Real) and 0 <= self.final <= self.lr):
            raise ValueError(f"expected final in [0, {self.lr}], got {self.final!r}")
        if not (isinstance(self.restarts, int) and self.restarts >= 0):
            raise ValueError(f"expected restarts as a whole number from 0, got {self.restarts!r}")

    def rates(self, iterations: int, stops: tuple[int, ...]) -> list[float]:
        cycles = self.restarts + 1
        starts = [round(cycle * iterations / cycles) for cycle in range(cycles + 1)]
        return [rate for start, end in pairwise(starts) for rate in self._cycle(end - start)]

    def _cycle(self, length: int) -> list[float]:
        warm_up = round(self.warm_up * length)
        rising = [self.lr * (i + 1) / warm_up for i in range(warm_up)]
        falling = [
            self.final
            + (self.lr - self.final) * (1 + math.cos(math.pi * i / (length - warm_up))) / 2
            for i in range(length - warm_up)
        ]
        return rising + falling


@dataclass(frozen=True)
class PerPhase:
    """A constant learning rate in each phase: before the first stop, after it, and so on.

    >>> PerPhase((0.2, 0.1)).rates(5, stops=(2,))
    [0.2, 0.2, 0.1, 0.1, 0.1]

    Args:
        values: learning rate of each phase, above 0; one more than the schedule has stops.

    Raises:
        ValueError: no numbers above 0.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        values = tuple(self.values) if isinstance(self.values, Sequence) else ()
        fits = all(isinstance(v, Real) and math.isfinite(v) and v > 0 for v in values)
        if not values or not fits:
            raise ValueError(f"expected learning rates above 0, (0.2, 0.1), got {self.values!r}")
        object.__setattr__(self, "values", values)

    def rates(self, iterations: int, stops: tuple[int, ...]) -> list[float]:
        phases = for_phases(self.values, "learning rates", iterations, stops)
        return [value for value, length in phases for _ in range(length)]


Rates = float | LearningRate | Sequence[float] | Tensor


def rate_table(lr: Rates, iterations: int, stops: tuple[int, ...]) -> Tensor:
    """The learning rate of each iteration, float64 [T] on the CPU.

    Args:
        lr: one number for all iterations, a :class:`LearningRate`, or T numbers.
        iterations: T.
        stops: iterations of the schedule's stops, ascending.

    Raises:
        ValueError: another type or length, or a learning rate that isn't finite and above 0.
    """
    if isinstance(lr, Real):
        rate = float(lr)
        if not 0 < rate < math.inf:
            raise ValueError(f"expected lr above 0, got {lr!r}")
        return torch.full((iterations,), rate, dtype=torch.float64)
    values: object = lr
    if isinstance(lr, LearningRate) and not isinstance(lr, type):
        values = lr.rates(iterations, stops)
    try:
        if isinstance(values, Tensor) and values.is_complex():
            raise TypeError
        table = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"expected lr as a number, a LearningRate or {iterations} numbers, got {values!r}"
        ) from None
    if table.shape != (iterations,):
        raise ValueError(
            f"expected a learning rate for each of {iterations} iterations, "
            f"got {list(table.shape)} of them"
        )
    wrong = ~(table.isfinite() & (table > 0))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"expected learning rates above 0, iteration {first} has {table[first].item()}"
        )
    return table
