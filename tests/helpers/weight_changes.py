"""Ways to change the weights of a teacher that is wrapped already."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smi_fast import SparseViT
from tests.helpers.teachers import random_images

Change = Callable[[VisionTransformer, SparseViT], object]


def other_weights(teacher: VisionTransformer) -> dict[str, torch.Tensor]:
    return {name: 1.3 * weight for name, weight in teacher.state_dict().items()}


def optimiser(make: type, **options: object) -> Change:
    def change(teacher: VisionTransformer, sparse: SparseViT) -> None:
        steps = make(teacher.parameters(), lr=0.05, **options)
        images = random_images(teacher).to(teacher.patch_embed.proj.weight.dtype)
        teacher(images).square().sum().backward()
        # Without a bound two steps of SGD make weights whose float64 results are mostly rounding.
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        steps.step()

    return change


def replace_data(teacher: VisionTransformer, sparse: SparseViT) -> None:
    for weight in teacher.parameters():
        weight.data = 1.1 * weight.data


def replace_data_of_the_copy(teacher: VisionTransformer, sparse: SparseViT) -> None:
    for ours, weight in zip(sparse.vit.parameters(), teacher.parameters(), strict=True):
        ours.data = 1.1 * ours.data
        weight.data = ours.data


def replace_twice(teacher: VisionTransformer, sparse: SparseViT) -> None:
    """Without a pass in between, so that freed memory may be used again."""
    for factor in (0.9, 1.2):
        for weight in teacher.parameters():
            weight.data = factor * weight.data


def new_parameter(teacher: VisionTransformer, sparse: SparseViT) -> None:
    proj = teacher.blocks[-1].attn.proj
    proj.weight = nn.Parameter(torch.randn_like(proj.weight))


@torch.no_grad()
def in_place(name: str, teacher: VisionTransformer) -> None:
    teacher.get_parameter(name).mul_(1.5)


NOTICED: dict[str, Change] = {
    "load_state_dict": lambda t, s: t.load_state_dict(other_weights(t)),
    "load_state_dict(assign=True)": lambda t, s: t.load_state_dict(other_weights(t), assign=True),
    "load_state_dict of the copy": lambda t, s: s.vit.load_state_dict(other_weights(t)),
    "class token": lambda t, s: in_place("cls_token", t),
    "class token through .data": lambda t, s: t.cls_token.data.mul_(1.5),
    "positions": lambda t, s: in_place("pos_embed", t),
    "a weight of a block": lambda t, s: in_place("blocks.0.attn.qkv.weight", t),
    "SGD": optimiser(torch.optim.SGD),
    "AdamW": optimiser(torch.optim.AdamW),
    "data replaced": replace_data,
    "data of the copy replaced": replace_data_of_the_copy,
    "replaced twice": replace_twice,
    "a new parameter": new_parameter,
    "half and back": lambda t, s: t.half().float(),
    "double": lambda t, s: t.double(),
}

# torch doesn't count these, so nothing cheap can notice them.
UNCOUNTED: dict[str, Change] = {
    "fused AdamW": optimiser(torch.optim.AdamW, fused=True),
    "fused SGD": optimiser(torch.optim.SGD, fused=True),
    "weights through .data": lambda t, s: [p.data.mul_(1.1) for p in t.parameters()],
    "EMA through .data": lambda t, s: [p.data.lerp_(0 * p, 0.1) for p in t.parameters()],
}
