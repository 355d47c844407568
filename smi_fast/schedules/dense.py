"""The dense loop: every patch is kept to the end."""

from __future__ import annotations

from dataclasses import dataclass

from smi_fast.schedules.base import Selection, Stop


@dataclass(frozen=True)
class Dense:
    """Keeps every patch to the end, without a stop.

    >>> Dense().at
    ()
    """

    @property
    def at(self) -> tuple[int, ...]:
        return ()

    @property
    def remaining(self) -> float:
        """Share of the patches left at the end."""
        return 1.0

    def counts(self, patches: int) -> tuple[int, ...]:
        return ()

    def select(self, stop: Stop) -> Selection:
        return Selection(stop.kept)
