"""Each op, forward and backward, by the C++ kernels, eager PyTorch and compiled PyTorch.

At DeiT-S's sizes, batch 8; as pytest-benchmark sees them in ``bench_ops.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.environment import record
from benchmarks.harness.sgemm import SQUARE, sgemm
from benchmarks.harness.timing import alternate, clocked, rounded, spread
from smi_fast import ops

BATCH, SIDE, PATCH, HEADS, WIDTH = 8, 224, 16, 6, 384
PATCHES = (SIDE // PATCH) ** 2
# What the published schedule leaves in the end, and every patch.
KEPT = (46, PATCHES)
ROUNDS = 30

# One forward and backward of an op: its outputs and gradients.
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An op at one size.

    Attributes:
        op: its name in :mod:`smi_fast.ops`.
        label: the size.
        setup: makes inputs, the same each time, and returns the call of a given implementation.
        work: bytes read and written, each once, in a forward and backward; or FLOPs.
        unit: "GB" or "GFLOP".
    """

    op: str
    label: str
    setup: Callable[[Callable[..., Any]], Call]
    work: float
    unit: str = "GB"

    def __str__(self) -> str:
        return f"{self.op} {self.label}"

    @property
    def implementations(self) -> tuple[str, ...]:
        """Names of those to compare; all of them give the same."""
        names = ("cpp", "reference", "compiled")
        return (*names, "sdpa") if self.op == "gather_attention" else names

    def call(self, name: str) -> Call:
        """A forward and backward by an implementation, with inputs of its own."""
        if name == "sdpa":
            return self.setup(sdpa)
        public = getattr(ops, self.op)
        if name != "compiled":
            return self.setup(partial(public, backend=name))
        # What was compiled for other sizes would count towards the limit of recompilations.
        torch.compiler.reset()
        eager = partial(public, backend="reference")
        return self.setup(torch.compile(eager, fullgraph=True, dynamic=False))


def sdpa(qkv: Tensor) -> tuple[Tensor, None]:
    """The same attention by PyTorch's, with the changes of layout that it needs."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), None


def cases() -> Iterator[Case]:
    """Every op. Work with all patches kept is given to an op as a dense loop gives it."""
    image_bytes = 4 * BATCH * 3 * SIDE**2
    for count in KEPT:
        kept_bytes = image_bytes * count / PATCHES
        label = f"K={count}"
        # Windows are read and written; their gradients read, and a whole image written.
        moved = 3 * kept_bytes + image_bytes
        yield Case("gather_patches", label, partial(_gather_patches, count), moved)
        # Forward 4 N² per channel, backward twice that; the scores computed again don't count.
        flops = 12 * BATCH * (count + 1) ** 2 * WIDTH
        attention = partial(_gather_attention, count + 1)
        yield Case("gather_attention", label, attention, flops, "GFLOP")
        # Read forward and backward; a whole gradient written.
        moved = 2 * kept_bytes + image_bytes
        yield Case("total_variation", label, partial(_total_variation, count), moved)
        # Four tensors are read, three written.
        yield Case("adam_clamp_", label, partial(_adam_clamp_, count), 7 * kept_bytes)
    shape = (BATCH, 64, SIDE // 2, SIDE // 2)
    # Read and written; then read with its gradient, and written.
    moved = 5 * 4 * torch.Size(shape).numel()
    yield Case("batch_norm_matching", "64x112x112", partial(_batch_norm_matching, shape), moved)


def _kept(count: int) -> Tensor | None:
    if count == PATCHES:
        return None
    return torch.stack([torch.randperm(PATCHES)[:count].sort().values for _ in range(BATCH)])


def _images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(BATCH, 3, SIDE, SIDE)


def _gather_patches(count: int, op: Callable[..., Any]) -> Call:
    images, kept = _images().requires_grad_(), _kept(count)
    if kept is None:
        kept = torch.arange(PATCHES).expand(BATCH, -1)
    shift, flip, grad = torch.tensor([5, -9]), torch.tensor(True), torch.randn(BATCH, count, 768)

    def call() -> tuple[Tensor, ...]:
        patches, positions = op(images, kept, shift, flip, patch_size=PATCH)
        return patches, positions, *torch.autograd.grad(patches, images, grad)

    return call


def _gather_attention(tokens: int, op: Callable[..., Any]) -> Call:
    torch.manual_seed(0)
    qkv = torch.randn(BATCH, tokens, 3, HEADS, WIDTH // HEADS, requires_grad=True)
    grad = torch.randn(BATCH, tokens, WIDTH)

    def call() -> tuple[Tensor, ...]:
        out, _ = op(qkv)
        return out, *torch.autograd.grad(out, qkv, grad)

    return call


def _total_variation(count: int, op: Callable[..., Any]) -> Call:
    images, kept = _images().requires_grad_(), _kept(count)

    def call() -> tuple[Tensor, ...]:
        _, l2 = op(images, kept, patch_size=PATCH)
        return l2, *torch.autograd.grad(l2, images)

    return call


def _adam_clamp_(count: int, op: Callable[..., Any]) -> Call:
    images, kept = _images(), _kept(count)
    grad, moments = torch.randn_like(images), [torch.zeros_like(images) for _ in range(2)]
    low, high = -torch.ones(3), torch.ones(3)
    options = {"step": 1, "lr": 0.25, "betas": (0.5, 0.99), "low": low, "high": high}

    def call() -> tuple[Tensor, ...]:
        op(images, grad, *moments, kept=kept, patch_size=PATCH, **options)
        return images, *moments

    return call


def _batch_norm_matching(shape: tuple[int, ...], op: Callable[..., Any]) -> Call:
    torch.manual_seed(0)
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    mean, var, weight, bias = torch.randn(4, shape[1])

    def call() -> tuple[Tensor, ...]:
        y, loss = op(x, mean, var.abs(), weight, bias)
        return y, loss, *torch.autograd.grad((y, loss), x, (grad, torch.ones_like(loss)))

    return call


def check(calls: dict[str, Call]) -> None:
    """Calls every implementation once.

    Raises:
        AssertionError: one gives something else than eager PyTorch, by more than 1e-5 of the
            largest number.
    """
    expected = [result.detach().clone() for result in calls["reference"]()]
    for name, call in calls.items():
        if name == "reference":
            continue
        for ours, theirs in zip(call(), expected, strict=True):
            far = (ours - theirs).abs().max().item()
            assert far <= 1e-5 * theirs.abs().max().item(), f"{name} is {far:.1e} off"


def copy(moved: float) -> Callable[[], object]:
    """A copy that reads and writes so many bytes in all."""
    source = torch.randn(round(moved / 8))
    return partial(torch.empty_like(source).copy_, source)


def measure(case: Case, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time and speed of each implementation, and what they are compared with."""
    calls = {name: case.call(name) for name in case.implementations}
    check(calls)
    contenders = {name: clocked(call) for name, call in calls.items()}
    contenders["best"] = clocked(copy(case.work)) if case.unit == "GB" else sgemm(SQUARE)
    timed = alternate(contenders, rounds)
    best = timed.pop("best")
    work = case.work / 1e9
    limit = median(best) if case.unit == "GFLOP" else work / median(best)
    seconds = {name: median(samples) for name, samples in timed.items()}
    return {
        "work": rounded(work),
        "unit": case.unit,
        "sgemm_gflops" if case.unit == "GFLOP" else "copy_gb_per_s": rounded(limit),
        "ms": {name: spread([1e3 * s for s in samples]) for name, samples in timed.items()},
        f"{case.unit.lower()}_per_s": {name: rounded(work / s) for name, s in seconds.items()},
        "cpp_share_of_limit": rounded(work / seconds["cpp"] / limit),
        "cpp_times_faster_than": {
            name: rounded(s / seconds["cpp"]) for name, s in seconds.items() if name != "cpp"
        },
    }


def main() -> None:
    record("ops", {"rounds": ROUNDS, "ops": {str(case): measure(case) for case in cases()}})
