"""Which implementation runs an op.

Each backend says in one sentence why it can't run a call, or that it can. ``auto`` takes the first
that can, of :data:`BACKENDS` in order; before them, on a GPU, the one that :data:`ON_GPU` has for
the op. A backend asked for by name runs or raises its reason: nothing falls back silently.
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
class Attention:
    """The size of a call of gather_attention.

    Attributes:
        tokens: kept of each image.
        width: of a head.
        gradient: whether it will be wanted.
    """

    tokens: int
    width: int
    gradient: bool


def _any_size(size: Attention, device: torch.device, dtype: torch.dtype) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: what ``backend=`` and ``SMI_FAST_BACKEND`` call it.
        functions: holds a function for each of :data:`OPS` and its ``_backward``, with the
            signatures of :mod:`smi_fast.reference`.
        why_not: ``(op, device, dtype) -> reason`` that it can't run, or None when it can.
        why_not_attention: the same for the size of a call of gather_attention that it else can run.
    """

    name: str
    functions: Any
    why_not: Callable[[str, torch.device, torch.dtype], str | None]
    why_not_attention: Callable[[Attention, torch.device, torch.dtype], str | None] = _any_size


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
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _triton_why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if not _HAS_TRITON:
        return "triton isn't installed"
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA devices, got {device}"
    if dtype not in _GPU_DTYPES:
        return f"the Triton kernel of {op} takes float32, bfloat16 or float16, got {dtype}"
    return None


def _gpu(device: torch.device) -> tuple[int, int, int]:
    """Major and minor compute capability, and bytes of shared memory that one block can have."""
    properties: Any = torch.cuda.get_device_properties(device)  # typed without the last one
    return properties.major, properties.minor, properties.shared_memory_per_block_optin


def _cuda_why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if _native.WHY_NO_CUDA is not None:
        return _native.WHY_NO_CUDA
    if device.type != "cuda":
        return f"the CUDA kernels run on CUDA devices, got {device}"
    # gather_patches copies elements as they are.
    if dtype not in _GPU_DTYPES and (op, dtype) != ("gather_patches", torch.float64):
        return f"the CUDA kernel of {op} takes float32, bfloat16 or float16, got {dtype}"
    if torch.cuda.is_available():
        major, minor, _ = _gpu(device)
        if major < 8:
            return f"the CUDA kernels need compute capability 8.0, {device} has {major}.{minor}"
    return None


# What csrc/cuda/gather_attention.cuh compiles for and allocates; its unit is a tile of 16 tokens.
_CUDA_WIDTHS = (32, 64, 80, 128)
_CUDA_TILE = 16


def most_tokens(width: int, itemsize: int, gradient: bool, shared_memory: int) -> int:
    """Tokens of a head that the CUDA kernel of gather_attention holds at once.

    Args:
        width: of the head, a multiple of 8 up to 128.
        itemsize: bytes of an element.
        gradient: whether that is what is computed.
        shared_memory: bytes that one block can have.
    """
    row = next(w for w in _CUDA_WIDTHS if w >= width) * itemsize + 16
    # Q, K and V, and for the gradient dO and two floats.
    token = 4 * row + 8 if gradient else 3 * row
    return shared_memory // (_CUDA_TILE * token) * _CUDA_TILE


def _cuda_why_not_attention(
    size: Attention, device: torch.device, dtype: torch.dtype
) -> str | None:
    if size.width % 8 or size.width > _CUDA_WIDTHS[-1]:
        return f"the CUDA kernel takes heads as wide as a multiple of 8 up to 128, got {size.width}"
    # The gradient needs more than the output.
    most = most_tokens(size.width, dtype.itemsize, size.gradient, _gpu(device)[2])
    if size.tokens <= most:
        return None
    return (
        f"the CUDA kernel holds {most} tokens of width {size.width} in {dtype}"
        f"{' for the gradient' if size.gradient else ''} in the shared memory of {device}, "
        f"got {size.tokens}"
    )


BACKENDS = (
    Backend("cuda", torch.ops.smi_fast, _cuda_why_not, _cuda_why_not_attention),
    Backend("triton", _TritonOps(), _triton_why_not),
    Backend("cpp", torch.ops.smi_fast, _cpp_why_not),
    Backend("reference", reference, _reference_why_not),
)

# Which of both auto takes first on a GPU, and why. Nothing was measured on one yet: these are
# expectations from how the kernels are made.
ON_GPU = {
    "gather_patches": ("cuda", "so little to copy that the launch counts, which is shorter"),
    "gather_attention": ("cuda", "pads a set to 16 tokens, where Triton pads to a power of two"),
    "total_variation": ("triton", "loads 16 bytes at a time, where CUDA loads a pixel"),
    "batch_norm_matching": ("triton", "loads 16 bytes at a time and sums without float64"),
    "adam_clamp_": ("cuda", "once per step on few patches: the launch counts, which is shorter"),
}
# Where the first one can't run, the others follow as they are listed above.
_ORDER = {
    op: (*(b for b in BACKENDS if b.name == first), *(b for b in BACKENDS if b.name != first))
    for op, (first, _) in ON_GPU.items()
}


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


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    name: str = AUTO,
    attention: Attention | None = None,
) -> Backend:
    """The backend that runs an op.

    Args:
        op: one of :data:`OPS`.
        device: of the tensors.
        dtype: of the floating point tensors.
        name: a backend, or "auto": ``SMI_FAST_BACKEND`` when that is set, else the first that can.
        attention: the size of a call of gather_attention, which backends may have limits for.

    Raises:
        BackendUnavailable: when the named backend, or every one, can't; with the reasons.
    """
    wanted = check_name(DEFAULT if name == AUTO else name)
    reasons = []
    for backend in _ORDER[op]:
        if wanted in (AUTO, backend.name):
            reason = backend.why_not(op, device, dtype)
            if reason is None and attention is not None:
                reason = backend.why_not_attention(attention, device, dtype)
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
