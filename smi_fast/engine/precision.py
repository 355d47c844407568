"""The precision of the matrix products in an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FLOAT32 = "float32"
TF32 = "tf32"
BFLOAT16 = "bfloat16"
PRECISIONS = (FLOAT32, TF32, BFLOAT16)
# TF32 is a format of the tensor cores of GPUs alone.
ON_CPU = (FLOAT32, BFLOAT16)


def check_precision(name: str) -> str:
    """The name, when there is such a precision.

    Raises:
        ValueError: for any other name, listing the ones there are.
    """
    if name not in PRECISIONS:
        raise ValueError(
            f"expected precision {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, got {name!r}"
        )
    return name


def described(precision: str, weights: torch.dtype) -> str:
    """The data type of products, in words: float32 leaves them in that of the weights."""
    return str(weights).removeprefix("torch.") if precision == FLOAT32 else precision


def stored_type(precision: str) -> torch.dtype | None:
    """The data type of what products read and write; None for that of the weights."""
    return torch.bfloat16 if precision == BFLOAT16 else None


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Products on a GPU have this precision, and sums of float32, whatever the process has allowed.

    The settings are torch's own, of the whole process, and are restored.
    """
    settings = torch.backends.cuda.matmul
    float32, reduces = settings.fp32_precision, settings.allow_bf16_reduced_precision_reduction
    try:
        settings.fp32_precision = "tf32" if precision == TF32 else "ieee"
        if reduces:
            settings.allow_bf16_reduced_precision_reduction = False
        yield
    finally:
        settings.fp32_precision = float32
        if reduces:
            settings.allow_bf16_reduced_precision_reduction = True
