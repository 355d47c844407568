"""What :mod:`test_runs` runs in processes of its own: whole iterations on Triton kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast import (
    CrossEntropy,
    L2Norm,
    Pixels,
    SparseInverter,
    SparseViT,
    StopSchedule,
    TotalVariation,
    recipes,
)
from smi_fast.engine.schemas import TRITON_STEPS
from smi_fast.inversion.result import InversionResult
from smi_fast.ops import backends
from smi_fast.ops.schemas import _SCHEMAS, TRITON, triton_kernel
from smi_fast.schedules import Dense, Selection
from tests.helpers.host_guard import HostGuard
from tests.helpers.launches import Launches

SPACE = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
_library = torch.library.Library("smi_fast", "IMPL")


def _set_up(**attributes: Any) -> None:
    """The Triton backend takes any device, and has other attributes."""
    (triton,) = (backend for backend in backends.BACKENDS if backend.name == "triton")
    for name, value in {"why_not": lambda *_: None, **attributes}.items():
        object.__setattr__(triton, name, value)


def vision_transformer(dtype: torch.dtype = torch.float32, **shape: Any) -> VisionTransformer:
    """A small one, unless its shape is given."""
    small = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**small, "num_classes": 5, **shape}).to(dtype)


def inverter(backend: str, dtype: torch.dtype) -> SparseInverter:
    """Three iterations with a stop before the last, and every objective that has kernels."""
    torch.manual_seed(1)
    return SparseInverter(
        vision_transformer(dtype),
        objectives=[CrossEntropy(), TotalVariation(1e-3), TotalVariation(0.1, "l1"), L2Norm()],
        parametrization=Pixels(),
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
    from tests.backends.triton import guard

    guard.install()
    _set_up()
    for name in (
        *_SCHEMAS,
        *TRITON_STEPS,
    ):  # tensors of the CPU, whose kernels the interpreter runs
        _library.impl(name + TRITON, triton_kernel(name), "CPU")
    launches = guard.MEMORY.launches
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


def launches(backend: str, kept: int, precision: str = "float32") -> Counter[str]:
    """Counts the kernels of one unscored iteration of DeiT-T, which may not wait for the host.

    An iteration before it folds the weights.

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
    # Kernels that only count compute nothing that a probe could compare.
    options = {"backend": backend, "precision": precision, "probe": False}
    teacher = SparseViT(vision_transformer(**deit), **options)
    options = recipes.smi().options(schedule=Dense(), backend=backend, **SPACE)
    run = SparseInverter(teacher, **options)
    state = run.start([1, 4])
    state.keep(Selection(state.kept[:, :kept].contiguous()))
    with counter:
        state.step()
    counter.kernels.clear()
    with HostGuard(), counter:
        state.step()
    return counter.kernels
