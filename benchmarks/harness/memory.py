"""Memory that a function takes at most, as Linux counts it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec

Given = ParamSpec("Given")

# What is written to this file sets the peak of the process back to what is resident now.
CLEAR_REFS, PEAK = Path("/proc/self/clear_refs"), "5"


def peak(function: Callable[[], object]) -> int:
    """Peak resident bytes during a call, less what is resident before it."""
    CLEAR_REFS.write_text(PEAK)
    before = _bytes("VmRSS")
    function()
    return _bytes("VmHWM") - before


def in_a_process_of_its_own(
    function: Callable[Given, int], *args: Given.args, **kwargs: Given.kwargs
) -> int:
    """What the function returns where nobody has allocated before: freed memory is held on to."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        return child.submit(function, *args, **kwargs).result()


def _bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected {field} in /proc/self/status")
