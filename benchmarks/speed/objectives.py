"""The parts of losses that only read statistics, by ours and by the published formulas in PyTorch.

BatchNorm matching is that of every BatchNorm layer of EfficientNet-Lite0 at 224 px, forward and
backward, convolutions and activations left out: each layer gets an input and the gradient of its
output. Patch-similarity entropy is that of 12 blocks of DeiT-S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.harness.environment import record
from benchmarks.harness.memory import in_a_process_of_its_own, peak
from benchmarks.harness.timing import alternate, clocked, rounded, spread
from smi_fast import SparseViT, ops
from smi_fast.objectives.patch_similarity import similarity_entropy

BATCH, SIDE = 8, 224
BLOCKS, PATCHES, HEAD_WIDTH = 12, 196, 64
ROUNDS, ENTROPY_ROUNDS = 30, 3

# Value and gradients of a contender.
Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """A BatchNorm, an input of its size and the gradient of its output."""

    norm: nn.BatchNorm2d
    x: Tensor
    grad: Tensor


def layers(batch: int = BATCH, side: int = SIDE) -> list[Layer]:
    """Those of EfficientNet-Lite0 with random weights: what they are costs no time."""
    torch.manual_seed(0)
    cnn = timm.create_model("tf_efficientnet_lite0").eval().requires_grad_(False)
    found: list[Layer] = []

    def take(norm: nn.BatchNorm2d, given: tuple[Tensor]) -> None:
        plain = nn.BatchNorm2d(norm.num_features, norm.eps).eval().requires_grad_(False)
        plain.running_var.uniform_(0.5, 1.5)
        x = torch.randn(batch, *given[0].shape[1:])
        found.append(Layer(plain, x.requires_grad_(), torch.randn_like(x)))

    for module in cnn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(take)
    with torch.no_grad():
        cnn(torch.zeros(1, 3, side, side))
    return found


def _backward(of: Sequence[Layer], outputs: list[Tensor], distances: list[Tensor]) -> Result:
    loss = torch.stack(distances).sum()
    inputs, grads = [layer.x for layer in of], [layer.grad for layer in of]
    gradients = torch.autograd.grad([loss, *outputs], inputs, [torch.ones(()), *grads])
    return loss.detach(), *gradients


def hooked(of: Sequence[Layer]) -> Callable[[], Result]:
    """As published (arXiv 1912.08795): a hook on each layer takes mean and variance once more."""
    distances: list[Tensor] = []

    def hook(norm: nn.BatchNorm2d, given: tuple[Tensor], _: Tensor) -> None:
        x = given[0]
        mean = x.mean([0, 2, 3])
        channels = x.permute(1, 0, 2, 3).contiguous().view([x.shape[1], -1])
        var = channels.var(1, unbiased=False)
        distances.append(torch.norm(norm.running_var - var) + torch.norm(norm.running_mean - mean))

    for layer in of:
        layer.norm.register_forward_hook(hook)

    def run() -> Result:
        distances.clear()
        return _backward(of, [layer.norm(layer.x) for layer in of], distances)

    return run


def fused(of: Sequence[Layer]) -> Result:
    outputs, distances = [], []
    for layer in of:
        norm = layer.norm
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        y, distance = ops.batch_norm_matching(layer.x, *statistics, norm.eps)
        outputs.append(y)
        distances.append(distance)
    return _backward(of, outputs, distances)


def matching_peak(name: str, batch: int = BATCH) -> int:
    """Peak bytes of a contender that runs for the second time; all inputs are there before."""
    of = layers(batch)
    run = hooked(of) if name == "hooks" else partial(fused, of)
    hooked_or_fused = layers(1, 32)
    (hooked(hooked_or_fused) if name == "hooks" else partial(fused, hooked_or_fused))()
    return peak(run)


def batch_norm() -> dict[str, Any]:
    of = layers()
    # The hooks are on modules of their own, so that ours doesn't run them.
    plain = hooked(layers())
    ours, theirs = fused(of), plain()
    _expect_equal(ours, theirs, 1e-4)
    seconds = alternate({"hooks": clocked(plain), "ours": clocked(partial(fused, of))}, ROUNDS)
    peaks = {name: in_a_process_of_its_own(matching_peak, name) for name in seconds}
    return {
        "layers": len(of),
        "values": sum(layer.x.numel() for layer in of),
        **_compared(seconds, "hooks"),
        "peak_mb": {name: rounded(found / 1e6) for name, found in peaks.items()},
    }


def published_entropy(features: Tensor, similarities: Callable[[Tensor], Tensor]) -> Tensor:
    """Of features [B, N, D], as in PSAQ-ViT's code (arXiv 2203.02250)."""
    batch = len(features)
    flat = similarities(features).reshape(batch, -1)
    points = torch.linspace(flat.min().item(), flat.max().item(), 10, dtype=flat.dtype)
    points = points.repeat(batch, 1)
    difference = points.view(batch, 10, 1) - flat.view(batch, 1, -1)
    kernel = torch.exp(-torch.pow(difference, 2) / (2 * 0.01**2))
    density = (kernel / math.sqrt(2 * math.pi * 0.01**2)).mean(dim=-1) + 1e-4
    return torch.trapz(-density * torch.log(density), points, dim=-1).mean()


def by_broadcast(features: Tensor) -> Tensor:
    """Cosine similarities as published."""
    return torch.cosine_similarity(features.unsqueeze(1), features.unsqueeze(2), dim=3)


def by_product(features: Tensor) -> Tensor:
    """The same from one matrix product, which the published code could have used."""
    unit = torch.nn.functional.normalize(features, dim=-1, eps=1e-8)
    return unit @ unit.mT


def untrained_features(batch: int) -> list[Tensor]:
    """Of every block of DeiT-S with random weights, on noise: nearly alike."""
    torch.manual_seed(0)
    sparse = SparseViT(timm.create_model("deit_small_patch16_224"))
    taps = [f"attention.{block}.output" for block in range(sparse.depth)]
    with torch.no_grad():
        tapped = sparse(torch.randn(batch, 3, SIDE, SIDE), taps=taps).taps
    return [tapped[tap][:, 1:].mean(2) for tap in taps]


def varied_features(batch: int) -> list[Tensor]:
    """Similarities spread over half of their range, as a trained network's are."""
    torch.manual_seed(0)
    common = 0.7 * torch.randn(BLOCKS, batch, 1, HEAD_WIDTH)
    return list(common + torch.randn(BLOCKS, batch, PATCHES, HEAD_WIDTH))


def _with_gradients(entropy: Callable[[Tensor], Tensor], features: list[Tensor]) -> Result:
    given = [feature.detach().requires_grad_() for feature in features]
    total = torch.stack([entropy(feature) for feature in given]).sum()
    return total.detach(), *torch.autograd.grad(total, given)


def entropy(features: list[Tensor], rounds: int) -> dict[str, Any]:
    plain = partial(published_entropy, similarities=by_broadcast)
    # One image in float64: the broadcast takes [N, N, D] of memory for each.
    exact = [feature[:1].double() for feature in features]
    errors = _errors(_with_gradients(similarity_entropy, exact), _with_gradients(plain, exact))
    formulas = {
        "published": plain,
        "published_by_product": partial(published_entropy, similarities=by_product),
        "ours": similarity_entropy,
    }
    runs = {n: clocked(partial(_with_gradients, f, features)) for n, f in formulas.items()}
    for run in runs.values():
        run()
    return {
        "batch": len(features[0]),
        **_compared(alternate(runs, rounds), "published", "published_by_product"),
        "float64_error_of_value": rounded(errors[0]),
        "float64_error_of_gradient": rounded(max(errors[1:])),
    }


def _errors(got: Result, expected: Result) -> list[float]:
    """Of each tensor the greatest difference, over the greatest value expected."""
    pairs = zip(got, expected, strict=True)
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


def _expect_equal(got: Result, expected: Result, tolerance: float) -> None:
    worst = max(_errors(got, expected))
    assert worst < tolerance, f"expected the same values and gradients, they differ by {worst}"


def _compared(seconds: dict[str, list[float]], *slower: str) -> dict[str, Any]:
    """Seconds of each contender, and how many times faster ours is, round by round."""
    return {
        "seconds": {name: spread(samples) for name, samples in seconds.items()},
        "times_faster_than": {
            name: spread([a / b for a, b in zip(seconds[name], seconds["ours"], strict=True)])
            for name in slower
        },
    }


def main() -> None:
    record(
        "objectives",
        {
            "batch_norm_matching": {"batch": BATCH, "rounds": ROUNDS, **batch_norm()},
            "patch_similarity": {
                "blocks": BLOCKS,
                "patches": PATCHES,
                "rounds": ENTROPY_ROUNDS,
                "untrained": entropy(untrained_features(BATCH), ENTROPY_ROUNDS),
                "varied": entropy(varied_features(BATCH), ENTROPY_ROUNDS),
            },
        },
    )
