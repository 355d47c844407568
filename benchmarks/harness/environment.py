"""Records a measurement together with the machine and the versions it was taken on."""

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

RESULTS = Path(__file__).parents[1] / "results"
# The machine counts as idle while other processes use less than this share of its CPU time.
IDLE = 0.05


def result_file(name: str, *, quick: bool = False) -> Path:
    """Where a result lies. Quick runs have files of their own, which git ignores."""
    path = RESULTS / name
    return path.with_stem(f"{path.stem}-quick") if quick else path


def record(name: str, measured: Mapping[str, Any], *, quick: bool = False) -> None:
    """Print a measurement and write it to ``results/NAME.json`` with its environment."""
    environment = describe()
    text = json.dumps({**measured, "environment": environment}, indent=1)
    path = result_file(f"{name}.json", quick=quick)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")
    print(f"{name}: {text}")
    print(f"{name}: written to {path}")
    if environment["idle"] is False:
        print(f"{name}: other processes used the machine meanwhile, don't rely on these times")


def describe() -> dict[str, Any]:
    """Describe the machine, its load, the versions and the commit."""
    others = share_of_others(_BEFORE)
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
        "commit": commit(),
    }


def cpu_seconds() -> tuple[float, float, float] | None:
    """Seconds so far of the clock, of all busy processors, and of this process. Linux only."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, sum(os.times()[:4])


# These are read at import, before any measurement has started.
_LOAD_BEFORE = round(os.getloadavg()[0], 2)
_BEFORE = cpu_seconds()


def share_of_others(before: tuple[float, float, float] | None) -> float | None:
    """The share of the machine's CPU time that other processes used since :func:`cpu_seconds`."""
    now = cpu_seconds()
    if now is None or before is None:
        return None
    wall, busy, own = (after - then for after, then in zip(now, before, strict=True))
    return round(max(busy - own, 0.0) / (wall * (os.cpu_count() or 1)), 3)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def commit() -> str:
    """The commit of this checkout, with "-dirty" behind it when files differ from it.

    Results don't count: one measurement writes them before the next one is recorded.
    """
    found = _git("describe", "--always") or "unknown"
    others = (":/", f":(exclude){RESULTS.name}")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *others)
    return f"{found}-dirty" if changed else found


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(RESULTS.parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()
