"""Which implementation runs an op.

Backends are listed fastest first. Each says in one sentence why it can't run an op on a device and
data type, or that it can. ``auto`` takes the first that can; a backend asked for by name runs or
raises its
reason: nothing falls back silently.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from smi_fast import _native, _schemas, reference

OPS = (
    "gather_patches",
    "gather_attention",
    "total_variation",
    "batch_norm_matching",
    "adam_clamp_",
)
AUTO = "auto"
# Read once, so that ops stay traceable by torch.compile.
DEFAULT = os.environ.get("SMI_FAST_BACKEND", AUTO)


class BackendUnavailable(RuntimeError):
    """A backend that was asked for doesn't exist or can't run here; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: what ``backend=`` and ``SMI_FAST_BACKEND`` call it.
        functions: holds a function for each of :data:`OPS` and its ``_backward``, with the
            signatures of :mod:`smi_fast.reference`.
        why_not: ``(op, device, dtype) -> reason`` that it can't run, or None when it can.
    """

    name: str
    functions: Any
    why_not: Callable[[str, torch.device, torch.dtype], str | None]


def _reference_why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{op} takes floating point, got {dtype}"


def _cpp_why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if _native.WHY_NO_CPU is not None:
        return _native.WHY_NO_CPU
    if device.type != "cpu":
        return f"{op} runs on the CPU, got {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"{op} takes float32 or float64, got {dtype}"
    return None


class _TritonOps:
    """The ops beside those of the other compiled backends, see :mod:`smi_fast._schemas`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.smi_fast, name + _schemas.TRITON)


# Looked for once, so that ops stay traceable by torch.compile.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _triton_why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if not _HAS_TRITON:
        return "triton isn't installed"
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA devices, got {device}"
    if dtype not in _TRITON_DTYPES:
        return f"the Triton kernel of {op} takes float32, bfloat16 or float16, got {dtype}"
    return None


BACKENDS = (
    Backend("triton", _TritonOps(), _triton_why_not),
    Backend("cpp", torch.ops.smi_fast, _cpp_why_not),
    Backend("reference", reference, _reference_why_not),
)


def names() -> tuple[str, ...]:
    """What ``backend=`` accepts."""
    return (AUTO, *(backend.name for backend in BACKENDS))


def check_name(name: str) -> str:
    """The name, when there is such a backend.

    Raises:
        BackendUnavailable: for any other name, listing the ones there are.
    """
    if name not in names():
        raise BackendUnavailable(f"expected a backend among {', '.join(names())}, got {name!r}")
    return name


def choose(op: str, device: torch.device, dtype: torch.dtype, name: str = AUTO) -> Backend:
    """The backend that runs an op.

    Args:
        op: one of :data:`OPS`.
        device: of the tensors.
        dtype: of the floating point tensors.
        name: a backend, or "auto": ``SMI_FAST_BACKEND`` when that is set, else the first that can.

    Raises:
        BackendUnavailable: when the named backend, or every one, can't; with the reasons.
    """
    wanted = check_name(DEFAULT if name == AUTO else name)
    reasons = []
    for backend in BACKENDS:
        if wanted in (AUTO, backend.name):
            reason = backend.why_not(op, device, dtype)
            if reason is None:
                return backend
            reasons.append(f"{backend.name}: {reason}")
    raise BackendUnavailable(
        f"no backend can run {op} on {device} in {dtype}: {'; '.join(reasons)}"
    )


def report(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """For each backend the first reason that keeps it from running an op on a device, or None."""
    return {
        backend.name: next(filter(None, (backend.why_not(op, device, dtype) for op in OPS)), None)
        for backend in BACKENDS
    }
