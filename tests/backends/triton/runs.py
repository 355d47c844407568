"""What :mod:`test_triton_runs` runs in processes of its own: whole iterations on Triton kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from host_guard import HostGuard
from launches import Launches
from timm.models.vision_transformer import VisionTransformer

from smi_fast import CrossEntropy, L2Norm, SparseInverter, StopSchedule, TotalVariation
from smi_fast.inversion.result import InversionResult
from smi_fast.objectives import published_objectives
from smi_fast.ops import backends
from smi_fast.ops.schemas import _SCHEMAS, TRITON, triton_kernel

SPACE = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
_library = torch.library.Library("smi_fast", "IMPL")


def _set_up(**attributes: Any) -> None:
    """The Triton backend takes any device, and has other attributes."""
    (triton,) = (backend for backend in backends.BACKENDS if backend.name == "triton")
    for name, value in {"why_not": lambda *_: None, **attributes}.items():
        object.__setattr__(triton, name, value)


def inverter(backend: str, dtype: torch.dtype = torch.float32, **teacher: Any) -> SparseInverter:
    """Three iterations with a stop before the last, and every term that has kernels of its own."""
    torch.manual_seed(1)
    shape = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = VisionTransformer(**{**shape, "num_classes": 5, **teacher}).to(dtype)
    return SparseInverter(
        model,
        objectives=[CrossEntropy(), TotalVariation(1e-3), TotalVariation(0.1, "l1"), L2Norm()],
        schedule=StopSchedule((2,), (0.5,)),
        iterations=3,
        backend=backend,
        **SPACE,
    )


def _run(backend: str, dtype: torch.dtype) -> InversionResult:
    generator = torch.Generator().manual_seed(0)
    return inverter(backend, dtype).invert([1, 4], generator=generator, progress=False)


def inversion() -> dict[str, float]:
    """The greatest errors of a run on the guarded interpreter, and of eager PyTorch."""
    import triton_guard

    triton_guard.install()
    _set_up()
    for name in _SCHEMAS:  # tensors of the CPU, whose kernels the interpreter runs
        _library.impl(name + TRITON, triton_kernel(name), "CPU")
    launches = triton_guard.MEMORY.launches
    launches.clear()
    ours = _run("triton", torch.float32)
    assert launches, "no kernel was launched"
    eager, exact = _run("reference", torch.float32), _run("reference", torch.float64)
    assert torch.equal(ours.kept, exact.kept)
    for name, values in exact.history.items():
        torch.testing.assert_close(ours.history[name], values, rtol=1e-5, atol=1e-5)
    return {
        name: (run.images.double() - exact.images).abs().max().item()
        for name, run in (("triton", ours), ("eager", eager))
    }


def launches(backend: str, kept: int) -> Counter[str]:
    """Kernels of one unscored step of DeiT-T, which may not wait for the host.

    The launchers are called as they are and not as ops, so that what they do is seen.
    """
    from triton.runtime.jit import JITFunction

    from smi_fast import kernels

    counter = Launches()

    def count(kernel: Any, grid: Any) -> Any:
        return lambda *_, **__: counter.kernels.update([kernel.fn.__name__])

    JITFunction.__getitem__ = count
    _set_up(functions=kernels)
    deit = {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    run = inverter(backend, **deit)
    run.objectives = published_objectives()
    iteration = run.start([1, 4])
    iteration.kept = iteration.kept[:, :kept].contiguous()
    with HostGuard(), counter:
        iteration()
    return counter.kernels
