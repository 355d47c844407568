"""Objectives that read statistics: ours against the published formulas in PyTorch.

BatchNorm matching runs on all BatchNorm layers of EfficientNet-Lite0 at 224 px, forward and
backward. Convolutions and activations are left out: each layer gets an input, and the gradient of
its output. Patch-similarity entropy runs on 12 blocks of DeiT-S.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.baselines import published_losses
from benchmarks.harness.environment import record
from benchmarks.harness.memory import in_new_process, peak_bytes
from benchmarks.harness.timing import alternate, clocked, ratios, rounded, spread
from smi_fast import SparseViT, ops
from smi_fast.objectives.patch_similarity import similarity_entropy

BATCH, QUICK_BATCH, SIDE = 8, 1, 224
BLOCKS, PATCHES, HEAD_WIDTH = 12, 196, 64
ROUNDS, ENTROPY_ROUNDS = 30, 3
QUICK_ROUNDS, QUICK_ENTROPY_ROUNDS = 3, 1

# The value and the gradients of a contender.
Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """A BatchNorm layer, an input for it, and the gradient of its output."""

    norm: nn.BatchNorm2d
    x: Tensor
    grad: Tensor


def make_layers(batch: int = BATCH, side: int = SIDE) -> list[Layer]:
    """EfficientNet-Lite0's BatchNorm layers on random inputs of the sizes they have there."""
    torch.manual_seed(0)
    cnn = timm.create_model("tf_efficientnet_lite0").eval().requires_grad_(False)
    layers: list[Layer] = []

    def add_layer(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        plain = nn.BatchNorm2d(norm.num_features, norm.eps).eval().requires_grad_(False)
        plain.running_var.uniform_(0.5, 1.5)
        x = torch.randn(batch, *inputs[0].shape[1:])
        layers.append(Layer(plain, x.requires_grad_(), torch.randn_like(x)))

    for module in cnn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(add_layer)
    with torch.no_grad():
        cnn(torch.zeros(1, 3, side, side))
    return layers


def _backward(layers: Sequence[Layer], outputs: list[Tensor], distances: list[Tensor]) -> Result:
    loss = torch.stack(distances).sum()
    inputs, grads = [layer.x for layer in layers], [layer.grad for layer in layers]
    gradients = torch.autograd.grad([loss, *outputs], inputs, [torch.ones(()), *grads])
    return loss.detach(), *gradients


def hooked(layers: Sequence[Layer]) -> Callable[[], Result]:
    """A contender: BatchNorm matching by the published hooks."""
    distances = published_losses.hook_batch_norms(layer.norm for layer in layers)

    def run() -> Result:
        distances.clear()
        return _backward(layers, [layer.norm(layer.x) for layer in layers], distances)

    return run


def fused(layers: Sequence[Layer]) -> Result:
    """BatchNorm matching by our op."""
    outputs, distances = [], []
    for layer in layers:
        norm = layer.norm
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        y, distance = ops.batch_norm_matching(layer.x, *statistics, norm.eps)
        outputs.append(y)
        distances.append(distance)
    return _backward(layers, outputs, distances)


def _contender(name: str, layers: Sequence[Layer]) -> Callable[[], Result]:
    return hooked(layers) if name == "hooks" else partial(fused, layers)


def matching_peak(name: str, batch: int) -> int:
    """Peak bytes of a contender that ran before on small inputs; its own inputs don't count."""
    run = _contender(name, make_layers(batch))
    _contender(name, make_layers(1, 32))()
    return peak_bytes(run)


def batch_norm(batch: int, rounds: int) -> dict[str, Any]:
    """Time and memory of BatchNorm matching, after a check that the results are equal."""
    layers = make_layers(batch)
    # The hooks are on a copy of the layers, so that ours doesn't run them.
    runs = {"hooks": hooked(make_layers(batch)), "ours": partial(fused, layers)}
    _expect_equal(runs["ours"](), runs["hooks"](), 1e-4)
    seconds = alternate({name: clocked(run) for name, run in runs.items()}, rounds)
    peaks = {name: in_new_process(matching_peak, name, batch) for name in runs}
    return {
        "layers": len(layers),
        "values": sum(layer.x.numel() for layer in layers),
        **_compared(seconds, "hooks"),
        "peak_mb": {name: rounded(peak / 1e6) for name, peak in peaks.items()},
    }


def untrained_features(batch: int) -> list[Tensor]:
    """Features of every block of DeiT-S with random weights, on noise. They are nearly alike."""
    torch.manual_seed(0)
    sparse = SparseViT(timm.create_model("deit_small_patch16_224"))
    taps = [f"attention.{block}.output" for block in range(sparse.depth)]
    with torch.no_grad():
        tapped = sparse(torch.randn(batch, 3, SIDE, SIDE), taps=taps).taps
    return [tapped[tap][:, 1:].mean(2) for tap in taps]


def varied_features(batch: int) -> list[Tensor]:
    """Features whose similarities cover half of their range, as a trained network's do."""
    torch.manual_seed(0)
    common = 0.7 * torch.randn(BLOCKS, batch, 1, HEAD_WIDTH)
    return list(common + torch.randn(BLOCKS, batch, PATCHES, HEAD_WIDTH))


def _with_gradients(entropy: Callable[[Tensor], Tensor], features: list[Tensor]) -> Result:
    leaves = [feature.detach().requires_grad_() for feature in features]
    total = torch.stack([entropy(leaf) for leaf in leaves]).sum()
    return total.detach(), *torch.autograd.grad(total, leaves)


def entropy(features: list[Tensor], rounds: int) -> dict[str, Any]:
    """Time of patch-similarity entropy, and its error against the published formula in float64."""
    published = {
        name: partial(published_losses.similarity_entropy, similarities=similarities)
        for name, similarities in (
            ("published", published_losses.cosines_by_broadcast),
            ("published_by_product", published_losses.cosines_by_matmul),
        )
    }
    # One image is enough, since the broadcast holds [N, N, D] for each.
    exact = [feature[:1].double() for feature in features]
    expected = _with_gradients(published["published"], exact)
    value, *gradients = _errors(_with_gradients(similarity_entropy, exact), expected)
    formulas = {**published, "ours": similarity_entropy}
    runs = {n: clocked(partial(_with_gradients, f, features)) for n, f in formulas.items()}
    for run in runs.values():
        run()
    return {
        "batch": len(features[0]),
        **_compared(alternate(runs, rounds), *published),
        "float64_error_of_value": rounded(value),
        "float64_error_of_gradient": rounded(max(gradients)),
    }


def _errors(got: Result, expected: Result) -> list[float]:
    """For each tensor the largest difference, relative to the largest expected value."""
    pairs = zip(got, expected, strict=True)
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


def _expect_equal(got: Result, expected: Result, tolerance: float) -> None:
    worst = max(_errors(got, expected))
    assert worst < tolerance, f"expected the same values and gradients, they differ by {worst}"


def _compared(seconds: dict[str, list[float]], *slower: str) -> dict[str, Any]:
    """The seconds of each contender, and the ratios to ours within each round."""
    return {
        "seconds": {name: spread(samples) for name, samples in seconds.items()},
        "times_faster_than": {
            name: spread(ratios(seconds[name], seconds["ours"])) for name in slower
        },
    }


def main(quick: bool = False) -> None:
    batch = QUICK_BATCH if quick else BATCH
    rounds = QUICK_ROUNDS if quick else ROUNDS
    entropy_rounds = QUICK_ENTROPY_ROUNDS if quick else ENTROPY_ROUNDS
    record(
        "objectives",
        {
            "batch_norm_matching": {"batch": batch, "rounds": rounds, **batch_norm(batch, rounds)},
            "patch_similarity": {
                "blocks": BLOCKS,
                "patches": PATCHES,
                "rounds": entropy_rounds,
                "untrained": entropy(untrained_features(batch), entropy_rounds),
                "varied": entropy(varied_features(batch), entropy_rounds),
            },
        },
        quick=quick,
    )
