"""The memory that a function needs, as Linux counts it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec

Given = ParamSpec("Given")

# Writing "5" to this file lowers the peak of the process to the memory that is resident now.
CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_bytes(function: Callable[[], object]) -> int:
    """Peak resident bytes during a call, minus the bytes that were resident before it."""
    return seconds_and_peak(function)[1]


def seconds_and_peak(function: Callable[[], object]) -> tuple[float, int, int]:
    """Seconds of a call, the most resident bytes that it adds, and the peak of the process."""
    CLEAR_REFS.write_text("5")
    before, start = _bytes("VmRSS"), time.perf_counter()
    function()
    seconds, peak = time.perf_counter() - start, _bytes("VmHWM")
    return seconds, peak - before, peak


def in_new_process(
    function: Callable[Given, int], *args: Given.args, **kwargs: Given.kwargs
) -> int:
    """Calls the function in a new process, where no allocator holds memory that was freed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        return child.submit(function, *args, **kwargs).result()


def _bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected {field} in /proc/self/status")
