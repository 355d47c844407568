"""Timing on a machine whose speed varies: contenders alternate, and the result has quartiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def alternate(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Calls each contender once per round; returns what it returned in each round."""
    returned: dict[str, list[T]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            returned[name].append(contender())
    return returned


def clocked(function: Callable[[], object]) -> Callable[[], float]:
    """Turn a function into a contender that returns the seconds of a call."""

    def seconds() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The ratio in each round: speed that varies from round to round cancels."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(samples: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Median and quartiles, rounded to ``digits`` significant digits."""
    low, high = np.quantile(samples, (0.25, 0.75))
    return {
        "median": rounded(median(samples), digits),
        "quartiles": [rounded(low, digits), rounded(high, digits)],
    }


def rounded(value: float, digits: int = 4) -> float:
    """The value, rounded to ``digits`` significant digits."""
    return float(f"{value:.{digits}g}")
