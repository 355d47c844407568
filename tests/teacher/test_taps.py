"""Taps of SparseViT against timm's own modules: values, gradients, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import GluMlp, SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast import PatchSimilarity, SparseViT
from smi_fast.verify.cases import random_kept
from tests.helpers.teachers import make_teacher, random_images

GEOMETRIES = {
    "deit_tiny_patch16_224": {"depth": 3},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "img_size": 112},
    "vit_tiny_patch16_224 qk norm": {"depth": 2, "img_size": 96},
    "vit_medium_patch16_gap_256": {"depth": 2, "img_size": 96},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "img_size": 96},
}


def plain(teacher: VisionTransformer, images: Tensor, kept: Tensor) -> list[dict[str, Tensor]]:
    """Every tap of each block, from the block's own modules on the kept tokens."""
    prefix = torch.arange(teacher.num_prefix_tokens).expand(len(kept), -1)
    rows = torch.cat([prefix, kept + teacher.num_prefix_tokens], dim=1)
    x = teacher._pos_embed(teacher.patch_embed(images))
    x = teacher.norm_pre(x.gather(1, rows[..., None].expand(-1, -1, x.shape[2])))
    found = []
    for block in teacher.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).unflatten(2, (3, attention.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = attention.q_norm(q) * attention.scale @ attention.k_norm(k).mT
        parts = {"scores": scores, "": scores.softmax(-1)}
        parts |= {"row": parts[""][:, :, 0], "output": (parts[""] @ v).transpose(1, 2)}
        parts |= {"q": attention.q_norm(q), "k": attention.k_norm(k), "v": v}
        x, parts["hidden"] = hidden_of(block, x)
        found.append({**parts, "tokens": x})
    return found


def hidden_of(block: nn.Module, *given: object) -> tuple[Tensor, Tensor]:
    """The output of a block, and what its own MLP gives to its second layer."""
    inputs: list[Tensor] = []
    hook = block.mlp.fc2.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    output = block(*given)
    hook.remove()
    return output, inputs[0]


def name_of(block: object, part: str) -> str:
    room = {"tokens": "block", "hidden": "mlp"}.get(part, "attention")
    return f"{room}.{block}.{part}".rstrip(".")


PARTS = ("", "scores", "output", "row", "q", "k", "v", "hidden", "tokens")
# Without a class token there is no row.
CASES = [(g, p) for g in GEOMETRIES for p in PARTS if (p, "gap" in g) != ("row", True)]


@pytest.mark.parametrize(("geometry", "part"), CASES)
def test_each_tap_is_what_the_block_computes(geometry: str, part: str) -> None:
    teacher = make_teacher(geometry, **GEOMETRIES[geometry]).double()
    images = random_images(teacher).double().requires_grad_()
    kept = random_kept(2, 9, teacher.patch_embed.num_patches)
    depth = len(teacher.blocks)
    sparse = SparseViT(teacher)
    plainly, untapped = plain(teacher, images, kept), sparse(images, kept, importance=True)
    for block in (0, depth - 1):
        name = name_of("last" if block else 0, part)
        output = sparse(images, kept, importance=True, taps=(name,))
        assert list(output.taps) == [name]
        got, expected = output.taps[name], plainly[block][part]
        torch.testing.assert_close(got, expected)
        weights = torch.randn_like(got)
        pair = [torch.autograd.grad((x * weights).sum(), images, retain_graph=True)[0]
                for x in (got, expected)]  # fmt: skip
        torch.testing.assert_close(*pair)
        torch.testing.assert_close(output.logits, untapped.logits)
        torch.testing.assert_close(output.importance, untapped.importance)


def test_many_taps_at_once_change_no_logits() -> None:
    teacher = make_teacher("deit_tiny_patch16_224", depth=3).double()
    images, sparse = random_images(teacher).double(), SparseViT(teacher)
    names = {name_of(i, p) for i in range(3) for p in PARTS}
    output = sparse(images, taps=names)
    assert set(output.taps) == names
    torch.testing.assert_close(output.logits, teacher(images))
    assert sparse(images).taps == {}


@pytest.mark.parametrize(
    "mlp", [GluMlp, partial(GluMlp, act_layer=nn.SiLU, gate_last=False), SwiGLU]
)
def test_the_hidden_layer_of_a_gated_mlp(mlp: Callable[..., nn.Module]) -> None:
    options = {"depth": 1, "img_size": 64, "mlp_layer": mlp, "scale_mlp_norm": True}
    teacher = make_teacher("vit_tiny_patch16_224", **options)
    images = random_images(teacher)
    sparse = SparseViT(teacher, probe=False)
    _, expected = hidden_of(teacher.blocks[0], teacher._pos_embed(teacher.patch_embed(images)))
    found = sparse(images, taps=["mlp.0.hidden"])
    torch.testing.assert_close(found.taps["mlp.0.hidden"], expected)
    torch.testing.assert_close(found.logits, teacher(images))


def test_a_row_leaves_the_last_block_short() -> None:
    """Only one row of the last MLP is computed for a tapped class token's row."""
    teacher = make_teacher("deit_tiny_patch16_224", depth=2)
    sparse, rows = SparseViT(teacher, backend="reference"), []
    sparse.vit.blocks[-1].mlp.fc1.register_forward_hook(
        lambda module, given, out: rows.append(out.shape[1])
    )
    images = torch.randn(1, 3, 224, 224)
    for tap in ("attention.last.row", "attention.0", "attention.last.output"):
        sparse(images, taps=(tap,))
    assert rows == [1, 1, 197]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("block.3", "expected a tap such as block.3.tokens, mlp.* got 'block.3'"),
        ("mlp.1", "got 'mlp.1'"),
        ("mlp.2.hidden", r"blocks 0..1, got 'mlp.2.hidden'"),
        ("attention.first", "got 'attention.first'"),
        ("attention.-1", "got 'attention.-1'"),
        ("block.2.tokens", r"blocks 0..1, got 'block.2.tokens'"),
    ],
)
def test_what_is_no_tap_is_refused(name: str, message: str) -> None:
    sparse = SparseViT(make_teacher("deit_tiny_patch16_224", depth=2))
    with pytest.raises(ValueError, match=message):
        sparse(torch.zeros(1, 3, 224, 224), taps=(name,))


def test_no_row_without_a_class_token() -> None:
    sparse = SparseViT(make_teacher("vit_medium_patch16_gap_256", depth=1))
    with pytest.raises(ValueError, match=r"no class token: no 'attention.0.row'"):
        sparse(torch.zeros(1, 3, 256, 256), taps=("attention.0.row",))


@pytest.mark.parametrize("blocks", [0.1, [], [0.5], "ab"])
def test_blocks_are_whole_numbers_and_at_least_one(blocks: Any) -> None:
    """A weight in the place of the blocks, say; and a loss over no block would be no loss."""
    with pytest.raises(ValueError, match=r"expected blocks as whole numbers, \[0, -1\], got "):
        PatchSimilarity(blocks).taps(depth=12)
    assert PatchSimilarity([-1]).taps(depth=12) == ("attention.11.output",)
