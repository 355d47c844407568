"""Which implementation runs an op.

Each backend says in one sentence why it can't run a call. ``auto`` takes the first of
:data:`BACKENDS` that can. On a GPU it takes the fastest, see :mod:`smi_fast.ops.tuning`, and where
nothing is tuned first tries the one that :data:`ON_GPU` names for the op. A backend asked for by
name runs or raises its reason: there is no silent fallback.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from smi_fast.ops import native, reference, schemas, tuning
from smi_fast.ops.limits import AttentionSize, too_large_for_cuda

OPS = (
    "gather_patches",
    "gather_sigmoid_patches",
    "gather_attention",
    "total_variation",
    "batch_norm_matching",
    "adam_clamp_",
)
AUTO = "auto"
# Read once, so that torch.compile can trace the ops.
DEFAULT = os.environ.get("SMI_FAST_BACKEND", AUTO)


class BackendUnavailable(RuntimeError):
    """A backend that was asked for doesn't exist or can't run here; the message says why."""


def _any_size(size: AttentionSize, device: torch.device, dtype: torch.dtype) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: what ``backend=`` and ``SMI_FAST_BACKEND`` call it.
        functions: has a function for each of :data:`OPS` and its ``_backward``, with the
            signatures of :mod:`smi_fast.ops.reference`.
        why_not: ``(op, device, dtype) -> reason`` why it can't run, or None when it can.
        too_large: ``(size, device, dtype) -> reason`` why it can't hold a call of
            gather_attention, or None when it can.
    """

    name: str
    functions: Any
    why_not: Callable[[str, torch.device, torch.dtype], str | None]
    too_large: Callable[[AttentionSize, torch.device, torch.dtype], str | None] = _any_size


def _reference_why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{op} takes floating point, got {dtype}"


def _cpp_why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if native.WHY_NO_CPU is not None:
        return native.WHY_NO_CPU
    if device.type != "cpu":
        return f"{op} runs on the CPU, got {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"{op} takes float32 or float64, got {dtype}"
    return None


class _TritonOps:
    """The ``*_triton`` ops under the names of the ops, see :mod:`smi_fast.ops.schemas`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.smi_fast, name + schemas.TRITON)


# Looked up once, so that torch.compile can trace the ops.
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
    """Major and minor compute capability, and bytes of shared memory that a block can have."""
    properties: Any = torch.cuda.get_device_properties(device)  # typed without the last one
    return properties.major, properties.minor, properties.shared_memory_per_block_optin


def _cuda_why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if native.WHY_NO_CUDA is not None:
        return native.WHY_NO_CUDA
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


def _too_large_for_cuda(
    size: AttentionSize, device: torch.device, dtype: torch.dtype
) -> str | None:
    return too_large_for_cuda(size, dtype, _gpu(device)[2])


BACKENDS = (
    Backend("cuda", torch.ops.smi_fast, _cuda_why_not, _too_large_for_cuda),
    Backend("triton", _TritonOps(), _triton_why_not),
    Backend("cpp", torch.ops.smi_fast, _cpp_why_not),
    Backend("reference", reference, _reference_why_not),
)

TUNED = "tuned"


class _TunedOps:
    """The ops, each call by the way that is the fastest for its sizes on the user's GPU.

    Args:
        backends: the candidates, the preferred one first.
        device: where they run.
    """

    def __init__(self, backends: tuple[Backend, ...], device: torch.device) -> None:
        self._backends, self._device = backends, device

    def __getattr__(self, op: str) -> Callable[..., Any]:
        functions = {backend.name: getattr(backend.functions, op) for backend in self._backends}
        if op.startswith("gather_attention") and "triton" in functions:
            functions["sdpa"] = schemas.sdpa(op)

        def run(*arguments: Any) -> Any:
            changed = schemas.changed_by(op)
            trials = {
                name: partial(function, *arguments)
                if not changed
                else _on_copies(function, arguments, changed)
                for name, function in functions.items()
            }
            key = f"{op} {tuning.described(arguments)}"
            return functions[tuning.fastest(self._device, key, trials)](*arguments)

        return run


def _on_copies(
    function: Callable[..., Any], arguments: tuple[Any, ...], changed: tuple[int, ...]
) -> Callable[[], object]:
    """A call that leaves its arguments as they are: it changes copies, made when it first runs."""

    @lru_cache(maxsize=1)
    def copies() -> tuple[Any, ...]:
        return tuple(a.clone() if i in changed else a for i, a in enumerate(arguments))

    return lambda: function(*copies())


def _tuned(fast: tuple[Backend, ...], device: torch.device) -> Backend:
    """The fastest of some backends, call by call."""
    return Backend(TUNED, _TunedOps(fast, device), fast[0].why_not, fast[0].too_large)


# What auto prefers on a GPU where nothing is tuned, and why. Not measured: expected from the
# kernels' design.
ON_GPU = {
    "gather_patches": ("cuda", "copies little, so its shorter launch counts"),
    "gather_sigmoid_patches": ("cuda", "works on few pixels, so its shorter launch counts"),
    "gather_attention": ("cuda", "pads K to a multiple of 16, Triton to a power of two"),
    "total_variation": ("triton", "loads 16 bytes at a time, CUDA one pixel"),
    "batch_norm_matching": ("triton", "loads 16 bytes at a time and sums without float64"),
    "adam_clamp_": ("cuda", "works on few patches once an iteration, so its shorter launch counts"),
}
# When the preferred one can't run, the others follow in the order of BACKENDS.
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


def resolve(name: str) -> str:
    """The backend that a name asks for: for "auto" that of ``SMI_FAST_BACKEND`` when it is set.

    Raises:
        BackendUnavailable: for an unknown name.
    """
    return check_name(DEFAULT if name == AUTO else name)


def by_name(name: str) -> Backend:
    """The backend of this name, one of :data:`BACKENDS`."""
    return next(backend for backend in BACKENDS if backend.name == name)


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    name: str = AUTO,
    attention: AttentionSize | None = None,
) -> Backend:
    """The backend that runs an op.

    Args:
        op: one of :data:`OPS`.
        device: of the tensors.
        dtype: of the floating point tensors.
        name: a backend, or "auto": ``SMI_FAST_BACKEND`` when that is set; else on a GPU the
            fastest one for each call, named "tuned", and elsewhere the first that can.
        attention: the size of a call of gather_attention, for which a backend may be too small.

    Raises:
        BackendUnavailable: when the named backend, or every one, can't; with the reasons.
    """
    wanted = resolve(name)
    reasons, able = [], []
    for backend in _ORDER[op]:
        if wanted in (AUTO, backend.name):
            reason = backend.why_not(op, device, dtype)
            if reason is None and attention is not None:
                reason = backend.too_large(attention, device, dtype)
            if reason is None:
                able.append(backend)
            else:
                reasons.append(f"{backend.name}: {reason}")
    fast = tuple(backend for backend in able if backend.name != "reference")
    ways = len(fast) + (op == "gather_attention" and any(b.name == "triton" for b in fast))
    if wanted == AUTO and ways > 1 and tuning.is_on(device):
        return _tuned(fast, device)
    if able:
        return able[0]
    raise BackendUnavailable(
        f"no backend can run {op} on {device} in {dtype}: {'; '.join(reasons)}"
    )


def name_or_reason(op: str, device: torch.device) -> str:
    """The name of the backend that "auto" takes for an op in float32, or why there is none."""
    try:
        return choose(op, device, torch.float32).name
    except BackendUnavailable as error:
        return str(error)


def step_kernels(step: str, device: torch.device, dtype: torch.dtype, name: str) -> Any:
    """The Triton kernels for a step of an iteration that is none of :data:`OPS`; None where PyTorch
    computes it: under a compiler, on another device, or where another backend is asked for.
    """
    if torch.compiler.is_compiling() or resolve(name) not in (AUTO, "triton"):
        return None
    triton = by_name("triton")
    return triton.functions if triton.why_not(step, device, dtype) is None else None


def report(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """For each backend the first reason that keeps it from running an op on a device, or None."""
    return {
        backend.name: next(filter(None, (backend.why_not(op, device, dtype) for op in OPS)), None)
        for backend in BACKENDS
    }
