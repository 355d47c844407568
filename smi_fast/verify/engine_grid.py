"""The calls of the steps of a block that the C++ engine is checked on."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from smi_fast.verify.cases import OpCall


def engine_calls() -> list[OpCall]:
    """All calls of the engine's ops, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(_engine_calls())


def _engine_calls() -> Iterator[OpCall]:
    for rows, width in ((1, 1), (3, 7), (47, 64), (94, 192), (50, 385), (0, 8)):
        x, added, grad, empty = torch.randn(4, rows, width)
        bias, label, rstd = torch.randn(width), f"{rows}x{width}", torch.rand(rows)
        yield OpCall(label, "add_normalize_", (x + 1, added, bias, 1e-6, empty, rstd))
        yield OpCall(f"{label}-first", "add_normalize_", (3 * x, None, None, 1e-5, empty, rstd))
        yield OpCall(label, "normalize_backward_", (added, grad, x, rstd, empty))
        if width != 64:
            inner, rms = f"inner-{label}", f"rms-{label}"
            yield OpCall(inner, "add_normalize_", (x + 1, None, bias, 1e-6, empty, rstd))
            yield OpCall(rms, "add_normalize_", (x + 1, added, bias, 1e-6, empty, rstd, False))
            yield OpCall(rms, "normalize_backward_", (added, grad, x, rstd, empty, False))
        yield OpCall(label, "gelu_", (3 * x, bias, empty))
        for approximate in ("tanh", "sigmoid"):
            yield OpCall(f"{approximate}-{label}", "gelu_", (3 * x, bias, empty, approximate))
        yield OpCall(label, "multiply_", (added, grad))
    for rows, width in ((1, 1), (3, 7), (47, 64), (50, 171), (0, 8)):
        x, bias = torch.randn(rows, 2 * width), torch.randn(2 * width)
        grad = torch.randn(rows, width)
        label = f"{rows}x{width}"
        yield OpCall(label, "swiglu_", (3 * x, bias, torch.empty(rows, width)))
        yield OpCall(label, "swiglu_backward_", (grad, x, torch.empty(rows, 2 * width)))
    wide = torch.tensor([[-80.0, -15.0, -1e-3, 0.0, 1e-3, 15.0, 80.0, *7 * [1.5]]])
    yield OpCall("wide", "swiglu_", (wide, torch.zeros(14), torch.empty(1, 7)))
    for parts, prefix, own, width, half in (
        (3, 1, 1, 64, True),
        (3, 5, 2, 12, False),
        (3, 0, 1, 34, True),
        (2, 1, 1, 64, False),
        (2, 4, 2, 8, True),
    ):
        changed, count = parts - 1, prefix + 9
        x, bias = torch.randn(2, count, parts, 2, width), torch.randn(changed * 2 * width)
        angle = 6 * torch.rand(2, 9, own, width)
        rotation = torch.cat([angle.sin(), angle.cos()], dim=-1)
        label = f"{parts}-{prefix}-{own}-{width}-{'half' if half else 'pairs'}"
        yield OpCall(label, "rotate_", (x, bias, rotation, half))
        yield OpCall(label, "rotate_backward_", (x, changed, rotation, half))
    far = torch.tensor([[-200.0, -15.0, -9.0, -1e-3, 0.0, 1e-3, 9.0, 15.0, 200.0]])
    yield OpCall("far", "gelu_", (far, torch.zeros(9), torch.empty_like(far)))
    for approximate in ("tanh", "sigmoid"):
        arguments = (far, torch.zeros(9), torch.empty_like(far), approximate)
        yield OpCall(f"{approximate}-far", "gelu_", arguments)
    for count, width in ((1, 64), (2, 8), (47, 64), (66, 72), (197, 32), (0, 8)):
        qkv, q_bias = torch.randn(2, count, 3, 2, width), torch.randn(2 * width)
        out, grad = torch.randn(2, 2 * count, 2 * width).unflatten(1, (2, count))
        label = f"{count}-{width}"
        yield OpCall(label, "attend_", (qkv, q_bias, out))
        yield OpCall(label, "attend_backward_", (grad, qkv, q_bias, torch.empty_like(qkv)))
    offsets = torch.tensor([0, 7, 7, 66, 67])
    for width in (64, 33):
        qkv, grad = torch.randn(1, 67, 3, 2, width), torch.randn(1, 67, 2 * width)
        q_bias, out = torch.randn(2 * width), torch.empty(1, 67, 2 * width)
        label = f"ragged-{width}"
        yield OpCall(label, "attend_", (qkv, q_bias, out, offsets))
        yield OpCall(label, "attend_backward_", (grad, qkv, q_bias, torch.empty_like(qkv), offsets))
    for rows, count, width in ((1, 1, 64), (1, 47, 64), (2, 48, 24), (3, 197, 33)):
        q, grad = torch.randn(2, 2, rows, 3 * width)
        q_bias, kv = torch.randn(3 * width), torch.randn(2, count, 2, 3, width)
        probabilities = torch.randn(2, 3, rows, count).softmax(dim=-1)
        label = f"{rows}-{count}-{width}"
        yield OpCall(label, "attend_rows", (q, q_bias, kv))
        yield OpCall(label, "attend_rows_backward", (grad, q, q_bias, kv, probabilities))
    offsets = torch.tensor([0, 7, 66, 68])
    for rows, width in ((1, 64), (2, 33)):
        q, grad = torch.randn(2, 3, rows, 3 * width)
        q_bias, kv = torch.randn(3 * width), torch.randn(1, 68, 2, 3, width)
        own = torch.randn(3, rows, 68).split(offsets.diff().tolist(), dim=2)
        probabilities = torch.cat([scores.softmax(dim=-1) for scores in own], dim=2)[None]
        label = f"ragged-{rows}-{width}"
        yield OpCall(label, "attend_rows", (q, q_bias, kv, offsets))
        yield OpCall(label, "attend_rows_backward", (grad, q, q_bias, kv, probabilities, offsets))
