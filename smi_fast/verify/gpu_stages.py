"""The stages of ``smi-fast verify`` on a GPU: what the installed package can prove and time."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from smi_fast.ops import backends
from smi_fast.provenance import versions
from smi_fast.verify import captured, correctness, timing
from smi_fast.verify.stages import Stage, alone

DRIVER = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit")


def send_environment(send: Callable[[object], None], device_name: str) -> None:
    """Send a line about the GPU, its driver, the libraries, and what "auto" takes on it."""
    device = torch.device(device_name)
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "kind": "environment",
        "versions": versions(),
        "cuda": torch.version.cuda,
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "bytes": properties.total_memory,
        "built_for": torch.cuda.get_arch_list(),
        "float32": torch.backends.cuda.matmul.fp32_precision,
        "backends": backends.report(device),
        "auto": {op: backends.name_or_reason(op, device) for op in backends.OPS},
        "driver": driver(),
    }
    send(found)


def driver() -> str:
    """What nvidia-smi says of all GPUs; why it says nothing, where it doesn't."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi isn't installed"
    command = ["nvidia-smi", f"--query-gpu={','.join(DRIVER)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return (done.stdout or done.stderr).strip()


def verdict_lines(
    device: torch.device, seconds: float, most: int | None = None
) -> Iterator[dict[str, Any]]:
    """The verdicts on every op, all of which take these seconds at most."""
    for verdict in correctness.verdicts(device, seconds, seconds, most):
        yield {"kind": "verdict", **asdict(verdict)}


# Few calls of each op come first: they show in seconds whether anything works.
SMOKE = Stage("smoke", 40, partial(verdict_lines, most=2), proves=True)
ENVIRONMENT = Stage("environment", 15, alone(send_environment))
CAPTURED = Stage("captured", 60, alone(captured.send_checks), proves=True)
GRID = Stage("grid", 120, verdict_lines, proves=True)
OPS = Stage("ops", 120, timing.op_entries)
STEPS = Stage("steps", 90, timing.step_entries)

STAGES = (ENVIRONMENT, SMOKE, CAPTURED, GRID, OPS, STEPS)
