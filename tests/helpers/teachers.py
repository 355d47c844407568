"""Teachers for tests: timm's own geometries with random weights, and one tiny ViT."""

from __future__ import annotations

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# Name, and what makes it quick: few blocks and few classes; the geometry is the model's own.
TEACHERS = {
    "deit_tiny_patch16_224": {},
    "deit_small_patch16_224": {},
    "deit_base_patch16_224": {"depth": 2},
    "deit_tiny_distilled_patch16_224": {},
    "vit_base_patch32_224": {"depth": 2},
    "vit_small_patch14_dinov2": {"depth": 2, "img_size": 224},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "img_size": 224},
    "vit_base_patch16_clip_quickgelu_224": {"depth": 2},
    "vit_base_patch16_siglip_224": {"depth": 2},
    "vit_medium_patch16_gap_256": {"depth": 2},
    "deit_tiny_patch16_224 rectangle": {"img_size": (96, 160), "depth": 3},
    "vit_tiny_patch16_224 no block to spare": {"depth": 1},
    "vit_tiny_patch16_224 qk norm": {"depth": 2, "qk_norm": True, "init_values": 0.1},
    "vit_tiny_patch16_224 average with class token": {"depth": 2, "global_pool": "avg"},
    "vit_tiny_patch16_224 maximum": {"depth": 2, "global_pool": "max"},
    "vit_tiny_patch16_224 no bias": {"depth": 2, "qkv_bias": False},
}


def make_teacher(name: str, **options: object) -> VisionTransformer:
    """A timm model whose every parameter is random: zero-initialised ones would hide mistakes."""
    options = {"num_classes": 10, **TEACHERS.get(name, {}), **options}
    teacher = timm.create_model(name.split()[0], **options).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.05 * noise if parameter.dim() > 1 else 1 + 0.2 * noise)
    return teacher


def tiny_vit(img_size: int | tuple[int, int] = (32, 48)) -> VisionTransformer:
    """Two blocks of width 32 on patches of 8 pixels, five classes, every parameter random."""
    teacher = VisionTransformer(
        img_size=img_size, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher.eval()


def random_images(teacher: VisionTransformer, batch: int = 2) -> Tensor:
    embed = teacher.patch_embed
    return torch.randn(batch, embed.proj.in_channels, *embed.img_size)


def with_gradient(model: nn.Module, images: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    """Logits of a timm model or a SparseViT, and the gradient of their norm for the images."""
    images = images.clone().requires_grad_()
    logits = model(images, *arguments)
    logits = logits if isinstance(logits, Tensor) else logits.logits
    (gradient,) = torch.autograd.grad(torch.linalg.vector_norm(logits), images)
    return logits.detach(), gradient


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()
