"""Schedules that the package doesn't have."""

from __future__ import annotations

from dataclasses import dataclass, field

from smi_fast import Selection, Stop


@dataclass(frozen=True)
class Rebirth:
    """At each stop the two most important patches leave as finished, the least one is dropped."""

    at: tuple[int, ...] = (3, 6)
    stops: list[Stop] = field(default_factory=list)

    def counts(self, patches: int) -> tuple[int, ...]:
        return tuple(patches - 3 * (index + 1) for index, _ in enumerate(self.at))

    def select(self, stop: Stop) -> Selection:
        self.stops.append(stop)
        order = stop.importance.argsort(dim=1, descending=True)
        finished, kept = order[:, :2], order[:, 2:-1]
        return Selection(
            *(stop.kept.gather(1, places).sort(dim=1).values for places in (kept, finished))
        )
