"""Each op, forward and backward: the C++ kernels, eager PyTorch and compiled PyTorch.

The sizes are those of DeiT-S with a batch of 8. ``bench_ops.py`` gives the same calls to
pytest-benchmark.
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
# The patches that the published schedule leaves, and all patches.
KEPT = (46, PATCHES)
ROUNDS, QUICK_ROUNDS = 30, 3

# One forward and backward pass of an op: it returns outputs and gradients.
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class OpBenchmark:
    """An op at one size.

    Attributes:
        op: its name in :mod:`smi_fast.ops`.
        label: the size.
        setup: makes the inputs, the same each time, and returns the call of an implementation.
        work: of a forward and backward pass: FLOPs, or bytes when each tensor is read or written
            once.
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
        """The implementations to compare. All of them return the same values."""
        names = ("cpp", "reference", "compiled")
        return (*names, "sdpa") if self.op == "gather_attention" else names

    def call(self, name: str) -> Call:
        """A forward and backward pass by one implementation, on its own inputs."""
        if name == "sdpa":
            return self.setup(sdpa)
        public = getattr(ops, self.op)
        if name != "compiled":
            return self.setup(partial(public, backend=name))
        # Code compiled for other sizes would count towards the limit of recompilations.
        torch.compiler.reset()
        eager = partial(public, backend="reference")
        return self.setup(torch.compile(eager, fullgraph=True, dynamic=False))


def sdpa(qkv: Tensor) -> tuple[Tensor, None]:
    """The same attention by PyTorch's fused op, with the changes of layout that it needs."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), None


def op_benchmarks(counts: tuple[int, ...] = KEPT) -> Iterator[OpBenchmark]:
    """Every op at each number of kept patches. With all patches it is called as in a dense loop."""
    image_bytes = 4 * BATCH * 3 * SIDE**2
    for count in counts:
        kept_bytes = image_bytes * count / PATCHES
        label = f"K={count}"
        # Forward reads and writes the windows. Backward reads their gradient, writes whole images.
        moved = 3 * kept_bytes + image_bytes
        yield OpBenchmark("gather_patches", label, partial(_gather_patches, count), moved)
        # Forward needs 4 N² per channel, backward twice that without the recomputed scores.
        flops = 12 * BATCH * (count + 1) ** 2 * WIDTH
        attention = partial(_gather_attention, count + 1)
        yield OpBenchmark("gather_attention", label, attention, flops, "GFLOP")
        # Forward and backward each read the kept pixels. Backward writes whole images.
        moved = 2 * kept_bytes + image_bytes
        yield OpBenchmark("total_variation", label, partial(_total_variation, count), moved)
        # The op reads four tensors and writes three.
        yield OpBenchmark("adam_clamp_", label, partial(_adam_clamp_, count), 7 * kept_bytes)
    shape = (BATCH, 64, SIDE // 2, SIDE // 2)
    # Forward reads x and writes y. Backward reads x and the gradient of y, writes that of x.
    moved = 5 * 4 * torch.Size(shape).numel()
    matching = partial(_batch_norm_matching, shape)
    yield OpBenchmark("batch_norm_matching", "64x112x112", matching, moved)


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
    images, active = _images().requires_grad_(), _kept(count)

    def call() -> tuple[Tensor, ...]:
        _, l2 = op(images, active, patch_size=PATCH)
        return l2, *torch.autograd.grad(l2, images)

    return call


def _adam_clamp_(count: int, op: Callable[..., Any]) -> Call:
    images, active = _images(), _kept(count)
    grad, moments = torch.randn_like(images), [torch.zeros_like(images) for _ in range(2)]
    low, high = -torch.ones(3), torch.ones(3)
    options = {"step": 1, "lr": 0.25, "betas": (0.5, 0.99), "low": low, "high": high}

    def call() -> tuple[Tensor, ...]:
        op(images, grad, *moments, active=active, patch_size=PATCH, **options)
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
    """Calls every implementation once and compares it with eager PyTorch.

    Raises:
        AssertionError: a value differs by more than 1e-5 of the largest one.
    """
    expected = [result.detach().clone() for result in calls["reference"]()]
    for name, call in calls.items():
        if name == "reference":
            continue
        for ours, theirs in zip(call(), expected, strict=True):
            far = (ours - theirs).abs().max().item()
            assert far <= 1e-5 * theirs.abs().max().item(), f"{name} is {far:.1e} off"


def copy(moved: float) -> Callable[[], object]:
    """A copy that reads and writes ``moved`` bytes in total."""
    source = torch.randn(round(moved / 8))
    return partial(torch.empty_like(source).copy_, source)


def measure(benchmark: OpBenchmark, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time and speed of each implementation, and the speed of sgemm or of a copy beside them."""
    calls = {name: benchmark.call(name) for name in benchmark.implementations}
    check(calls)
    contenders = {name: clocked(call) for name, call in calls.items()}
    moves_bytes = benchmark.unit == "GB"
    contenders["limit"] = clocked(copy(benchmark.work)) if moves_bytes else sgemm(SQUARE)
    timed = alternate(contenders, rounds)
    at_limit = median(timed.pop("limit"))
    work = benchmark.work / 1e9
    limit = work / at_limit if moves_bytes else at_limit
    seconds = {name: median(samples) for name, samples in timed.items()}
    return {
        "work": rounded(work),
        "unit": benchmark.unit,
        "copy_gb_per_s" if moves_bytes else "sgemm_gflops": rounded(limit),
        "ms": {name: spread([1e3 * s for s in samples]) for name, samples in timed.items()},
        f"{benchmark.unit.lower()}_per_s": {name: rounded(work / s) for name, s in seconds.items()},
        "cpp_share_of_limit": rounded(work / seconds["cpp"] / limit),
        "cpp_times_faster_than": {
            name: rounded(s / seconds["cpp"]) for name, s in seconds.items() if name != "cpp"
        },
    }


def main(quick: bool = False) -> None:
    rounds, counts = (QUICK_ROUNDS, KEPT[:1]) if quick else (ROUNDS, KEPT)
    measured = {str(each): measure(each, rounds) for each in op_benchmarks(counts)}
    record("ops", {"rounds": rounds, "ops": measured}, quick=quick)
