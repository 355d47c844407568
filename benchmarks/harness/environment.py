"""Keeps a measurement together with what it was taken on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch

RESULTS = Path(__file__).parent.parent / "results"
# Share of the machine's CPU time that others may use before it is not idle any more.
IDLE = 0.05


def record(name: str, measured: Mapping[str, Any]) -> None:
    """Prints a measurement and writes it to ``results/NAME.json`` with its environment."""
    environment = describe()
    text = json.dumps({**measured, "environment": environment}, indent=1)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(f"{name}: {text}")
    if environment["idle"] is False:
        print(f"{name}: the machine was not idle, so times are not to be relied on")


def describe() -> dict[str, Any]:
    """Machine, versions, commit and time, to be kept beside a measurement."""
    others = _cpu_share_of_others()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_average_before": _LOAD_BEFORE,
        "cpu_share_of_others": others,
        "idle": None if others is None else others < IDLE,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "commit": _commit(),
    }


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Seconds until now: of the clock, of all busy processors, and of this process's; on Linux."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, sum(os.times()[:4])


# Taken at import, and so before the work of any measurement.
_LOAD_BEFORE = round(os.getloadavg()[0], 2)
_BEFORE = _cpu_seconds()


def _cpu_share_of_others() -> float | None:
    """The share of the machine's CPU time since the import that other processes had."""
    now = _cpu_seconds()
    if now is None or _BEFORE is None:
        return None
    wall, busy, own = (after - before for after, before in zip(now, _BEFORE, strict=True))
    return round(max(busy - own, 0.0) / (wall * (os.cpu_count() or 1)), 3)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
