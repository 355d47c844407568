"""ViTs of transformers as timm modules: each class, what stays unchanged, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smi_fast import SparseViT, UnsupportedTeacher, from_huggingface
from tests.helpers.libraries import library, with_random_weights
from tests.helpers.teachers import relative_error

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {key: SMALL[key] for key in list(SMALL)[:4]}
# Class, options of its configuration, and the part of its answer that the conversion returns.
CASES = [
    ("ViTModel", {}, "class token"),
    ("ViTModel", {"qkv_bias": False, "image_size": (32, 48)}, "class token"),
    ("ViTForImageClassification", {"num_labels": 5, "layer_norm_eps": 1e-3}, "logits"),
    ("ViTForImageClassification", {"num_labels": 5, "hidden_act": "gelu_new"}, "logits"),
    ("DeiTModel", {}, "class token"),
    ("DeiTForImageClassification", {"num_labels": 5}, "logits"),
    ("DeiTForImageClassificationWithTeacher", {"num_labels": 5}, "logits"),
    ("Dinov2Model", {}, "pooler_output"),
    ("Dinov2Model", {"use_swiglu_ffn": True}, "pooler_output"),
    ("Dinov2WithRegistersModel", {"num_register_tokens": 3}, "pooler_output"),
    ("DINOv3ViTModel", {"num_register_tokens": 3, "key_bias": True}, "pooler_output"),
    (
        "DINOv3ViTModel",
        {"image_size": (32, 48), "rope_theta": 7.0},
        "class token",
    ),
    (
        "DINOv3ViTModel",
        {"use_gated_mlp": True, "hidden_act": "silu", "mlp_bias": False, "proj_bias": False},
        "pooler_output",
    ),
    ("CLIPVisionModel", {}, "pooler_output"),
    ("CLIPVisionModelWithProjection", {"projection_dim": 16}, "image_embeds"),
    ("CLIPForImageClassification", {"num_labels": 5}, "logits"),
    ("SiglipVisionModel", {}, "pooler_output"),
    ("SiglipForImageClassification", {"num_labels": 5}, "logits"),
]
CONFIGS = {"CLIPVision": "CLIPVisionConfig", "SiglipVision": "SiglipVisionConfig"}


def make(name: str, **options: Any) -> Any:
    """A small model of a class of transformers, every weight random."""
    transformers = library("transformers")
    if name.startswith(("CLIP", "Siglip")) and "Vision" not in name:
        family = name.partition("For")[0].removesuffix("Model")
        labels = {key: options.pop(key) for key in ("num_labels",) if key in options}
        config = getattr(transformers, f"{family}Config")(
            vision_config={**SMALL, **options}, text_config=TEXT, **labels
        )
    else:
        family = name.partition("Model")[0].partition("For")[0]
        config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
    model: Any = with_random_weights(getattr(transformers, name)(config))
    return model.eval()


def answer(model: Any, images: Tensor, part: str, **options: bool) -> Tensor:
    with torch.no_grad():
        found = model(pixel_values=images, **options)
    part_of_it: Tensor = (
        found.last_hidden_state[:, 0] if part == "class token" else getattr(found, part)
    )
    return part_of_it


@pytest.mark.parametrize(("name", "options", "part"), CASES)
def test_each_class_computes_the_same(name: str, options: dict[str, Any], part: str) -> None:
    model = make(name, **options)
    converted = from_huggingface(model)
    images = torch.randn(3, 3, *converted.patch_embed.img_size)
    expected = answer(model, images, part)
    assert relative_error(converted(images), expected) < 1e-5
    assert relative_error(SparseViT(converted)(images).logits, expected) < 1e-5
    assert not converted.training


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ViTModel", "class token"),
        ("DeiTForImageClassificationWithTeacher", "logits"),
        ("Dinov2WithRegistersModel", "pooler_output"),
        ("DINOv3ViTModel", "pooler_output"),
        ("CLIPVisionModel", "pooler_output"),
        ("SiglipVisionModel", "pooler_output"),
    ],
)
def test_another_image_size_interpolates_as_the_model_does(name: str, part: str) -> None:
    model = make(name)
    converted = from_huggingface(model, image_size=(40, 64))
    unasked = name.lower().startswith("dino")
    options = {} if unasked else {"interpolate_pos_encoding": True}
    images = torch.randn(2, 3, 40, 64)
    assert SparseViT(converted).grid == (5, 8)
    assert relative_error(converted(images), answer(model, images, part, **options)) < 1e-5


def test_a_rectangular_model_has_one_size() -> None:
    model = make("ViTModel", image_size=(32, 48))
    with pytest.raises(UnsupportedTeacher, match=r"ViTModel can't interpolate .* of 64 x 64"):
        from_huggingface(model, image_size=64)


def test_towers_inside_of_both_networks() -> None:
    for name in ("CLIPModel", "SiglipModel"):
        tower = make(name).vision_model
        images = torch.randn(2, 3, 32, 32)
        expected = answer(tower, images, "pooler_output")
        assert relative_error(from_huggingface(tower)(images), expected) < 1e-5


def test_half_precision_is_compared_in_double() -> None:
    model = make("ViTModel").to(torch.bfloat16)
    converted = from_huggingface(model)
    assert converted.patch_embed.proj.weight.dtype == torch.bfloat16
    assert converted.float()(torch.randn(1, 3, 32, 32)).isfinite().all()


def other_forward() -> Any:
    """A subclass whose logits aren't its base's."""
    base = type(make("ViTForImageClassification"))

    class Louder(base):  # type: ignore[misc, valid-type]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            found = super().forward(*arguments, **options)
            found.logits = 2 * found.logits
            return found

    return Louder(make("ViTForImageClassification").config)


def adapted() -> Any:
    model = make("ViTModel")
    model.layernorm.extra = nn.Parameter(torch.zeros(3))
    return model


def two_eps() -> Any:
    model = make("ViTModel")
    model.layernorm.eps = 0.5
    return model


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: nn.Linear(2, 2), r"^expected a model of transformers, got torch\.nn.*Linear$"),
        (
            lambda: make("Dinov2ForImageClassification"),
            r"^Dinov2ForImageClassification .* class token and the mean .* model\.dinov2$",
        ),
        (lambda: make("CLIPModel"), r"^CLIPModel .* two networks; convert model\.vision_model$"),
        (lambda: make("ViTMSNModel"), "^ViTMSNModel of transformers can't be .* one of ViTModel"),
        (lambda: make("SiglipVisionModel", vision_use_head=False), "without its head"),
        (
            lambda: make("DINOv3ViTModel", hidden_act="relu"),
            "DINOv3ViTModel of plain MLPs with hidden_act 'gelu', got 'relu'",
        ),
        (lambda: make("ViTModel", hidden_act="mish"), "with hidden_act gelu, .*, got 'mish'"),
        (other_forward, "Louder computes something else .* differ by 0.5"),
        (adapted, "aren't those of a plain ViT: .*extra"),
        (two_eps, r"expected LayerNorms of one eps, got \[1e-12, 0.5\]"),
    ],
)
def test_what_is_refused(make_model: Any, message: str) -> None:
    library("transformers")
    with pytest.raises(UnsupportedTeacher, match=message):
        from_huggingface(make_model())


def test_a_model_that_fails_is_refused() -> None:
    model = make("ViTModel")
    model.layernorm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(UnsupportedTeacher, match=r"ViTModel fails on images .*division by zero"):
        from_huggingface(model)
    assert not any(module.training for module in model.modules())
