"""Loads the compiled kernels, which register themselves for the ops of :mod:`smi_fast._schemas`."""

from __future__ import annotations

import importlib

import torch  # noqa: F401  (the compiled modules find torch's libraries already loaded)


def _why_not_loaded(module: str) -> str | None:
    """Why a compiled module can't be loaded, or None when it is."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} can't be loaded ({error})"
    return None


WHY_NO_CPU = _why_not_loaded("smi_fast._C_cpu")
WHY_NO_CUDA = _why_not_loaded("smi_fast._C_cuda")
