"""ViTs of torchvision as timm modules."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from smi_fast import SparseViT, UnsupportedTeacher, from_torchvision
from tests.helpers.libraries import library, with_random_weights
from tests.helpers.teachers import relative_error


def make(**options: Any) -> Any:
    """A small ViT with two blocks and seven classes, every weight random."""
    models = library("torchvision.models")
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2}
    widths = {"hidden_dim": 32, "mlp_dim": 48, "num_classes": 7}
    vit: Any = with_random_weights(models.VisionTransformer(**{**sizes, **widths, **options}))
    return vit.eval()


def without_head() -> Any:
    model = make()
    model.heads = nn.Identity()
    return model


def own_head() -> Any:
    model = make()
    model.heads.head = nn.Linear(32, 3)
    return model


def wide_eps() -> Any:
    return make(norm_layer=partial(nn.LayerNorm, eps=1e-2))


@pytest.mark.parametrize("make_model", [make, without_head, own_head, wide_eps])
def test_it_computes_the_same(make_model: Any) -> None:
    model, images = make_model(), torch.randn(3, 3, 32, 32)
    expected = model(images)
    converted = from_torchvision(model)
    assert relative_error(converted(images), expected) < 1e-5
    sparse = SparseViT(converted)
    assert relative_error(sparse(images).logits, expected) < 1e-5
    assert sparse.num_classes == getattr(converted.head, "out_features", 0)


def test_the_model_stays_as_it_was() -> None:
    model = make().train()
    model.encoder.ln.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    converted = from_torchvision(model)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def with_stem() -> Any:
    stem = library("torchvision.models.vision_transformer").ConvStemConfig
    return make(conv_stem_configs=[stem(out_channels=8, kernel_size=8, stride=8)])


def other_activation() -> Any:
    model = make()
    model.encoder.layers[1].mlp[1] = nn.ReLU()
    return model


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: nn.Linear(2, 2), "^expected a model of torchvision, got torch.nn.*Linear$"),
        (
            lambda: library("torchvision.models").resnet18(),
            "^ResNet of torchvision can't be converted: expected a VisionTransformer$",
        ),
        (with_stem, "expected conv_proj to be one Conv2d"),
        (
            lambda: make(representation_size=4),
            "expected heads of one Linear layer or none, got Linear, Tanh, Linear",
        ),
        (other_activation, "VisionTransformer computes something else than timm's"),
    ],
)
def test_what_is_refused(make_model: Any, message: str) -> None:
    library("torchvision")
    with pytest.raises(UnsupportedTeacher, match=message):
        from_torchvision(make_model())
