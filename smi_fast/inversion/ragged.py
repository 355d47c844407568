"""What a schedule that keeps another number of patches in each image asks for."""

from __future__ import annotations

from smi_fast.inversion.settings import Settings
from smi_fast.schedules import Schedule


def check_ragged(settings: Settings, schedule: Schedule) -> None:
    """Refuse what a ragged schedule can't be run with, before the first iteration.

    Raises:
        ValueError: a teacher whose head reads all tokens, or that is narrowed; an objective with
            taps; or, where more than one stop is scored, an importance with taps.
    """
    if not getattr(schedule, "ragged", False):
        return
    teacher, name = settings.teacher, type(schedule).__name__
    teacher.check_ragged()
    tapped = [o.name for o in settings.objectives if o.taps(teacher.depth)]
    if len(schedule.at) > 1 and settings.importance.taps(teacher.depth):
        tapped.append(f"importance {settings.importance!r}")
    if tapped:
        raise ValueError(
            f"expected nothing that reads taps with {name}, which keeps another number of patches "
            f"in each image, got {', '.join(tapped)}"
        )
