"""``smi-fast verify``: every kernel that can run here, against the reference in float64."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from smi_fast import __version__
from smi_fast.ops import backends
from smi_fast.ops.backends import Backend
from smi_fast.verify.cases import Case, WrongResult, all_cases

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKWARD = "_backward"


@dataclass(frozen=True)
class Verdict:
    """The worst of all calls of an op by one backend.

    Attributes:
        backend: its name.
        device: where it ran.
        op: its name; the gradient of an op is one of its own.
        dtype: of the floating point tensors.
        calls: how many.
        error: the greatest, of the result that came nearest to its budget; None where results are
            copies, of which every bit is compared, or where no call could be made.
        budget: of the same result.
        failures: what was wrong, one line for each call.
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
    """Of every backend, op and data type that runs on a device."""
    by_op: dict[str, list[Case]] = {}
    for case in all_cases():
        by_op.setdefault(case.op, []).append(case)
    for backend in backends.BACKENDS:
        for op, cases in by_op.items():
            for dtype in DTYPES:
                name = op.removesuffix(BACKWARD)
                if backend.name != "reference" and backend.why_not(name, device, dtype) is None:
                    yield _verdict(backend, device, op, dtype, cases)


def _verdict(
    backend: Backend, device: torch.device, op: str, dtype: torch.dtype, cases: list[Case]
) -> Verdict:
    pairs, failures = [], []
    cases = [case for case in cases if case.fits(backend, device, dtype)]
    for case in cases:
        try:
            errors = list(case.errors(backend.functions, dtype, str(device)))
        except (WrongResult, RuntimeError) as problem:
            failures.append(f"{case}: {problem}")
            continue
        pairs += errors
        failures += [
            f"{case}: error {error:.3g}, budget {budget:.3g}"
            for error, budget in errors
            if not error <= budget  # nan is out of it too
        ]
    error, budget = max(pairs, key=_share, default=(None, None))
    short = str(dtype).removeprefix("torch.")
    return Verdict(backend.name, str(device), op, short, len(cases), error, budget, tuple(failures))


def _share(pair: tuple[float, float]) -> float:
    """Of the budget that an error takes; all of it and more when it isn't a number."""
    error, budget = pair
    if not math.isfinite(error):
        return math.inf
    return error / budget if budget else float(error > 0)


def not_run() -> list[str]:
    """What can't be checked here, and why."""
    reasons = [] if torch.cuda.is_available() else ["times: no CUDA device is visible"]
    for backend in backends.BACKENDS:
        why = [backends.report(device)[backend.name] for device in devices()]
        if None not in why:
            reasons.append(f"{backend.name}: {why[-1]}")
    return reasons


def table(rows: list[Verdict]) -> Iterator[str]:
    """Lines of text, the failures below the table."""
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
    """Everything that was found, as JSON takes it."""
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
