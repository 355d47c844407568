"""Image towers of open_clip as timm modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from smi_fast import SparseViT, UnsupportedTeacher, from_open_clip
from tests.helpers.libraries import library, with_random_weights
from tests.helpers.teachers import relative_error


def make(**options: Any) -> Any:
    """A small tower with embeddings of 16 numbers, every weight random."""
    transformer = library("open_clip.transformer")
    sizes = {"image_size": (32, 48), "patch_size": 8, "width": 32, "layers": 2, "heads": 2}
    more = {"mlp_ratio": 3.0, "output_dim": 16}
    tower: Any = with_random_weights(transformer.VisionTransformer(**{**sizes, **more, **options}))
    return tower.eval()


def make_timm(name: str = "test_vit", **options: Any) -> Any:
    tower = library("open_clip.timm_model").TimmModel(name, 24, **options)
    model: Any = with_random_weights(tower, 0.05)
    return model.eval()


def quick_gelu() -> type[nn.Module]:
    kind: type[nn.Module] = library("open_clip.transformer").QuickGELU
    return kind


@pytest.mark.parametrize(
    "make_tower",
    [
        make,
        lambda: make(act_layer=quick_gelu(), ls_init_value=0.1),
        lambda: make(no_ln_pre=True, pool_type="avg"),
        lambda: make(pool_type="avg", final_ln_after_pool=True),
        lambda: make_timm(pool="avg", proj="linear", proj_bias=True),
        lambda: make_timm(pool="token", proj="none"),
        lambda: make_timm("eva02_tiny_patch14_224", pool="avg", proj="none"),
        lambda: make_timm("test_vit3", pool="map", proj="none"),
    ],
)
def test_it_computes_the_same(make_tower: Any) -> None:
    tower = make_tower()
    converted = from_open_clip(tower)
    images = torch.randn(2, 3, *converted.patch_embed.img_size)
    expected = tower(images)
    assert relative_error(converted(images), expected) < 1e-5
    assert relative_error(SparseViT(converted)(images).logits, expected) < 1e-5


def test_the_whole_model_knows_its_normalisation() -> None:
    tower = make()
    tower.preprocess_cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "size": 32}
    found = from_open_clip(tower).pretrained_cfg
    assert (found["mean"], found["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def whole_model() -> nn.Module:
    tower = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
    model: nn.Module = library("open_clip").model.CLIP(8, tower, text)
    return model


def other_activation() -> Any:
    tower = make()
    tower.transformer.resblocks[1].mlp.gelu = nn.ReLU()
    return tower


def other_block() -> Any:
    tower = make()
    tower.transformer.resblocks[1] = nn.Identity()
    return tower


@pytest.mark.parametrize(
    ("make_tower", "message"),
    [
        (lambda: nn.Linear(2, 2), "^expected a model of open_clip, got torch.nn.*Linear$"),
        (whole_model, "^CLIP of open_clip can't be converted: .* TimmModel; pass model.visual$"),
        (lambda: make(attentional_pool=True), "that returns one embedding"),
        (lambda: make(pool_type="none"), "that returns one embedding"),
        (lambda: make(output_tokens=True), "that returns one embedding"),
        (other_block, "^expected ResidualAttentionBlocks, got Identity, ResidualAttentionBlock$"),
        (lambda: make(act_layer=nn.ReLU), "expected activation GELU or QuickGELU, got ReLU"),
        (other_activation, "VisionTransformer computes something else than timm's"),
        (lambda: make_timm(proj="mlp"), "with a linear projection, got Mlp"),
        (lambda: make_timm("resnet18", proj="none"), "a timm VisionTransformer or Eva, got ResNet"),
    ],
)
def test_what_is_refused(make_tower: Any, message: str) -> None:
    library("open_clip")
    with pytest.raises(UnsupportedTeacher, match=message):
        from_open_clip(make_tower())
