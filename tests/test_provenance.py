"""What a pool says of an inverter: everything that decides its images, and nothing that varies."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import Cosine, CrossEntropy, Fourier, Jitter
from smi_fast.augmentations import GaussianNoise
from smi_fast.inversion.settings import Settings
from smi_fast.pool import Pool, PoolError
from smi_fast.provenance import describe
from smi_fast.zoo import fingerprint
from tests.helpers.inversions import make
from tests.helpers.pools import NAMES
from tests.helpers.teachers import tiny_vit


def test_every_option_is_described(teacher: VisionTransformer) -> None:
    inverter = make(teacher)
    described = json.loads(json.dumps(describe(inverter), allow_nan=False))
    names = {field.name for field in fields(Settings)}
    assert names - {"teacher", "space", "graph"} <= described.keys()
    assert described["teacher_sha256"] == fingerprint(teacher)
    assert described["precision"] == "float64" and described["device"] == "cpu"
    assert len(described["mean"]) == len(described["std"]) == 3


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"lr": 0.125}, {"lr"}),
        ({"lr": Cosine(0.2)}, {"lr"}),
        ({"betas": (0.5, 0.8)}, {"betas"}),
        ({"optimizer": "adamw"}, {"weight_decay"}),
        ({"jitter": Jitter(share=0)}, {"jitter"}),
        ({"augment": GaussianNoise(0.5)}, {"augment"}),
        ({"copies": 2}, {"copies"}),
        ({"max_batch": 1}, {"max_batch"}),
        ({"background": "regularized"}, {"freeze_background"}),
        ({"mean": (0.5, 0.5, 0.25)}, {"mean"}),
        ({"parametrization": Fourier()}, {"parametrization"}),
        ({"backend": "reference"}, {"backend"}),
        ({"graph": False}, set()),
    ],
)
def test_another_option_is_told_apart(
    teacher: VisionTransformer, change: dict[str, object], keys: set[str]
) -> None:
    before = {"lr": 0.25, "betas": (0.5, 0.9), "backend": "cpp", "mean": (0.5, 0.5, 0.5)}
    before |= {"std": (0.5, 0.5, 0.5), "objectives": [CrossEntropy()]}
    one = describe(make(teacher, **before))
    other = describe(make(teacher, **{**before, **change}))
    assert {key for key in one if one[key] != other[key]} == keys


def test_another_precision_is_told_apart() -> None:
    teacher = tiny_vit()
    one, other = (describe(make(teacher, precision=p)) for p in ("float32", "bfloat16"))
    assert {key for key in one if one[key] != other[key]} == {"precision"}
    assert (one["precision"], other["precision"]) == ("float32", "bfloat16")


def test_a_pool_of_another_parametrization_is_not_resumed(
    teacher: VisionTransformer, tmp_path: Path
) -> None:
    Pool.create(tmp_path, describe(make(teacher)), NAMES).close()
    message = r'resumed: it was made with parametrization = "Pixels\(\)", .*Fourier\(decay=1.5'
    with pytest.raises(PoolError, match=message):
        Pool.resume(tmp_path, describe(make(teacher, parametrization=Fourier())), NAMES)


def test_objects_have_the_same_words_in_every_process(teacher: VisionTransformer) -> None:
    def term(images: Tensor, logits: Tensor) -> Tensor:
        return images.square().sum() + logits.sum()

    def augment(images: Tensor, progress: Tensor, generator: torch.Generator) -> Tensor:
        return images

    described = describe(make(teacher, objectives=[term], augment=augment, lr=[0.5] * 9 + [0.25]))
    assert "0x" not in json.dumps({k: described[k] for k in ("objectives", "augment")})
    assert described["lr"].startswith("10 numbers, sha256 ")
