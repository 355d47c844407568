"""Load the compiled kernels, which register themselves for the ops of their schemas."""

from __future__ import annotations

import importlib

import torch  # the compiled modules find torch's libraries already loaded


def _why_not_loaded(module: str) -> str | None:
    """Why a compiled module can't be loaded, or None when it is."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} can't be loaded ({error})"
    return None


def has_cpu_kernel(name: str) -> bool:
    """Whether the compiled module has a kernel of its own for the op ``smi_fast::name``.

    One that was built from an older version may lack it.
    """
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"smi_fast::{name}", "CPU")
    return found


WHY_NO_CPU = _why_not_loaded("smi_fast._C_cpu")
WHY_NO_CUDA = _why_not_loaded("smi_fast._C_cuda")
if WHY_NO_CUDA is not None and torch.version.cuda is None:
    WHY_NO_CUDA = f"torch {torch.__version__} is built without CUDA: {WHY_NO_CUDA}"
