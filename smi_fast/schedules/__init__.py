"""Schedules: when patches stop, and which ones."""

from smi_fast.schedules.base import (
    Schedule,
    Selection,
    Stop,
    WrongSelection,
    bound,
    check,
    images_of_a_trajectory,
    promised,
    sizes_of,
    still_iterations,
)
from smi_fast.schedules.dense import Dense
from smi_fast.schedules.mass import MassSchedule
from smi_fast.schedules.rebirth import PatchRebirth
from smi_fast.schedules.resolution import ResolutionSchedule
from smi_fast.schedules.stops import StopSchedule

__all__ = [
    "Dense",
    "MassSchedule",
    "PatchRebirth",
    "ResolutionSchedule",
    "Schedule",
    "Selection",
    "Stop",
    "StopSchedule",
    "WrongSelection",
    "bound",
    "check",
    "images_of_a_trajectory",
    "promised",
    "sizes_of",
    "still_iterations",
]
