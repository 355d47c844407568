"""What an inversion refuses, each in one sentence."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import CrossEntropy, Jitter, StopSchedule
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
        ({"targets": [1, 5]}, r"targets in 0\.\.4, got 1\.\.5"),
        ({"targets": [-1, 2]}, r"targets in 0\.\.4, got -1\.\.2"),
        ({"targets": torch.tensor([0.5, 1.0])}, r"whole numbers \[B\] or probabilities \[B, 5\]"),
        ({"targets": torch.zeros(2, 4)}, r"probabilities \[B, 5\], got torch.float32 \[2, 4\]"),
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
            r"shifts by at most the image, \[32, 48\] pixels, got one of 40",
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
