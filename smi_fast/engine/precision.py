"""The precision of the matrix products in an engine."""

from __future__ import annotations

import torch

FLOAT32 = "float32"
BFLOAT16 = "bfloat16"
PRECISIONS = (FLOAT32, BFLOAT16)


def check_precision(name: str) -> str:
    """The name, when there is such a precision.

    Raises:
        ValueError: for any other name, listing the ones there are.
    """
    if name not in PRECISIONS:
        raise ValueError(f"expected precision {' or '.join(PRECISIONS)}, got {name!r}")
    return name


def described(precision: str, weights: torch.dtype) -> str:
    """The data type of products, in words: float32 leaves them in that of the weights."""
    return str(weights).removeprefix("torch.") if precision == FLOAT32 else precision


def stored_type(precision: str) -> torch.dtype | None:
    """The data type of what products read and write; None for that of the weights."""
    return torch.bfloat16 if precision == BFLOAT16 else None
