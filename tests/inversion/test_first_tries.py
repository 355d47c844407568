"""What a newcomer tries first: it works, or one sentence says what to write instead."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import smi_fast
from smi_fast import Dense, Pixels, SparseInverter, SparseViT, TotalVariation
from smi_fast.objectives.targets import multi_targets, soft_targets
from tests.helpers.inversions import SPACE, TARGETS, make, run
from tests.helpers.teachers import tiny_vit

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": 0.5}, "mean of 3 channels, got 0.5"),
        ({"mean": ("a", "b", "c")}, r"mean of 3 channels, got \('a', 'b', 'c'\)"),
        ({"mean": (0.5, NAN, 0.5)}, r"a finite mean, got \(0.5, nan, 0.5\)"),
        ({"std": (0.5, INF, 0.5)}, r"a finite std, got \(0.5, inf, 0.5\)"),
        ({"std": (0.5, NAN, 0.5)}, "a finite std"),
        ({"lr": lambda t: 0.1}, "lr as a number, a LearningRate or 10 numbers, got <function"),
        ({"lr": NAN}, "lr above 0, got nan"),
        ({"iterations": 10.0}, "1 or more iterations, got 10.0"),
        ({"betas": 0.5}, r"two betas in \[0, 1\), got 0.5"),
        ({"betas": ("a", "b")}, r"two betas in \[0, 1\), got \('a', 'b'\)"),
    ],
)
def test_options(teacher: VisionTransformer, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(teacher, **options)


def test_a_class_in_place_of_a_parametrization(teacher: VisionTransformer) -> None:
    with pytest.raises(TypeError, match=r"a parametrization, Fourier\(\), got <class"):
        make(teacher, parametrization=Pixels)


def test_mean_and_std_may_be_tensors_arrays_or_numbers_of_numpy(teacher: VisionTransformer) -> None:
    expected = run(teacher).images
    for convert in (lambda values: torch.tensor(values, dtype=torch.float64), np.array, list):
        space = {name: convert(values) for name, values in SPACE.items()}
        assert torch.equal(run(teacher, **space, iterations=np.int64(10)).images, expected)


NO_JITTER = (torch.zeros(10, 2, dtype=torch.int64), torch.zeros(10, dtype=torch.bool))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "cat"}, r"targets as a tensor with a row for each image, got 'cat'"),
        ({"targets": 3}, r"targets as a tensor with a row for each image, got 3"),
        ({"targets": -torch.ones(2, 5)}, "probabilities for .*, got some below 0 or not finite"),
        ({"targets": torch.full((2, 5), NAN)}, "probabilities for .*, got some below 0 or not"),
        ({"targets": torch.eye(5)[[1, 0]] * INF}, "probabilities for .*, got some below 0 or not"),
        ({"targets": torch.diag(torch.tensor([1.0, 0, 1, 1, 1]))}, "in each image, image 1 has"),
        ({"init": np.zeros((2, 3, 32, 48))}, r"init as a tensor \[2, 3, 32, 48\], got ndarray"),
        ({"jitter": False}, r"two tensors \(shift, flip\), or a Jitter, .* is none, got False"),
        ({"jitter": (*NO_JITTER, 1)}, r"two tensors \(shift, flip\)"),
        ({"jitter": ([[0, 0]] * 10, [False] * 10)}, r"two tensors \(shift, flip\)"),
        ({"generator": 0}, r"torch.Generator\(\).manual_seed\(seed\) or None, got 0"),
    ],
)
def test_arguments(teacher: VisionTransformer, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(teacher).invert(**({"targets": TARGETS, "progress": False} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": np.zeros((2, 3, 32, 48))}, r"a tensor \[B, 3, 32, 48\], got ndarray"),
        ({"kept": [[0, 1], [2, 3]]}, r"kept int64 \[2, K\], got list"),
        ({"taps": "block.0.tokens"}, r"a list of taps, \['block.0.tokens'\], got 'block"),
    ],
)
def test_arguments_of_sparse_vit(
    teacher: VisionTransformer, arguments: dict[str, Any], message: str
) -> None:
    images = torch.zeros(2, 3, 32, 48, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        SparseViT(teacher)(**({"images": images} | arguments))


def test_pixels_in_0_to_1_are_taken_as_they_are(teacher: VisionTransformer) -> None:
    init = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    seen: list[Tensor] = []

    def first(images: Tensor, logits: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return logits.sum()

    make(teacher, objectives=[first]).invert(TARGETS, init=init, progress=False)
    assert torch.equal(seen[0], init)


def test_several_classes_may_be_lists() -> None:
    wanted = multi_targets([[0, 2], [1, 1]], classes=4)
    assert wanted.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]
    assert soft_targets([3, 5], classes=10).argmax(1).tolist() == [3, 5]


def test_an_inverter_cannot_be_changed(teacher: VisionTransformer) -> None:
    inverter = make(teacher)
    options = inspect.signature(SparseInverter).parameters
    assert {"teacher", "lr", "jitter", "max_batch"} <= set(options)
    for name in (*options, "settings", "of_ones_own"):
        with pytest.raises(AttributeError, match=rf"can't be changed \({name}\): make another one"):
            setattr(inverter, name, 1)
    with pytest.raises(AttributeError):
        inverter.settings.lr = 1.0


def test_a_callback_may_return_anything(teacher: VisionTransformer) -> None:
    expected = run(teacher).images
    generator = torch.Generator().manual_seed(0)
    given = make(teacher).invert(
        TARGETS, generator=generator, progress=False, callback=lambda *_: False
    )
    assert torch.equal(given.images, expected)


def test_a_teacher_without_classes() -> None:
    teacher = tiny_vit()
    teacher.reset_classifier(0)
    inverter = SparseInverter(
        teacher, objectives=[TotalVariation()], schedule=Dense(), iterations=2, **SPACE
    )
    assert inverter.invert(batch=2, progress=False).images.shape == (2, 3, 32, 48)
    with pytest.raises(ValueError, match=r"with classes for cross_entropy, got .*num_classes=0: "):
        make(teacher).invert([0], progress=False)


@pytest.mark.parametrize("wrap", [lambda teacher: teacher, SparseViT])
def test_float16_pixels_are_refused(wrap: type) -> None:
    with pytest.raises(ValueError, match=r"got float16, .* underflow: pass teacher.float\(\)"):
        make(wrap(tiny_vit().half()))
    assert run(tiny_vit().bfloat16()).images.isfinite().all()


def test_a_teacher_without_weights_is_refused() -> None:
    with torch.device("meta"):
        teacher = smi_fast.SparseViT(tiny_vit())
    with pytest.raises(ValueError, match="on the meta device: load its weights first"):
        make(teacher)
