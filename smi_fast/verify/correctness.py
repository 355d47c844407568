"""Every kernel that can run here, against the reference in float64."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from smi_fast.ops import backends
from smi_fast.ops.backends import Backend
from smi_fast.verify import isolation
from smi_fast.verify.call_grid import op_calls
from smi_fast.verify.cases import OpCall
from smi_fast.verify.gpu_engine_grid import GPU_STEPS, gpu_engine_calls

# How many processes share a GPU; each of them holds some hundred megabytes of its memory.
PROCESSES = 8
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKWARD = "_backward"


@dataclass(frozen=True)
class Verdict:
    """What the calls of an op by one backend showed.

    Attributes:
        backend: name of the backend.
        device: where it ran.
        op: name of the op; its gradient has a name and a verdict of its own.
        dtype: data type of the floating point tensors; "-" where a process ended before any call.
        calls: number of calls.
        error: the error that takes the largest share of its budget. None where results are copies,
            of which every bit is compared, or where every call failed.
        budget: the budget of that error.
        failures: one line for each call that is wrong or raised an error, and one for calls that
            are skipped.
    """

    backend: str
    device: str
    op: str
    dtype: str
    calls: int
    error: float | None
    budget: float | None
    failures: tuple[str, ...]


class _Began(NamedTuple):
    """A call that begins: its data type, its number among the calls of that type, and its name."""

    dtype: str
    number: int
    call: str


def devices() -> list[torch.device]:
    """The CPU and every CUDA device."""
    cuda = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return [torch.device("cpu"), *cuda]


def answers(device: torch.device) -> bool:
    """Whether a device still works: after some errors of a kernel CUDA refuses every call."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Products of float32 are exact but for rounding, whatever TF32 the process has allowed."""
    libraries: Any = torch.backends  # typed without mkldnn.matmul
    settings = (libraries.cuda.matmul, libraries.mkldnn.matmul)
    before = [each.fp32_precision for each in settings]
    try:
        for each in settings:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, precision in zip(settings, before, strict=True):
            each.fp32_precision = precision


def verdicts(
    device: torch.device, limit: float, seconds: float = math.inf, most: int | None = None
) -> Iterator[Verdict]:
    """One verdict for each backend, op and data type that runs on a device.

    Each backend runs each op in a process of its own. On a GPU several of them work at once, which
    above all compile kernels.

    Args:
        device: where the backends run.
        limit: seconds that each process may take.
        seconds: that all may take together.
        most: how many calls of each op and data type are checked; all by default.
    """
    end = time.monotonic() + seconds
    todo = [
        (backend, op)
        for backend in backends.BACKENDS
        for op in dict.fromkeys(call.op for call in _calls(backend))
        if _dtypes(backend, op, device)
    ]

    def found(backend: Backend, op: str) -> Iterator[Verdict]:
        return _isolated(backend, op, device, min(limit, end - time.monotonic()), most)

    if device.type != "cuda":
        for pair in todo:
            yield from found(*pair)
        return
    with ThreadPoolExecutor(min(PROCESSES, os.cpu_count() or 1)) as pool:
        for each in as_completed([pool.submit(list, found(*pair)) for pair in todo]):
            yield from each.result()


def _calls(backend: Backend) -> list[OpCall]:
    """The calls of every op; of Triton also those of the steps of its engine."""
    return [*op_calls(), *(gpu_engine_calls() if backend.name == "triton" else ())]


def _dtypes(backend: Backend, op: str, device: torch.device) -> list[torch.dtype]:
    """The data types to check; none of the reference itself."""
    if backend.name == "reference":
        return []
    name = op.removesuffix(BACKWARD)
    dtypes = (torch.float32, torch.bfloat16) if op in GPU_STEPS else DTYPES
    return [dtype for dtype in dtypes if backend.why_not(name, device, dtype) is None]


def _isolated(
    backend: Backend, op: str, device: torch.device, limit: float, most: int | None
) -> Iterator[Verdict]:
    arguments = (backend.name, op, str(device), most)
    began = _Began("-", 0, op)
    try:
        for message in isolation.messages(_check, *arguments, device=device, limit=limit):
            if isinstance(message, _Began):
                began = message
            else:
                yield message
    except isolation.Ended as reason:
        failure = f"{began.call}: {reason}; the calls after it are skipped"
        named = (backend.name, str(device), op, began.dtype)
        yield Verdict(*named, began.number, None, None, (failure,))


def _check(
    send: Callable[[object], None],
    backend_name: str,
    op: str,
    device_name: str,
    most: int | None = None,
) -> None:
    """Send each call that begins, and the verdict on each data type."""
    backend, device = backends.by_name(backend_name), torch.device(device_name)
    calls = [call for call in _calls(backend) if call.op == op][:most]
    for dtype in _dtypes(backend, op, device):
        send(verdict(backend, device, dtype, calls, send))
        if not answers(device):
            return


def verdict(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    calls: list[OpCall],
    began: Callable[[_Began], None] = lambda _: None,
) -> Verdict:
    """The verdict on calls of one op, without those that are too large for the backend.

    Args:
        backend: runs the calls.
        device: where it runs them.
        dtype: data type of the floating point tensors.
        calls: of one op.
        began: called before each call.
    """
    found, failures = [], []
    name = str(dtype).removeprefix("torch.")
    fitting = [call for call in calls if call.fits(backend, device, dtype)]
    for number, call in enumerate(fitting, 1):
        began(_Began(name, number, str(call)))
        try:
            with ieee_float32():
                noise = call.noise(backend, device, dtype)
                errors = list(call.errors(backend.functions, dtype, str(device), noise))
        except Exception as problem:
            failures.append(f"{call}: {isolation.described(problem)}")
            if not answers(device):
                failures.append("the rest of the op is skipped: the device answers no more")
                break
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
        name,
        len(fitting),
        worst and worst.value,
        worst and worst.budget,
        tuple(failures),
    )
