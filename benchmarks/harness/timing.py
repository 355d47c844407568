"""Timing on a machine whose speed wanders: contenders take turns, medians and quartiles tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def alternate(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each contender returns in each round; in a round each of them is called once."""
    returned: dict[str, list[T]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            returned[name].append(contender())
    return returned


def clocked(function: Callable[[], object]) -> Callable[[], float]:
    """The function as a contender that returns its seconds."""

    def seconds() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return seconds


def spread(samples: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Median and quartiles, to so many significant digits."""
    low, high = np.quantile(samples, (0.25, 0.75))
    return {
        "median": rounded(median(samples), digits),
        "quartiles": [rounded(low, digits), rounded(high, digits)],
    }


def rounded(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
