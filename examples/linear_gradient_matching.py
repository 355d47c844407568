"""Distil a labelled data set into one image a class: Linear Gradient Matching (arXiv 2511.16674).

A random linear head on a frozen encoder gets nearly the same gradient from the few images as from
the whole set. That gradient has a closed form, so nothing is differentiated twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import smi_fast
from smi_fast import LossInputs, Objective

CLASSES, PER_CLASS, HEADS = 4, 16, 64


def head_gradient(features: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """Gradient [classes, D] of the cross-entropy of ``features @ head.T`` for the head."""
    wrong = (features @ head.T).softmax(1) - F.one_hot(labels, len(head))
    return wrong.T @ features / len(features)


class GradientMatching(Objective):
    """One minus the cosine of the two gradients, for another random head in each iteration."""

    name, weight = "gradient_matching", 1.0

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def begin(self, teacher, batch, generator) -> None:  # type: ignore[no-untyped-def]
        shape = (HEADS, int(self.labels.max()) + 1, self.features.shape[1])
        self.heads = torch.randn(shape, generator=generator).to(self.features) / shape[2] ** 0.5

    def __call__(self, inputs: LossInputs) -> Tensor:
        head = self.heads[inputs.iteration_tensor % HEADS]
        real = head_gradient(self.features, self.labels, head)
        ours = head_gradient(inputs.logits, inputs.targets, head)
        return 1 - F.cosine_similarity(real.flatten(), ours.flatten(), dim=0)


def stripes(labels: Tensor, side: int = 64) -> Tensor:
    """A stand-in for a data set: noisy stripes [B, 3, side, side], whose angle is the class."""
    angle = (labels * torch.pi / CLASSES)[:, None, None]
    y, x = torch.meshgrid(2 * [torch.linspace(-1, 1, side)], indexing="ij")
    phase = 6 * torch.rand(len(labels), 1, 1)
    wave = torch.sin(12 * (x * angle.cos() + y * angle.sin()) + phase)[:, None]
    return wave * torch.rand(len(labels), 3, 1, 1) + 0.3 * torch.randn(len(labels), 3, side, side)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=200)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    vit = smi_fast.load_teacher("fashion-canvas")
    vit.reset_classifier(0)  # an encoder: its output is an embedding
    encoder, labels = smi_fast.SparseViT(vit), torch.arange(CLASSES).repeat_interleave(PER_CLASS)
    with torch.no_grad():
        train, test = encoder(stripes(labels)).logits, encoder(stripes(labels)).logits
    inverter = smi_fast.SparseInverter(
        encoder, objectives=[GradientMatching(train, labels)], iterations=options.iterations,
        parametrization=smi_fast.Pyramid(), lr=0.05, schedule=smi_fast.Dense(), copies=2,
    )  # fmt: skip
    result = inverter.invert(torch.arange(CLASSES), generator=torch.Generator().manual_seed(0))
    values = result.history["gradient_matching"]
    nearest = (F.normalize(test, dim=1) @ F.normalize(result.logits, dim=1).T).argmax(1)
    print(f"1 - cosine of the gradients: {values[0]:.3f} -> {min(values[-10:]):.3f}")
    print(f"new images nearest to the one of their class: {(nearest == labels).float().mean():.0%}")


if __name__ == "__main__":
    main()
