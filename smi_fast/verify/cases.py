"""Calls of every op that kernels are checked on, and the error that they may have.

The tests and ``smi-fast verify`` share this grid: odd sizes, jitter of either sign, strided and
expanded arguments, ragged and empty sets, numbers far from zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from smi_fast.engine import reference as engine_reference
from smi_fast.ops import reference
from smi_fast.ops.backends import Backend
from smi_fast.ops.limits import AttentionSize

# Every op's specification by its name.
SPECIFICATION = SimpleNamespace(**{**vars(engine_reference), **vars(reference)})

# They copy numbers, so they must copy all of their bits.
EXACT = ("gather_patches", "gather_patches_backward")

# The arguments that an op changes.
CHANGED = {
    "adam_clamp_": (0, 2, 3),
    "add_normalize_": (0, 4, 5),
    "normalize_backward_": (0,),
    "gelu_": (0, 2),
    "multiply_": (0,),
    "attend_": (2,),
    "attend_backward_": (3,),
}


def random_kept(batch: int, count: int, total: int) -> Tensor:
    """Ascending distinct patches, another set for each image."""
    return torch.stack([torch.randperm(total)[:count].sort().values for _ in range(batch)])


@dataclass(frozen=True)
class Case:
    """One call of an op; its arguments are float32 on the CPU."""

    label: str
    op: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"

    @property
    def size(self) -> AttentionSize | None:
        """The size of a call of gather_attention, which backends may have limits for."""
        if not self.op.startswith("gather_attention"):
            return None
        gradient = self.op.endswith("_backward")
        qkv, kept = self.arguments[gradient : gradient + 2]
        return AttentionSize((qkv if kept is None else kept).shape[1], qkv.shape[4], gradient)

    def fits(self, backend: Backend, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a backend that runs the op can hold this call."""
        size = self.size
        return size is None or backend.too_large(size, device, dtype) is None

    def converted(self, dtype: torch.dtype, device: str = "cpu") -> list[Any]:
        """The arguments, where floating point tensors have another data type."""
        return [_convert(value, dtype, device) for value in self.arguments]

    def run(self, functions: Any, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """The results, or what became of the arguments that the op changes."""
        arguments = self.converted(dtype, device)
        if self.op in CHANGED:
            arguments = [_copy(value) for value in arguments]
        results = getattr(functions, self.op)(*arguments)
        if results is None:
            return [arguments[index] for index in CHANGED[self.op]]
        return [results] if isinstance(results, Tensor) else list(results)

    def errors(
        self, functions: Any, dtype: torch.dtype, device: str = "cpu"
    ) -> Iterator[tuple[float, float]]:
        """Of each result the greatest error against the reference in float64, and its budget.

        Raises:
            WrongResult: a result of another shape or data type, or a copy that isn't one.
        """
        ours = self.run(functions, dtype, device)
        eager = self.run(SPECIFICATION, dtype, device)
        exact = self.run(SPECIFICATION, torch.float64, device)
        for our, plain, true in zip(ours, eager, exact, strict=True):
            if our.shape != true.shape or our.dtype != plain.dtype:
                raise WrongResult(
                    f"{self}: expected {plain.dtype} {list(true.shape)}, "
                    f"got {our.dtype} {list(our.shape)}"
                )
            if self.op in EXACT or not our.is_floating_point():
                if not torch.equal(our, plain):
                    raise WrongResult(f"{self} isn't a copy")
            elif true.numel():
                yield _greatest(our, true), budget(plain, true)

    def check(self, functions: Any, dtype: torch.dtype, device: str = "cpu") -> None:
        """Raises WrongResult when a result of the kernel is out of its budget."""
        for error, allowed in self.errors(functions, dtype, device):
            if not error <= allowed:  # nan is out of it too
                raise WrongResult(f"{self}: error {error:.3g}, budget {allowed:.3g}")


class WrongResult(ArithmeticError):
    """A kernel computes something else than the reference."""


def budget(eager: Tensor, exact: Tensor) -> float:
    """The greatest error that a kernel may have: twice that of eager PyTorch in its precision.

    Relative to the greatest number it may be one rounding, or the noise of sums in float32 in
    another order, which a lucky rounding of eager would otherwise forbid; and 1e-12 in float64,
    which eager defines.
    """
    eps = {dtype: torch.finfo(dtype).eps for dtype in (eager.dtype, torch.float32)}
    floor = max(eps[eager.dtype] / 2, 4 * eps[torch.float32])
    if eager.dtype == torch.float64:
        floor = 1e-12
    return 2 * _greatest(eager, exact) + floor * float(exact.abs().max())


def _greatest(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).abs().max())


def _convert(value: Any, dtype: torch.dtype, device: str) -> Any:
    """In another precision and place, an expanded tensor still expanded."""
    if not isinstance(value, Tensor):
        return value
    wanted = dtype if value.is_floating_point() else value.dtype
    if value.numel() and 0 in value.stride():
        kept = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())
        return value[kept].to(device, wanted).expand_as(value)
    return value.to(device, wanted)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def strided(tensor: Tensor) -> Tensor:
    """The same values with the order of dimensions in memory reversed."""
    back = tuple(reversed(range(tensor.dim())))
    return tensor.permute(back).contiguous().permute(back)


def expanded(tensor: Tensor) -> Tensor:
    """Equal images of a batch that share their memory."""
    return tensor[:1].expand_as(tensor)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    return {"strided": strided(tensor), "expanded": expanded(tensor)}


def gather_patches_cases() -> Iterator[Case]:
    def pair(
        label: str, images: Tensor, kept: Tensor, jitter: tuple[int, int, bool], size: int
    ) -> Iterator[Case]:
        shift, flip = torch.tensor(jitter[:2]), torch.tensor(jitter[2])
        yield Case(label, "gather_patches", (images, kept, shift, flip, size))
        grad = torch.randn(*kept.shape, images.shape[1] * size**2)
        sides = images.shape[2:]
        for layout, values in {"dense": grad, **layouts(grad)}.items():
            arguments = (values, kept, shift, flip, size, *sides)
            yield Case(f"{label}-{layout}", "gather_patches_backward", arguments)

    jitters = [(0, 0, False), (5, -3, True), (-40, 33, False), (123, -77, True)]
    for size in (7, 8, 14, 16, 32):
        for index, (rows, columns) in enumerate(((4, 4), (3, 5), (6, 2), (1, 1))):
            images = torch.randn(2, 3, rows * size, columns * size)
            count = (1, 6, 12, 1)[index]
            kept = random_kept(2, count, rows * columns)
            label = f"{size}-{rows}x{columns}-{count}"
            yield from pair(label, images, kept, jitters[index], size)
    images, kept = torch.randn(2, 3, 24, 40), random_kept(2, 5, 15)
    for layout, values in layouts(images).items():
        yield from pair(layout, values, strided(kept), (3, -9, True), 8)
    empty = torch.zeros(0, 5, dtype=torch.int64)
    yield from pair("no-images", images[:0], empty, (3, -9, True), 8)
    yield from pair("no-patches", images, kept[:, :0], (3, -9, True), 8)


def gather_attention_cases() -> Iterator[Case]:
    def pair(
        label: str, qkv: Tensor, kept: Tensor | None, lengths: Tensor | None
    ) -> Iterator[Case]:
        if kept is None or kept.shape[1]:
            yield Case(label, "gather_attention", (qkv, kept, lengths, True))
        yield Case(f"{label}-plain", "gather_attention", (qkv, kept, lengths, False))
        batch, tokens, _, heads, width = qkv.shape
        grad = torch.randn(batch, tokens if kept is None else kept.shape[1], heads * width)
        for layout, values in {"dense": grad, **layouts(grad)}.items():
            yield Case(
                f"{label}-{layout}", "gather_attention_backward", (values, qkv, kept, lengths)
            )

    for count in (1, 2, 46, 47, 66, 137, 196, 197):
        for width in (8, 32, 64, 72, 80) if count in (2, 47) else (64,):
            label, qkv = f"{count}-{width}", torch.randn(2, count, 3, 2, width)
            yield from pair(label, qkv, None, None)
            more = torch.randn(2, count + 9, 3, 2, width)
            yield from pair(f"{label}-kept", more, random_kept(2, count, count + 9), None)
    qkv, kept = torch.randn(4, 99, 3, 3, 16), random_kept(4, 66, 99)
    lengths = torch.tensor([66, 0, 1, 49])
    yield from pair("ragged", qkv, kept, lengths)
    yield from pair("ragged-all", qkv, None, torch.tensor([99, 0, 200, 48]))
    yield from pair("none", qkv, kept, torch.zeros(4, dtype=torch.int64))
    for layout, values in layouts(qkv).items():
        yield from pair(layout, values, strided(kept), lengths)
    yield from pair("large-scores", 20 * qkv, kept, lengths)
    yield from pair("no-images", qkv[:0], kept[:0], None)
    yield from pair("no-tokens", qkv, kept[:, :0], None)


def total_variation_cases() -> Iterator[Case]:
    def pair(label: str, images: Tensor, kept: Tensor | None, size: int) -> Iterator[Case]:
        yield Case(label, "total_variation", (images, kept, size))
        parts = reference.total_variation(images, kept, size)
        grads = torch.tensor(0.7), torch.tensor(-1.3)
        yield Case(label, "total_variation_backward", (*grads, images, kept, size, parts))

    for height, width in ((1, 1), (1, 9), (9, 1), (2, 2), (7, 33), (65, 67), (224, 224)):
        yield from pair(f"{height}x{width}", torch.randn(2, 3, height, width), None, 1)
    for size, (rows, columns), count in (
        *((7, (4, 4), 5), (8, (3, 5), 1), (14, (5, 3), 9), (16, (14, 14), 46), (32, (2, 3), 6)),
        *((1, (6, 7), 20), (2, (6, 7), 20), (16, (1, 1), 1), (5, (1, 8), 3)),
    ):
        images = torch.randn(2, 3, rows * size, columns * size)
        kept = random_kept(2, count, rows * columns)
        yield from pair(f"{size}-{rows}x{columns}-{count}", images, kept, size)
    images, kept = torch.randn(2, 3, 24, 40), random_kept(2, 6, 15)
    for layout, values in layouts(images).items():
        yield from pair(layout, values, strided(kept), 8)
        yield from pair(f"{layout}-all", values, None, 1)
    yield from pair("constant", torch.ones_like(images), kept, 8)
    yield from pair("no-images", images[:0], None, 1)
    yield from pair("no-patches", images, kept[:, :0], 8)


def batch_norm_matching_cases() -> Iterator[Case]:
    def pair(label: str, x: Tensor) -> Iterator[Case]:
        mean, bias, offset, slope = torch.randn(4, x.shape[1])
        var, weight = torch.rand(2, x.shape[1]) + 0.5
        yield Case(label, "batch_norm_matching", (x, mean, var, weight, bias, 1e-5))
        for layout, grad in {
            "dense": torch.randn(x.shape),
            **layouts(torch.randn(x.shape)),
        }.items():
            arguments = (grad, x, var, weight, 1e-5, offset, slope)
            yield Case(f"{label}-{layout}", "batch_norm_matching_backward", arguments)

    for shape in ((1, 1, 1, 1), (3, 5, 7, 7), (2, 3, 33, 65), (8, 64, 14, 14), (2, 2, 1, 1024)):
        yield from pair("x".join(map(str, shape)), torch.randn(shape) * 3 + 1)
    x = torch.randn(3, 5, 14, 15)
    outlier = x.clone()
    outlier[:, :, 0, 0] = 1e4
    for layout, values in {**layouts(x), "far": x + 1e3, "outlier": outlier}.items():
        yield from pair(layout, values)


def adam_clamp_cases() -> Iterator[Case]:
    def case(label: str, images: Tensor, grad: Tensor, kept: Tensor | None, size: int) -> Case:
        moments = [torch.randn(images.shape), torch.rand(images.shape)]
        if label == "strided":
            moments = [strided(moment) for moment in moments]
        bounds = torch.tensor([-1.5, -1.0, -2.0]), torch.tensor([0.5, 1.0, 0.25])
        step = (torch.tensor(3), 0.25, 0.5, 0.99)
        return Case(label, "adam_clamp_", (images, grad, *moments, *step, *bounds, kept, size))

    for size, (rows, columns) in (
        (7, (4, 4)),
        (8, (3, 5)),
        (14, (6, 2)),
        (16, (14, 14)),
        (32, (2, 3)),
    ):
        images, grad = torch.randn(2, 2, 3, rows * size, columns * size)
        kept = random_kept(2, rows * columns // 2, rows * columns)
        yield case(f"{size}-{rows}x{columns}", images, grad, kept, size)
        yield case(f"{size}-{rows}x{columns}-all", images, grad, None, 1)
    images, grad = torch.randn(2, 2, 3, 24, 40)
    yield case("strided", strided(images), strided(grad), random_kept(2, 6, 15), 8)
    yield case("expanded", images, expanded(grad), None, 1)
    yield case("no-images", images[:0], grad[:0], None, 1)
    yield case("no-patches", images, grad, random_kept(2, 0, 15), 8)


def all_cases() -> list[Case]:
    """The whole grid, the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [
            *gather_patches_cases(),
            *gather_attention_cases(),
            *total_variation_cases(),
            *batch_norm_matching_cases(),
            *adam_clamp_cases(),
        ]


def block_cases() -> list[Case]:
    """The parts of a block that the engine of the CPU runs, the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(_block_cases())


def _block_cases() -> Iterator[Case]:
    for rows, width in ((1, 1), (3, 7), (47, 64), (94, 192), (50, 385), (0, 8)):
        x, added, grad, empty = torch.randn(4, rows, width)
        bias, label, rstd = torch.randn(width), f"{rows}x{width}", torch.rand(rows)
        yield Case(label, "add_normalize_", (x + 1, added, bias, 1e-6, empty, rstd))
        yield Case(f"{label}-first", "add_normalize_", (3 * x, None, None, 1e-5, empty, rstd))
        yield Case(label, "normalize_backward_", (added, grad, x, rstd))
        yield Case(label, "gelu_", (3 * x, bias, empty))
        yield Case(label, "multiply_", (added, grad))
    far = torch.tensor([[-200.0, -15.0, -9.0, -1e-3, 0.0, 1e-3, 9.0, 15.0, 200.0]])
    yield Case("far", "gelu_", (far, torch.zeros(9), torch.empty_like(far)))
    for count, width in ((1, 64), (2, 8), (47, 64), (66, 72), (197, 32), (0, 8)):
        qkv, q_bias = torch.randn(2, count, 3, 2, width), torch.randn(2 * width)
        out, grad = torch.randn(2, 2 * count, 2 * width).unflatten(1, (2, count))
        label = f"{count}-{width}"
        yield Case(label, "attend_", (qkv, q_bias, out))
        yield Case(label, "attend_backward_", (grad, qkv, q_bias, torch.empty_like(qkv)))
    for rows, count, width in ((1, 1, 64), (1, 47, 64), (2, 48, 24), (3, 197, 33)):
        q, grad = torch.randn(2, 2, rows, 3 * width)
        q_bias, kv = torch.randn(3 * width), torch.randn(2, count, 2, 3, width)
        shares = torch.randn(2, 3, rows, count).softmax(dim=-1)
        label = f"{rows}-{count}-{width}"
        yield Case(label, "attend_rows", (q, q_bias, kv))
        yield Case(label, "attend_rows_backward", (grad, q, q_bias, kv, shares))
