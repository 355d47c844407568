"""``smi-fast verify``: checks and times, printed and written as they come."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from smi_fast import __version__
from smi_fast.ops import backends
from smi_fast.verify import compare, correctness, gpu_stages
from smi_fast.verify.stages import Line, Stage, run

LINE = "{:<10} {:<8} {:<29} {:<9} {:>5} {:>9} {:>9}  {}"
TITLES = ("backend", "device", "op", "dtype", "calls", "error", "budget", "verdict")


def verify(
    out: Path,
    devices: Sequence[torch.device],
    limit: float,
    seconds: float,
    stages: Sequence[Stage] = gpu_stages.STAGES,
    old: Path | None = None,
) -> bool:
    """Check the kernels of some devices, and time those of GPUs; return whether all are right.

    Args:
        out: JSON lines: one about the machine, those of each device, and a summary. Each is on the
            disk as soon as it is known.
        devices: where to check.
        limit: seconds that each op of each backend may take on the CPU, in a process of its own.
        seconds: that the stages of each GPU may take together.
        stages: of a GPU.
        old: such a file of an earlier run, with which times are compared.

    Raises:
        NotComparable: ``old`` isn't such a file.
    """
    earlier = None if old is None else compare.read(old)
    lines: list[Line] = []
    with out.open("w") as file:

        def write(line: Line) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()
            lines.append(line)

        write({"kind": "machine", **_machine(devices)})
        print(LINE.format(*TITLES), flush=True)
        for device in devices:
            for line in _found(device, limit, seconds, stages):
                named = {"device": str(device), **line}
                print(*_shown(named), sep="\n", flush=True)
                write(named)
        reasons = not_run(devices)
        for reason in reasons:
            print(f"not run: {reason}", flush=True)
        failed = [_name(line) for line in lines if line.get("failures")]
        counts = {f"{kind}s": _count(lines, kind) for kind in ("verdict", "time")}
        summary = {"right": not failed, **counts, "failed": failed, "not_run": reasons}
        write({"kind": "summary", **summary})
    if earlier is not None:
        print(*compare.sentences(earlier, lines), sep="\n", flush=True)
    return not failed


def _found(
    device: torch.device, limit: float, seconds: float, stages: Sequence[Stage]
) -> Iterator[Line]:
    if device.type == "cuda":
        yield from run(stages, device, seconds)
        return
    for verdict in correctness.verdicts(device, limit):
        yield {"kind": "verdict", **asdict(verdict)}


def _name(line: Line) -> str:
    """What a line is about, in words."""
    keys = ["backend", "device", "op", "dtype"]
    if line["kind"] != "verdict":
        keys = ["device", "stage", "recipe", "precision", "share"]
    return " ".join(str(line[key]) for key in keys if key in line)


def _count(lines: Sequence[Line], kind: str) -> int:
    return sum(line["kind"] == kind for line in lines)


def _machine(devices: Sequence[torch.device]) -> dict[str, Any]:
    return {
        "smi_fast": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "devices": {
            str(device): torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else platform.machine()
            for device in devices
        },
    }


def not_run(devices: Sequence[torch.device]) -> list[str]:
    """One sentence for each thing that isn't checked on these devices, with the reason."""
    reasons = []
    if not any(device.type == "cuda" for device in devices):
        lack = "asked for" if torch.cuda.is_available() else "visible"
        reasons.append(f"times: no CUDA device is {lack}")
    for backend in backends.BACKENDS:
        why = [backends.report(device)[backend.name] for device in devices]
        if None not in why:
            reasons.append(f"{backend.name}: {why[-1]}")
    return reasons


def _shown(line: Line) -> Iterator[str]:
    """A line of JSON as it is; of a verdict that of the table, and one for each failure."""
    if line["kind"] != "verdict":
        yield json.dumps(line)
        return
    numbers = ("-" if line[key] is None else f"{line[key]:.2e}" for key in ("error", "budget"))
    words = (*(line[key] for key in ("backend", "device", "op", "dtype", "calls")), *numbers)
    yield LINE.format(*words, "FAILED" if line["failures"] else "ok")
    for failure in line["failures"]:
        yield f"{line['backend']} on {line['device']}, {line['dtype']}: {failure}"
