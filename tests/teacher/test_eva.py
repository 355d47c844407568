"""Teachers of timm's Eva family against timm: every patch, kept subsets, jitter, the inside."""

from __future__ import annotations

import pytest
import torch
from timm.models.eva import Eva
from torch import Tensor, nn

import smi_fast
from smi_fast import SparseViT, StopSchedule
from smi_fast.verify.cases import random_kept
from tests.helpers.masked import Masked
from tests.helpers.teachers import (
    EVA,
    make_teacher,
    random_images,
    relative_error,
    with_gradient,
)


@pytest.mark.parametrize("name", EVA)
def test_equals_timm_with_every_patch(name: str) -> None:
    teacher = make_teacher(name)
    images = random_images(teacher)
    logits, gradient = with_gradient(teacher, images)
    ours, our_gradient = with_gradient(SparseViT(teacher), images)
    assert relative_error(ours, logits) < 1e-5
    assert relative_error(our_gradient, gradient) < 1e-4


@pytest.mark.parametrize("name", EVA)
@pytest.mark.parametrize("count", [1, 7])
def test_equals_timm_on_a_subset_in_float64(name: str, count: int) -> None:
    teacher = make_teacher(name).double()
    images = random_images(teacher).double()
    kept = random_kept(2, count, teacher.patch_embed.num_patches)
    expected = with_gradient(Masked(teacher, kept), images)
    ours = with_gradient(SparseViT(teacher), images, kept)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(ours[1] != 0, expected[1] != 0)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_a_patch_turns_with_its_place_under_jitter(name: str) -> None:
    """Of a shift by whole patches, and a flip: each kept patch is at a place of its own."""
    teacher = make_teacher(name).double()
    rows, columns = teacher.patch_embed.grid_size
    images, kept = random_images(teacher).double(), random_kept(2, 7, rows * columns)
    moved = images.roll((16, -32), (2, 3)).flip(3)
    row, column = (kept // columns + 1) % rows, columns - 1 - (kept % columns - 2) % columns
    expected = Masked(teacher, row * columns + column)(moved)
    found = SparseViT(teacher)(images, kept, jitter=((16, -32), True)).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def attention_maps(teacher: Eva, images: Tensor) -> list[Tensor]:
    """The softmax attention of each block [B, H, N, N], as timm gives it to its dropout."""
    maps: list[Tensor] = []
    for block in teacher.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, given, out: maps.append(out))
    teacher(images)
    return maps


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("eva02_tiny_patch14_224", slice(1, None)),
        ("vit_small_patch16_rope_mixed_224", slice(1, None)),
        ("vit_small_patch16_dinov3", slice(0, 1)),
    ],
)
@torch.no_grad()
def test_importance_and_taps_are_timms_attention(name: str, rows: slice) -> None:
    teacher = make_teacher(name, global_pool="token" if rows.stop else "avg")
    images, prefix = random_images(teacher), teacher.num_prefix_tokens
    taps = ["attention.0", "attention.1", "attention.1.row", "block.1.tokens"]
    sparse = SparseViT(teacher)
    plain, output = sparse(images, importance=True), sparse(images, importance=True, taps=taps)
    first, last = attention_maps(teacher, images)
    expected = last[:, :, rows, prefix:].mean((1, 2))
    close = {"rtol": 1e-4, "atol": 1e-7}
    for found in (plain.importance, output.importance):
        torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(output.taps["attention.0"], first, **close)
    torch.testing.assert_close(output.taps["attention.1"], last, **close)
    torch.testing.assert_close(output.taps["attention.1.row"], last[:, :, 0], **close)
    torch.testing.assert_close(
        teacher.norm(output.taps["block.1.tokens"]),
        teacher.forward_features(images),
        rtol=1e-4,
        atol=1e-4,
    )


@torch.no_grad()
def test_replaced_weights_are_followed() -> None:
    teacher = make_teacher("vit_small_patch16_rope_mixed_224")
    images, sparse = random_images(teacher), SparseViT(teacher)
    teacher.load_state_dict(make_teacher("vit_small_patch16_rope_mixed_224").state_dict())
    teacher.rope.freqs = nn.Parameter(2 * teacher.rope.freqs)
    assert relative_error(sparse(images).logits, teacher(images)) < 1e-5


def test_a_whole_inversion_keeps_what_the_class_token_attends_to() -> None:
    teacher = make_teacher("vit_small_patch16_dinov3", global_pool="token")
    result = smi_fast.invert(
        teacher,
        [1, 2],
        iterations=4,
        schedule=StopSchedule.once(4, keep=0.25, at=0.5),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        progress=False,
    )
    assert result.kept.shape == (2, 12) and result.images.isfinite().all()


def test_a_backend_that_is_named_runs() -> None:
    teacher = make_teacher("vit_small_patch16_dinov3")
    images = random_images(teacher)
    expected = teacher(images)
    for backend in ("reference", "auto"):
        assert relative_error(SparseViT(teacher, backend=backend)(images).logits, expected) < 1e-5


def test_it_compiles_as_one_graph() -> None:
    sparse = SparseViT(make_teacher("vit_small_patch16_dinov3"))
    images, kept = torch.randn(1, 3, 96, 128), random_kept(1, 9, 48)
    compiled = torch.compile(sparse, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, kept).logits, sparse(images, kept).logits)
