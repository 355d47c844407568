"""The calls of the steps of a block that the Triton kernels are checked on."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from smi_fast.verify.cases import OpCall
from smi_fast.verify.engine_grid import engine_calls

# The steps that have Triton kernels.
GPU_STEPS = (
    "add_normalize_",
    "normalize_backward_",
    "gelu_",
    "multiply_",
    "swiglu_",
    "swiglu_backward_",
    "rotate_",
    "rotate_backward_",
    "attend_rows",
    "attend_rows_backward",
    "linear_gelu_",
    "multiplied_product_",
)

# How labels begin of what no Triton kernel computes: concatenated images, and norms inside of
# attention.
_OF_CPP_ALONE = ("ragged", "inner")


def gpu_engine_calls() -> list[OpCall]:
    """The calls that the C++ kernels are checked on too, but for those of C++ alone, and more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        more = list(_more_calls())
    shared = (call for call in engine_calls() if call.op in GPU_STEPS)
    return [*(call for call in shared if not call.label.startswith(_OF_CPP_ALONE)), *more]


def _more_calls() -> Iterator[OpCall]:
    # A kernel takes whole rows, one or a few, in tiles of a power of two.
    for rows, width in ((13, 96), (5, 200), (2, 1500), (3, 2304)):
        x, added, grad, empty = torch.randn(4, rows, width)
        bias, label, rstd = torch.randn(width), f"{rows}x{width}", torch.rand(rows)
        yield OpCall(label, "add_normalize_", (x + 1, added, bias, 1e-6, empty, rstd))
        yield OpCall(label, "normalize_backward_", (added, grad, x, rstd, empty))
        yield OpCall(f"{label}-last", "normalize_backward_", (added, grad, x, rstd, None))
        yield OpCall(label, "gelu_", (3 * x, bias, empty))
        yield OpCall(label, "multiply_", (added, grad))
    for rows, inner, width in (
        *((1, 8, 8), (47, 96, 384), (94, 192, 768), (65, 200, 72), (3, 33, 65), (0, 8, 8)),
        (1100, 16, 1920),  # large tiles
    ):
        x, grad = torch.randn(2, rows, inner)
        weight, bias = torch.randn(width, inner) / inner**0.5, torch.randn(width)
        factors, out = torch.randn(2, rows, width)
        label = f"{rows}x{inner}x{width}"
        linear = x, weight, bias, torch.empty_like(out), out
        yield OpCall(label, "linear_gelu_", linear)
        for approximate in ("tanh", "sigmoid"):
            yield OpCall(f"{approximate}-{label}", "linear_gelu_", (*linear, approximate))
        yield OpCall(label, "multiplied_product_", (grad, weight.T.contiguous(), factors, out))
        yield OpCall(f"{label}-transposed", "multiplied_product_", (grad, weight.T, factors, out))
    for rows, width in ((13, 200), (9, 130)):  # more than one tile
        x, bias, grad = (
            torch.randn(rows, 2 * width),
            torch.randn(2 * width),
            torch.randn(rows, width),
        )
        label = f"{rows}x{width}"
        yield OpCall(label, "swiglu_", (3 * x, bias, torch.empty_like(grad)))
        yield OpCall(label, "swiglu_backward_", (grad, x, torch.empty_like(x)))
    for half in (True, False):  # more than one program for each token, and heads of their own
        x, bias, angle = torch.randn(2, 5, 3, 9, 64), torch.randn(1152), torch.rand(2, 4, 9, 64)
        rotation = torch.cat([(6 * angle).sin(), (6 * angle).cos()], dim=-1)
        label = f"nine-heads-{'half' if half else 'pairs'}"
        yield OpCall(label, "rotate_", (x, bias, rotation, half))
        yield OpCall(label, "rotate_backward_", (x, 2, rotation, half))
    # Scores above 88, whose exponential overflows float32 unless the largest is subtracted.
    q, q_bias, kv = 20 * torch.randn(1, 1, 64), torch.randn(64), torch.randn(1, 70, 2, 2, 32)
    yield OpCall("large-scores", "attend_rows", (q, q_bias, 5 * kv))
