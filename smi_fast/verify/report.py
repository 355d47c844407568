"""``smi-fast verify``: checks and times, printed and written as they come."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from smi_fast import __version__
from smi_fast.ops import backends
from smi_fast.verify import correctness, timing
from smi_fast.verify.correctness import Verdict

LINE = "{:<10} {:<8} {:<29} {:<9} {:>5} {:>9} {:>9}  {}"
TITLES = ("backend", "device", "op", "dtype", "calls", "error", "budget", "verdict")


def verify(out: Path, devices: Sequence[torch.device], limit: float) -> bool:
    """Check the kernels of some devices, and time those of GPUs; return whether all are right.

    Args:
        out: JSON lines: one about the machine, one for each verdict and each time, and a summary.
            Each is on the disk as soon as it is known.
        devices: where to check.
        limit: seconds that a process may take, of which each op of each backend has its own.
    """
    with out.open("w") as file:
        _write(file, "machine", _machine(devices))
        rows = []
        print(LINE.format(*TITLES), flush=True)
        for device in devices:
            for row in correctness.verdicts(device, limit):
                rows.append(row)
                print(*_shown(row), sep="\n", flush=True)
                _write(file, "verdict", asdict(row))
        reasons = not_run(devices)
        for reason in reasons:
            print(f"not run: {reason}", flush=True)
        times = 0
        for device in devices:
            if device.type == "cuda":
                wrong = frozenset(
                    (row.backend, row.op) for row in rows if row.failures and _is_at(row, device)
                )
                for entry in timing.entries(device, wrong, limit):
                    times += 1
                    print(json.dumps(entry), flush=True)
                    _write(file, "time", {"device": str(device), **entry})
        failed = [f"{r.backend} {r.device} {r.op} {r.dtype}" for r in rows if r.failures]
        counts = {"verdicts": len(rows), "times": times}
        summary = {"right": not failed, **counts, "failed": failed, "not_run": reasons}
        _write(file, "summary", summary)
    return not failed


def _write(file: TextIO, kind: str, fields: dict[str, Any]) -> None:
    file.write(json.dumps({"kind": kind, **fields}) + "\n")
    file.flush()


def _is_at(row: Verdict, device: torch.device) -> bool:
    return row.device == str(device)


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


def _shown(row: Verdict) -> Iterator[str]:
    """The line of a verdict in the table, and a line for each failure."""
    numbers = ("-" if x is None else f"{x:.2e}" for x in (row.error, row.budget))
    words = (row.backend, row.device, row.op, row.dtype, row.calls, *numbers)
    yield LINE.format(*words, "FAILED" if row.failures else "ok")
    for failure in row.failures:
        yield f"{row.backend} on {row.device}, {row.dtype}: {failure}"
