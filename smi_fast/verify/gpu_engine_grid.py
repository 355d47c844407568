"""The calls of the engine's steps that the Triton kernels are checked on."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from smi_fast.engine.schemas import TRITON_STEPS
from smi_fast.ops import reference
from smi_fast.verify.cases import OpCall, random_kept, strided
from smi_fast.verify.engine_grid import engine_calls

# The steps that have Triton kernels.
GPU_STEPS = tuple(TRITON_STEPS)

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
    x, weight, bias = torch.randn(70, 40), torch.randn(200, 40) / 40**0.5, torch.randn(200)
    grad, (factors, out) = torch.randn(70, 40), torch.randn(2, 70, 200)
    for side in (64, 128):
        tiled = x, weight, bias, torch.empty_like(out), out, "none", side
        yield OpCall(f"tiles-of-{side}", "linear_gelu_", tiled)
        product = grad, weight.T.contiguous(), factors, out, side
        yield OpCall(f"tiles-of-{side}", "multiplied_product_", product)
    for rows, width in ((13, 200), (9, 130)):  # more than one tile
        x, bias = torch.randn(rows, 2 * width), torch.randn(2 * width)
        grad, label = torch.randn(rows, width), f"{rows}x{width}"
        yield OpCall(label, "swiglu_", (3 * x, bias, torch.empty_like(grad)))
        yield OpCall(label, "swiglu_backward_", (grad, x, torch.empty_like(x)))
    for half in (True, False):  # more than one program, and heads with angles of their own
        x, bias, angle = torch.randn(2, 5, 3, 9, 64), torch.randn(1152), torch.rand(2, 4, 9, 64)
        rotation = torch.cat([(6 * angle).sin(), (6 * angle).cos()], dim=-1)
        label = f"nine-heads-{'half' if half else 'pairs'}"
        yield OpCall(label, "rotate_", (x, bias, rotation, half))
        yield OpCall(label, "rotate_backward_", (x, 2, rotation, half))
    # Scores above 88, whose exponential overflows float32 unless the largest is subtracted.
    q, q_bias, kv = 20 * torch.randn(1, 1, 64), torch.randn(64), torch.randn(1, 70, 2, 2, 32)
    yield OpCall("large-scores", "attend_rows", (q, q_bias, 5 * kv))
    yield from _row_calls()
    yield from _pixel_calls()
    for shape in ((), (3,), (2, 150)):
        tables = torch.randint(-30, 30, (9, *shape, 2)), torch.rand(9, *shape) < 0.5
        lr, label = torch.rand(9, dtype=torch.float64), "x".join(map(str, (9, *shape)))
        yield OpCall(label, "rows_at", (*tables, lr, torch.tensor([7])))
    for batch, kept, prefix, width in (
        (2, 5, 1, 96),
        (3, 1, 2, 200),
        (1, 47, 5, 384),
        (2, 0, 1, 8),
    ):
        x, bias, (first, at) = (
            torch.randn(batch, kept, width),
            torch.randn(width),
            torch.randn(2, 1, prefix, width),
        )
        table, positions = torch.randn(60, width), torch.randint(60, (batch, kept))
        label = f"{batch}x{kept}x{prefix}x{width}"
        yield OpCall(label, "embed_tokens", (x, bias, first, at, table, positions))
        yield OpCall(f"{label}-plain", "embed_tokens", (x, None, first, None, None, positions))
        yield OpCall(
            f"{label}-none", "embed_tokens", (x, bias, first[:, :0], None, table, positions)
        )
    for batch, classes in ((5, 10), (47, 33), (3, 1000), (2, 5000), (0, 8)):
        logits, targets = 3 * torch.randn(batch, classes), torch.randint(classes, (batch,))
        label = f"{batch}x{classes}"
        yield OpCall(label, "cross_entropy", (logits, targets))
        yield OpCall(f"{label}-strided", "cross_entropy", (strided(logits), targets))
    yield OpCall("large-logits", "cross_entropy", (200 * torch.randn(9, 70), torch.arange(9)))


def _row_calls() -> Iterator[OpCall]:
    """Calls of what the last block has beside the others, and of the norm behind it: only its first
    rows are computed.
    """
    for batch, count, rows, width in (
        *((2, 7, 1, 96), (3, 5, 2, 200), (1, 1, 1, 64), (2, 4, 4, 40), (33, 3, 1, 384)),
        (0, 5, 1, 32),
    ):
        label = f"{batch}x{count}x{rows}x{width}"
        tokens, grad, normalized = torch.randn(3, batch, count, width)
        added, d, n, empty = torch.randn(4, batch * rows, width)
        bias, weight, shift = torch.randn(3, width)
        rstd, every = torch.rand(batch * rows), torch.rand(batch * count)
        whole = grad.flatten(0, 1), normalized.flatten(0, 1), every
        of_rows = d.unflatten(0, (batch, rows))
        for centred in (True, False):
            kind = label if centred else f"rms-{label}"
            x = tokens[:, :rows], added, bias, 1e-6
            results = empty, torch.empty_like(empty), rstd
            yield OpCall(kind, "add_normalize_rows_", (*x, *results, centred))
            into = torch.empty_like(whole[0])
            for copy in (None, torch.empty_like(into)):
                kind = kind if copy is None else f"{kind}-copy"
                call = of_rows, *whole, into, copy, centred
                yield OpCall(kind, "normalize_backward_rows_", call)
                call = d, n, rstd, weight, empty, None if copy is None else added, centred
                yield OpCall(kind, "final_norm_backward_", call)
        for moved in (shift, None):
            sums, results = (d, added, bias), (n, rstd, empty)
            final = *sums, weight, moved, 1e-6, *results, moved is not None
            yield OpCall(f"{label}-{moved is None}", "final_norm_", final)


def _pixel_calls() -> Iterator[OpCall]:
    for size, (rows, columns), count in (
        *((7, (3, 3), 4), (4, (3, 4), 5), (5, (1, 4), 3), (2, (2, 2), 0)),
    ):
        images = torch.randn(3, 2, rows * size, columns * size)
        kept = random_kept(3, count, rows * columns)
        grad, grads = torch.randn(3, count + 1, 2 * size**2)[:, 1:], torch.tensor([0.7, -1.3])
        shift, flip = torch.randint(-60, 60, (3, 2)), torch.tensor([False, True, True])
        sums = reference.total_variation(images, kept, size)
        jitter, label = (kept, shift, flip), f"{size}-{rows}x{columns}-{count}"
        yield OpCall(label, "pixel_gradient", (grad, *jitter, *grads, images, size, sums))
        jitter = kept, shift[:1].expand(3, 2), flip[1:2].expand(3)
        arguments = grad.contiguous(), *jitter, *grads, images, size, sums
        yield OpCall(f"{label}-expanded", "pixel_gradient", arguments)
