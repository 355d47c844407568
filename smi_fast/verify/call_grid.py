"""The calls of every op that kernels are checked on.

They have odd sizes, jitter of either sign, strided and expanded arguments, ragged and empty sets,
and numbers far from zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import cycle

import torch
from torch import Tensor

from smi_fast.ops import reference
from smi_fast.verify.cases import OpCall, expanded, random_kept, strided

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("strided", "expanded")


def op_calls() -> list[OpCall]:
    """All calls of the ops, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [
            *_gather_patches(),
            *_gather_sigmoid_patches(),
            *_gather_attention(),
            *_total_variation(),
            *_batch_norm_matching(),
            *_adam_clamp(),
        ]


def reduced(calls: Iterable[OpCall], elements: int, layouts: bool) -> list[OpCall]:
    """A selection of calls for kernels that run slowly.

    Args:
        calls: to select from.
        elements: the most that a tensor of a call may have.
        layouts: whether to take the calls whose inputs, and not the gradient alone, are strided or
            expanded. All other calls of the selection have contiguous arguments.
    """
    return [
        call
        for call in calls
        if max(tensor.numel() for tensor in call.tensors) <= elements
        and (layouts if call.label.startswith(LAYOUTS) else not call.label.endswith(LAYOUTS))
    ]


def in_turn(calls: Iterable[OpCall]) -> list[tuple[OpCall, torch.dtype]]:
    """Calls with the data types to run them in, where all three types would take too long.

    Attention, whose kernels differ with the type, runs in float32 and in one half type; every
    other call runs in one type. The types take turns.
    """
    single = cycle(FLOATS)
    # A size has three calls of attention; the next three have a token index.
    half = cycle(3 * FLOATS[1:2] + 3 * FLOATS[2:])
    pairs = []
    for call in calls:
        attention = call.op.startswith("gather_attention")
        dtypes = (torch.float32, next(half)) if attention else (next(single),)
        pairs += [(call, dtype) for dtype in dtypes]
    return pairs


def _layouts(tensor: Tensor) -> dict[str, Tensor]:
    return dict(zip(LAYOUTS, (strided(tensor), expanded(tensor)), strict=True))


def _gather_patches() -> Iterator[OpCall]:
    def pair(
        label: str, images: Tensor, kept: Tensor, jitter: tuple[Tensor, Tensor], size: int
    ) -> Iterator[OpCall]:
        shift, flip = jitter
        yield OpCall(label, "gather_patches", (images, kept, shift, flip, size))
        grad = torch.randn(*kept.shape, images.shape[1] * size**2)
        sides = images.shape[2:]
        for layout, values in {"dense": grad, **_layouts(grad)}.items():
            arguments = (values, kept, shift, flip, size, *sides)
            yield OpCall(f"{label}-{layout}", "gather_patches_backward", arguments)

    def shared(down: int, right: int, flip: bool) -> tuple[Tensor, Tensor]:
        return torch.tensor([down, right]).expand(2, 2), torch.tensor(flip).expand(2)

    each = torch.tensor([[123, -77], [-9, 4]]), torch.tensor([True, False])
    grids = (
        *((4, 4, 1, shared(0, 0, False)), (3, 5, 6, shared(5, -3, True))),
        *((6, 2, 12, shared(-40, 33, False)), (1, 1, 1, shared(123, -77, True)), (2, 3, 4, each)),
    )
    for size in (7, 8, 14, 16, 32):
        for rows, columns, count, jitter in grids:
            images = torch.randn(2, 3, rows * size, columns * size)
            kept = random_kept(2, count, rows * columns)
            yield from pair(f"{size}-{rows}x{columns}-{count}", images, kept, jitter, size)
    images, kept = torch.randn(2, 3, 24, 40), random_kept(2, 5, 15)
    shift, flip = torch.tensor([[3, -9], [-30, 12]]), torch.tensor([True, False])
    for layout, values in _layouts(images).items():
        yield from pair(layout, values, strided(kept), (strided(shift), strided(flip)), 8)
    empty = torch.zeros(0, 5, dtype=torch.int64)
    yield from pair("no-images", images[:0], empty, (shift[:0], flip[:0]), 8)
    yield from pair("no-patches", images, kept[:, :0], (shift, flip), 8)


def _gather_sigmoid_patches() -> Iterator[OpCall]:
    def pair(
        label: str,
        field: Tensor,
        kept: Tensor,
        jitter: tuple[Tensor, Tensor],
        size: int,
        background: Tensor | None,
        frozen: Tensor | None,
    ) -> Iterator[OpCall]:
        mean, std = torch.rand(3), torch.rand(3) + 0.2
        arguments = (field, kept, *jitter, mean, std, background, frozen, size)
        yield OpCall(label, "gather_sigmoid_patches", arguments)
        grad = torch.randn(*kept.shape, 3 * size**2)
        for layout, values in {"dense": grad, **_layouts(grad)}.items():
            inputs = (values, field, kept, *jitter, std, frozen, size)
            yield OpCall(f"{label}-{layout}", "gather_sigmoid_patches_backward", inputs)

    shared = torch.tensor([5, -3]).expand(2, 2), torch.tensor(True).expand(2)
    each = torch.tensor([[123, -77], [-9, 4]]), torch.tensor([True, False])
    for size, (rows, columns), count, jitter in (
        *((7, (3, 5), 6, each), (8, (6, 2), 12, shared), (14, (2, 3), 4, each)),
        *((16, (3, 4), 5, shared), (32, (1, 1), 1, each), (5, (2, 9), 7, shared)),
    ):
        field = 3 * torch.randn(2, 3, rows * size, columns * size)
        kept = random_kept(2, count, rows * columns)
        label = f"{size}-{rows}x{columns}-{count}"
        yield from pair(label, field, kept, jitter, size, None, None)
        background, frozen = torch.randn(field.shape), torch.rand(2, rows, columns) < 0.5
        yield from pair(f"{label}-frozen", field, kept, jitter, size, background, frozen)
    field, background = 3 * torch.randn(2, 2, 3, 24, 40)
    kept, frozen = random_kept(2, 5, 15), torch.rand(2, 3, 5) < 0.5
    moved = strided(each[0]), strided(each[1])
    for (layout, values), old in zip(
        _layouts(field).items(), _layouts(background).values(), strict=True
    ):
        yield from pair(layout, values, strided(kept), moved, 8, old, strided(frozen))
    # Pixels that are nearly black or white, where e^x or e^-x overflows; and infinite and NaN ones.
    far = 40 * field
    far[0, 0, :2] = torch.tensor([300.0, -300.0])[:, None]
    yield from pair("far", far, kept, shared, 8, background, frozen)
    far = far.clone()
    far[1, 1, ::3] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0]).repeat(10)
    yield from pair("not-a-number", far, kept, shared, 8, background, frozen)
    yield from pair("no-images", field[:0], kept[:0], (each[0][:0], each[1][:0]), 8, None, None)
    yield from pair("no-patches", field, kept[:, :0], each, 8, background, frozen)


def _gather_attention() -> Iterator[OpCall]:
    def pair(
        label: str, qkv: Tensor, index: Tensor | None, lengths: Tensor | None
    ) -> Iterator[OpCall]:
        if index is None or index.shape[1]:
            yield OpCall(label, "gather_attention", (qkv, index, lengths, True))
        yield OpCall(f"{label}-plain", "gather_attention", (qkv, index, lengths, False))
        batch, tokens, _, heads, width = qkv.shape
        grad = torch.randn(batch, tokens if index is None else index.shape[1], heads * width)
        for layout, values in {"dense": grad, **_layouts(grad)}.items():
            arguments = (values, qkv, index, lengths)
            yield OpCall(f"{label}-{layout}", "gather_attention_backward", arguments)

    sizes = [(count, 64, 2 if count < 100 else 1) for count in (1, 2, 46, 47, 66, 137, 196, 197)]
    sizes += [(2, width, 2) for width in (8, 32, 72, 80, 128)]
    sizes += [(47, width, 1) for width in (8, 32, 72, 80, 128)]
    for count, width, batch in (*sizes, (137, 8, 1), (160, 80, 1), (300, 24, 1)):
        label, qkv = f"{count}-{width}", torch.randn(batch, count, 3, 2, width)
        yield from pair(label, qkv, None, None)
        more = torch.randn(batch, count + 9, 3, 2, width)
        yield from pair(f"{label}-kept", more, random_kept(batch, count, count + 9), None)
    qkv, index = torch.randn(4, 99, 3, 3, 24), random_kept(4, 66, 99)
    lengths = torch.tensor([66, 0, 1, 49])
    yield from pair("ragged", qkv, index, lengths)
    yield from pair("none", qkv, index, torch.zeros(4, dtype=torch.int64))
    for layout, values in _layouts(qkv).items():
        yield from pair(layout, values, strided(index), lengths)
    # Scores above 88, whose exponential overflows float32 unless the largest is subtracted.
    yield from pair("large-scores", 5 * qkv, index, lengths)
    yield from pair("no-images", qkv[:0], index[:0], None)
    yield from pair("no-tokens", qkv, index[:, :0], None)
    # Lengths from below zero to above the number of tokens; tokens beyond a length don't count.
    lengths = torch.tensor([19, -3, 40, 5])
    qkv = torch.randn(4, 19, 3, 2, 16)
    qkv[3, 5:] = 1e4
    yield from pair("ragged-all", qkv, None, lengths)


def _total_variation() -> Iterator[OpCall]:
    def pair(label: str, images: Tensor, active: Tensor | None, size: int) -> Iterator[OpCall]:
        yield OpCall(label, "total_variation", (images, active, size))
        sums = reference.total_variation(images, active, size)
        grads = torch.tensor(0.7), torch.tensor(-1.3)
        arguments = (*grads, images, active, size, sums)
        yield OpCall(label, "total_variation_backward", arguments)

    for height, width in ((1, 1), (1, 9), (9, 1), (2, 2), (7, 33), (65, 67), (224, 224)):
        yield from pair(f"{height}x{width}", torch.randn(2, 3, height, width), None, 1)
    for size, (rows, columns), count in (
        *((7, (4, 4), 5), (8, (3, 5), 1), (14, (5, 3), 9), (16, (14, 14), 46), (32, (2, 3), 6)),
        *((1, (6, 7), 20), (2, (6, 7), 20), (16, (1, 1), 1), (5, (1, 8), 3)),
    ):
        images = torch.randn(2, 3, rows * size, columns * size)
        active = random_kept(2, count, rows * columns)
        yield from pair(f"{size}-{rows}x{columns}-{count}", images, active, size)
    images, active = torch.randn(2, 3, 24, 40), random_kept(2, 6, 15)
    for layout, values in _layouts(images).items():
        yield from pair(layout, values, strided(active), 8)
        yield from pair(f"{layout}-all", values, None, 1)
    yield from pair("constant", torch.ones_like(images), active, 8)
    yield from pair("no-images", images[:0], None, 1)
    yield from pair("no-patches", images, active[:, :0], 8)
    yield from pair("repeated", images, torch.tensor([[3, 7, 3, 3, 0], [1, 2, 4, 8, 9]]), 8)


def _batch_norm_matching() -> Iterator[OpCall]:
    def pair(label: str, x: Tensor) -> Iterator[OpCall]:
        mean, bias, offset, slope = torch.randn(4, x.shape[1])
        var, weight = torch.rand(2, x.shape[1]) + 0.5
        yield OpCall(label, "batch_norm_matching", (x, mean, var, weight, bias, 1e-5))
        grad = torch.randn(x.shape)
        for layout, values in {"dense": grad, **_layouts(grad)}.items():
            arguments = (values, x, var, weight, 1e-5, offset, slope)
            yield OpCall(f"{label}-{layout}", "batch_norm_matching_backward", arguments)

    for shape in (
        *((1, 1, 1, 1), (3, 5, 7, 7), (2, 3, 33, 65), (8, 64, 14, 14), (2, 2, 1, 1024)),
        *((9, 1, 33, 31), (4, 300, 2, 1)),
    ):
        yield from pair("x".join(map(str, shape)), torch.randn(shape) * 3 + 1)
    x = torch.randn(3, 5, 14, 15)
    outlier = x.clone()
    outlier[:, :, 0, 0] = 1e4
    for layout, values in {**_layouts(x), "far": x + 1e3, "outlier": outlier}.items():
        yield from pair(layout, values)


def _adam_clamp() -> Iterator[OpCall]:
    def call(
        label: str,
        images: Tensor,
        grad: Tensor,
        active: Tensor | None,
        size: int,
        step: int = 3,
        betas: tuple[float, float] = (0.5, 0.99),
        lr: float = 0.25,
        weight_decay: float = 0.0,
    ) -> OpCall:
        moments = [torch.randn(images.shape), torch.rand(images.shape)]
        if label.startswith("still"):
            moments = [torch.zeros(images.shape)] * 2
        if label == "strided":
            moments = [strided(moment) for moment in moments]
        bounds = torch.tensor([-1.5, -1.0, -2.0]), torch.tensor([0.5, 1.0, 0.25])
        state = (images, grad, *moments)
        rates = (torch.tensor(step), torch.tensor(lr, dtype=torch.float64), *betas, weight_decay)
        return OpCall(label, "adam_clamp_", (*state, *rates, *bounds, active, size))

    for size, (rows, columns) in (
        *((7, (4, 4)), (8, (3, 5)), (14, (6, 2)), (16, (14, 14)), (32, (2, 3))),
    ):
        images, grad = torch.randn(2, 2, 3, rows * size, columns * size)
        active = random_kept(2, rows * columns // 2, rows * columns)
        yield call(f"{size}-{rows}x{columns}", images, grad, active, size)
        yield call(f"{size}-{rows}x{columns}-all", images, grad, None, 1)
    images, grad = torch.randn(2, 2, 3, 8, 9)
    for step in (1, 2, 40, 4000):
        for betas in ((0.5, 0.99), (0.9, 0.999), (0.5, 0.0)):
            label = f"step-{step}-{betas[0]}-{betas[1]}"
            yield call(label, images, grad, None, 1, step, betas)
    images, grad = torch.randn(2, 2, 3, 24, 40)
    for label, some, size in (("all", None, 1), ("active", random_kept(2, 6, 15), 8)):
        for lr, weight_decay in ((0.25, 0.01), (1e-3, 0.7), (0.0, 0.1)):
            yield call(
                f"decay-{lr}-{weight_decay}-{label}",
                *(images, grad, some, size),
                lr=lr,
                weight_decay=weight_decay,
            )
    yield call("strided", strided(images), strided(grad), random_kept(2, 6, 15), 8)
    yield call("expanded", images, expanded(grad), None, 1)
    yield call("no-images", images[:0], grad[:0], None, 1)
    yield call("no-patches", images, grad, random_kept(2, 0, 15), 8)
    # A pixel that is NaN, or gets a NaN, stays NaN, so that a check of the loss finds it. With a
    # gradient and moments of zero a pixel only gets clamped.
    for label, some, size in (("all", None, 1), ("active", random_kept(2, 15, 15), 8)):
        broken_images, broken_grad = images.clone(), grad.clone()
        broken_images[0, 1, 2, 3] = broken_grad[1, 2, 4, 5] = torch.nan
        yield call(f"not-a-number-{label}", broken_images, broken_grad, some, size)
        yield call(f"still-{label}", images, torch.zeros_like(grad), some, size, 1)
