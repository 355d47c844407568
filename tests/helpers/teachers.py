"""Teachers for tests: timm's own geometries with random weights, and one tiny ViT."""

from __future__ import annotations

from types import MethodType

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
    "aimv2_huge_patch14_224": {"depth": 3, "img_size": 56, "embed_dim": 96, "num_heads": 2},
    "deit_tiny_patch16_224 rectangle": {"img_size": (96, 160), "depth": 3},
    "vit_tiny_patch16_224 no block to spare": {"depth": 1},
    "vit_tiny_patch16_224 qk norm": {"depth": 2, "qk_norm": True, "init_values": 0.1},
    "vit_tiny_patch16_224 average with class token": {"depth": 2, "global_pool": "avg"},
    "vit_tiny_patch16_224 maximum": {"depth": 2, "global_pool": "max"},
    "vit_tiny_patch16_224 no bias": {"depth": 2, "qkv_bias": False},
    "vit_tiny_patch16_224 attention norm": {"depth": 2, "scale_attn_norm": True},
}
# The same of timm's Eva family: each kind of rotary positions, of attention, of MLP and of pooling.
EVA = {
    "eva02_tiny_patch14_224": {"img_size": (112, 84)},
    "eva02_base_patch16_clip_224": {"img_size": 96},
    "eva_giant_patch14_clip_224": {"img_size": 84, "embed_dim": 176, "num_heads": 2},
    "vit_small_patch16_dinov3": {"img_size": (96, 128)},
    "vit_small_plus_patch16_dinov3_qkvb": {"img_size": 96},
    "vit_small_patch16_dinov3 headless": {"img_size": 96, "num_classes": 0},
    "vit_small_patch16_rope_224": {"img_size": 96},
    "vit_small_patch16_rope_ape_224": {"img_size": 96},
    "vit_small_patch16_rope_mixed_224": {"img_size": (96, 128)},
    "vit_medium_patch16_rope_reg1_gap_256": {"img_size": 96},
    "vit_pe_core_tiny_patch16_384": {"img_size": 96},
    "vit_small_patch16_rope_224 three layers": {"img_size": 96, "qkv_fused": False},
    "vit_small_patch16_rope_224 grouped queries": {
        "img_size": 96,
        "qkv_fused": False,
        "num_kv_heads": 2,
        "qk_norm": True,
    },
    "vit_small_patch16_rope_224 query and key norm": {"img_size": 96, "qk_norm": True},
}


def make_teacher(name: str, **options: object) -> VisionTransformer:
    """A timm model whose every parameter is random: zero-initialised ones would hide mistakes."""
    own = TEACHERS.get(name) or ({"depth": 2, **EVA[name]} if name in EVA else {})
    options = {"num_classes": 10, **own, **options}
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


def patch_as_published(teacher: VisionTransformer) -> VisionTransformer:
    """Binds functions with the published names, which compute what the published code computes:
    the model takes indices of tokens twice, and returns attention maps and indices too.
    """

    def vit_attention_forward(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        probabilities = (q @ k.mT * self.scale).softmax(-1)
        return self.proj((probabilities @ v).transpose(1, 2).flatten(2)), probabilities

    def vit_block_forward(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        attended, probabilities = self.attn(self.norm1(x))
        x = x + attended
        return x + self.mlp(self.norm2(x)), probabilities

    def vit_forward(
        self: nn.Module, x: Tensor, current_abs_index: Tensor, next_relative_index: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        kept = current_abs_index
        if next_relative_index.shape[1] != kept.shape[1]:
            kept = kept.gather(1, next_relative_index)
        x, maps = self._pos_embed(self.patch_embed(x)), []
        x = x.gather(1, kept[..., None].expand(len(x), -1, x.shape[2]))
        for block in self.blocks:
            x, probabilities = block(x)
            maps.append(probabilities)
        return self.head(self.norm(x)[:, 0]), maps, kept

    teacher.forward = MethodType(vit_forward, teacher)
    for block in teacher.blocks:
        block.forward = MethodType(vit_block_forward, block)
        block.attn.forward = MethodType(vit_attention_forward, block.attn)
    return teacher
