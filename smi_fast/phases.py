"""Values that change at stops: one for each phase between two of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def for_phases(
    values: Sequence[float], what: str, iterations: int, stops: Sequence[int]
) -> list[tuple[float, int]]:
    """Each value, and the number of iterations that it is for.

    Args:
        values: one more than there are stops.
        what: what a message calls the values, in the plural.
        iterations: T.
        stops: iterations of the stops, ascending.

    Raises:
        ValueError: not one value for each phase.
    """
    if len(values) != len(stops) + 1:
        raise ValueError(
            f"expected {len(stops) + 1} {what}, one for each phase between "
            f"{len(stops)} stops, got {len(values)}"
        )
    lengths = (end - first for first, end in pairwise((0, *stops, iterations)))
    return list(zip(values, lengths, strict=True))
