"""``smi-fast verify``: every kernel that can run here, against the reference in float64."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from smi_fast import __version__
from smi_fast.ops import backends
from smi_fast.ops.backends import Backend
from smi_fast.verify.call_grid import op_calls
from smi_fast.verify.cases import OpCall, WrongResult

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKWARD = "_backward"


@dataclass(frozen=True)
class Verdict:
    """What the calls of an op by one backend showed.

    Attributes:
        backend: name of the backend.
        device: where it ran.
        op: name of the op; its gradient has a name and a verdict of its own.
        dtype: data type of the floating point tensors.
        calls: number of calls.
        error: the error that takes the largest share of its budget. None where results are copies,
            of which every bit is compared, or where every call failed.
        budget: the budget of that error.
        failures: one line for each call that is wrong or raised an error.
    """

    backend: str
    device: str
    op: str
    dtype: str
    calls: int
    error: float | None
    budget: float | None
    failures: tuple[str, ...]


def devices() -> list[torch.device]:
    """The CPU and every CUDA device."""
    cuda = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return [torch.device("cpu"), *cuda]


def verdicts(device: torch.device) -> Iterator[Verdict]:
    """One verdict for each backend, op and data type that runs on a device."""
    by_op: dict[str, list[OpCall]] = {}
    for call in op_calls():
        by_op.setdefault(call.op, []).append(call)
    for backend in backends.BACKENDS:
        for op, calls in by_op.items():
            for dtype in DTYPES:
                name = op.removesuffix(BACKWARD)
                if backend.name != "reference" and backend.why_not(name, device, dtype) is None:
                    yield verdict(backend, device, dtype, calls)


def verdict(
    backend: Backend, device: torch.device, dtype: torch.dtype, calls: list[OpCall]
) -> Verdict:
    """The verdict on calls of one op, without those that are too large for the backend."""
    found, failures = [], []
    fitting = [call for call in calls if call.fits(backend, device, dtype)]
    for call in fitting:
        try:
            errors = list(call.errors(backend.functions, dtype, str(device)))
        except (WrongResult, RuntimeError) as problem:
            failures.append(f"{call}: {problem}")
            continue
        found += errors
        wrong = [str(error) for error in errors if not error.allowed]
        if wrong:
            failures.append(f"{call}: {'; '.join(wrong)}")
    worst = max(found, key=lambda error: error.share, default=None)
    return Verdict(
        backend.name,
        str(device),
        calls[0].op,
        str(dtype).removeprefix("torch."),
        len(fitting),
        worst and worst.value,
        worst and worst.budget,
        tuple(failures),
    )


def not_run() -> list[str]:
    """One sentence for each thing that can't be checked here, with the reason."""
    reasons = [] if torch.cuda.is_available() else ["times: no CUDA device is visible"]
    for backend in backends.BACKENDS:
        why = [backends.report(device)[backend.name] for device in devices()]
        if None not in why:
            reasons.append(f"{backend.name}: {why[-1]}")
    return reasons


def table(rows: list[Verdict]) -> Iterator[str]:
    """The lines of a table of verdicts, followed by the failures."""
    line = "{:<10} {:<8} {:<29} {:<9} {:>5} {:>9} {:>9}  {}"
    titles = ("backend", "device", "op", "dtype", "calls", "error", "budget", "verdict")
    yield line.format(*titles)
    for row in rows:
        numbers = ("-" if x is None else f"{x:.2e}" for x in (row.error, row.budget))
        words = (row.backend, row.device, row.op, row.dtype, row.calls, *numbers)
        yield line.format(*words, "FAILED" if row.failures else "ok")
    for row in rows:
        for failure in row.failures:
            yield f"{row.backend} on {row.device}, {row.dtype}: {failure}"


def summary(rows: list[Verdict], times: list[dict[str, Any]]) -> dict[str, Any]:
    """Verdicts, times and the machine, ready for JSON."""
    return {
        "smi_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "devices": [
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
            for device in devices()
        ],
        "verdicts": [asdict(row) for row in rows],
        "not_run": not_run(),
        "times": times,
    }
