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
    still_iterations,
)
from smi_fast.schedules.dense import Dense
from smi_fast.schedules.rebirth import PatchRebirth
from smi_fast.schedules.stops import StopSchedule

__all__ = [
    "Dense",
    "PatchRebirth",
    "Schedule",
    "Selection",
    "Stop",
    "StopSchedule",
    "WrongSelection",
    "bound",
    "check",
    "images_of_a_trajectory",
    "promised",
    "still_iterations",
]
