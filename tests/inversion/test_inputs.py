"""What an inversion refuses, each in one sentence."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import (
    BinaryCrossEntropy,
    CrossEntropy,
    Jitter,
    LossInputs,
    Objective,
    SparseViT,
    StopSchedule,
    TotalVariation,
)
from tests.helpers.inversions import TARGETS, make, run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "black"}, "background frozen or regularized, got 'black'"),
        ({"final_mask": "all"}, "final_mask kept or reranked, got 'all'"),
        ({"iterations": 0}, "1 or more iterations, got 0"),
        ({"lr": 0.0}, "lr above 0, got 0"),
        ({"betas": (0.5, 1.0)}, r"two betas in \[0, 1\), got \(0.5, 1.0\)"),
        ({"iterations": 6}, "the stop at 6 is past the end of 6 iterations"),
        ({"schedule": StopSchedule((1,), (0.97,))}, "the stop at 1 drops all of 24 patches"),
        ({"mean": None}, "pretrained_cfg has no mean"),
        ({"mean": (0.5,)}, r"mean of 3 channels, got \(0.5,\)"),
        ({"std": (0.2, 0.0, 0.2)}, "std above 0"),
        ({"objectives": []}, "one or more objectives"),
        ({"jitter": Jitter((0.1, 0.2))}, "expected 3 shares of jitter, .* 2 stops, got 2"),
        ({"objectives": [CrossEntropy(), CrossEntropy(2)]}, "different names"),
    ],
)
def test_bad_options_are_refused(teacher: VisionTransformer, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(teacher, **options)


def test_what_is_no_jitter_is_refused(teacher: VisionTransformer) -> None:
    with pytest.raises(TypeError, match=r"a Jitter, whose Jitter\(share=0, flip=False\) is none"):
        make(teacher, jitter=False)


def test_what_is_no_objective_is_refused(teacher: VisionTransformer) -> None:
    with pytest.raises(TypeError, match=r"an objective or a function .* got 3"):
        make(teacher, objectives=[3])

    def vector(images: Tensor, logits: Tensor) -> Tensor:
        return logits

    with pytest.raises(
        ValueError, match=r"objective vector to return a scalar tensor, got \[2, 5\]"
    ):
        run(teacher, objectives=[vector])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": [1, 5]}, r"targets in 0\.\.4 for cross_entropy, got 1\.\.5"),
        ({"targets": [-1, 2]}, r"targets in 0\.\.4 for cross_entropy, got -1\.\.2"),
        ({"targets": None, "batch": 2}, r"probabilities \[B, 5\] for cross_entropy, got none"),
        ({"targets": None}, "targets or batch, the number of images, got neither"),
        ({"batch": 2}, "targets or batch, the number of images, got both"),
        ({"targets": None, "batch": -1}, "batch, the number of images, from 0, got -1"),
        ({"targets": None, "batch": 1.5}, "batch, the number of images, from 0, got 1.5"),
        ({"targets": torch.tensor([0.5, 1.0])}, r"whole numbers \[B\] or probabilities \[B, 5\]"),
        ({"targets": torch.zeros(2, 4)}, r"\[B, 5\] for .*, got torch.float64 \[2, 4\]"),
        ({"targets": torch.zeros(2, dtype=torch.int64, device="meta")}, "on cpu, .* got meta"),
        ({"init": torch.zeros(2, 3, 32, 40)}, r"init as floating point \[2, 3, 32, 48\]"),
        (
            {"init": torch.zeros(2, 3, 32, 48, device="meta")},
            "on cpu, got torch.float32 .* on meta",
        ),
        ({"jitter": (torch.zeros(9, 2).long(), torch.zeros(10) > 0)}, r"shift int64 \[10, 2\]"),
        (
            {"jitter": (torch.zeros(10, 3, 2).long(), torch.zeros(10, 3) > 0)},
            r"int64 \[10, 2\] or \[10, 2, 2\], got torch.int64 \[10, 3, 2\]",
        ),
        (
            {"jitter": (torch.zeros(10, 2, 2).long(), torch.zeros(10) > 0)},
            r"flip bool \[10, 2\], got torch.bool \[10\]",
        ),
        (
            {"jitter": (torch.full((10, 2), -40), torch.zeros(10) > 0)},
            r"shifts by at most the image, \[32, 48\] pixels, got some from -40 to -40",
        ),
        (
            {"jitter": (torch.full((10, 2), -(2**63)), torch.zeros(10) > 0)},
            "from -9223372036854775808",
        ),
        (
            {"jitter": (torch.zeros(10, 2).long(), torch.zeros(10))},
            r"flip bool \[10\], got torch.f",
        ),
    ],
)
def test_bad_arguments_are_refused(
    teacher: VisionTransformer, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(teacher).invert(**({"targets": TARGETS, "progress": False} | arguments))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([1, 4], r"targets in \[0, 1\] \[B, 5\] for binary_cross_entropy, got torch.int64 \[2\]"),
        (torch.rand(2, 4), r"got torch.float64 \[2, 4\]"),
        (torch.full((2, 5), 1.5), "for binary_cross_entropy, got some outside"),
        (torch.full((2, 5), torch.nan), "for binary_cross_entropy, got some outside"),
    ],
)
def test_targets_of_several_classes(
    teacher: VisionTransformer, targets: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(teacher, objectives=[BinaryCrossEntropy()]).invert(targets, progress=False)


class Embedding(Objective):
    """Squared distance of the logits from targets of one's own."""

    name, weight = "embedding", 1.0

    def check_targets(self, targets: Tensor | None, teacher: SparseViT) -> None:
        if targets is None:
            raise ValueError("expected targets as embeddings, got none")

    def __call__(self, inputs: LossInputs) -> Tensor:
        return (inputs.logits - inputs.targets.sum(2)).square().mean()


def test_targets_are_what_the_objectives_read(teacher: VisionTransformer) -> None:
    inverter = make(teacher, objectives=[Embedding()])
    wanted = torch.randn(2, 5, 7)
    result = inverter.invert(wanted, progress=False)
    assert torch.equal(result.targets, wanted.double())
    # The loss of single iterations depends on their jitter.
    losses = result.history["embedding"]
    assert sum(losses[-5:]) < sum(losses[:5])
    with pytest.raises(ValueError, match=r"classes or probabilities, got torch.float64 \[2, 5, 7"):
        print(result.confidence)
    with pytest.raises(ValueError, match="targets as embeddings, got none"):
        inverter.invert(batch=2, progress=False)


def test_no_targets(teacher: VisionTransformer) -> None:
    inverter = make(teacher, objectives=[TotalVariation()])
    generator = torch.Generator().manual_seed(0)
    result = inverter.invert(batch=2, generator=generator, progress=False)
    given = run(teacher, objectives=[TotalVariation()])
    assert result.targets is None and torch.equal(result.images, given.images)
    with pytest.raises(ValueError, match="classes or probabilities, got none"):
        print(result.confidence)
