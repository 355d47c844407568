"""Schedules: when patches stop, and which ones."""

from smi_fast.schedules.base import (
    Schedule,
    Selection,
    Stop,
    WrongSelection,
    check,
    promised,
    still_iterations,
)
from smi_fast.schedules.dense import Dense
from smi_fast.schedules.stops import StopSchedule

__all__ = [
    "Dense",
    "Schedule",
    "Selection",
    "Stop",
    "StopSchedule",
    "WrongSelection",
    "check",
    "promised",
    "still_iterations",
]
