"""Fewer tokens in deeper blocks: exact for those that go on, and refused where undefined."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast import SparseViT
from smi_fast.importance import Attention
from smi_fast.teacher.rotary import rotations
from smi_fast.verify.cases import random_kept
from tests.helpers.inversions import frames, make
from tests.helpers.teachers import make_teacher, random_images, relative_error, with_gradient


class Narrowed(nn.Module):
    """timm's blocks one after the other; in front of some, tokens are left out by hand.

    Attributes:
        left: the patches that reach the last block, int64 [B, K], and its attention to them.
    """

    def __init__(self, teacher: VisionTransformer, kept: Tensor, narrow: dict[int, float]) -> None:
        super().__init__()
        self.teacher, self.kept, self.narrow = teacher, kept, narrow
        self.left: tuple[Tensor, Tensor] = (kept, kept)

    def forward(self, images: Tensor) -> Tensor:
        teacher, prefix = self.teacher, self.teacher.num_prefix_tokens
        x = teacher._pos_embed(teacher.patch_embed(images))
        first = torch.arange(prefix).expand(len(x), -1)
        x = x.take_along_dim(torch.cat([first, self.kept + prefix], 1)[:, :, None], 1)
        x, left = teacher.norm_pre(x), self.kept
        for index, block in enumerate(teacher.blocks):
            row = class_row(block, x.detach())[:, prefix:]
            if index in self.narrow:
                order = row.argsort(dim=1, descending=True)
                chosen = order[:, : int(row.shape[1] * self.narrow[index])].sort(dim=1).values
                left = left.gather(1, chosen)
                x = x.take_along_dim(torch.cat([first, chosen + prefix], 1)[:, :, None], 1)
                row = class_row(block, x.detach())[:, prefix:]
            self.left = left, row
            x = block(x)
        return teacher.forward_head(teacher.norm(x))


def class_row(block: nn.Module, x: Tensor) -> Tensor:
    """The class token's attention [B, N] in a block, mean over heads."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(x)).unflatten(2, (3, attention.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, 0].mean(1)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("narrow", [{2: 0.5}, {1: 0.7, 2: 0.4}, {3: 0.3}])
@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224 rectangle",
        "deit_tiny_distilled_patch16_224",
        "vit_tiny_patch16_224 qk norm",
    ],
)
def test_equals_timms_blocks_on_the_tokens_that_go_on(name: str, narrow: dict) -> None:
    teacher = make_teacher(name, depth=4)
    images = random_images(teacher)
    kept = random_kept(2, 40, teacher.patch_embed.num_patches)
    plain = Narrowed(teacher, kept, narrow)
    logits, gradient = with_gradient(plain, images)
    sparse = SparseViT(teacher, narrow=narrow)
    ours, our_gradient = with_gradient(sparse, images, kept)
    assert relative_error(ours, logits) < 1e-5
    assert relative_error(our_gradient, gradient) < 1e-4
    # Without it they differ.
    whole, _ = with_gradient(SparseViT(teacher), images, kept)
    assert relative_error(whole, logits) > 1e-4
    output = sparse(images, kept, importance=True)
    torch.testing.assert_close(output.logits, ours)
    left, row = plain.left
    expected = torch.zeros(2, teacher.patch_embed.num_patches).scatter(1, left, row)
    torch.testing.assert_close(output.importance, expected.gather(1, kept), rtol=1e-4, atol=1e-7)
    assert (output.importance > 0).sum(1).tolist() == [left.shape[1]] * 2


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_rotations_go_on_with_their_tokens(name: str) -> None:
    teacher = make_teacher(name, depth=3)
    if teacher.global_pool != "token" or teacher.attn_pool is not None:
        teacher = make_teacher(name, depth=3, global_pool="token", class_token=True)
    images, prefix = random_images(teacher), teacher.num_prefix_tokens
    kept = random_kept(2, 20, teacher.patch_embed.num_patches)
    whole = SparseViT(teacher)
    with torch.no_grad():
        taps = whole(images, kept, taps=["block.0.tokens", "attention.1.row"]).taps
        row = taps["attention.1.row"][:, :, prefix:].mean(1)
        chosen = row.argsort(dim=1, descending=True)[:, :10].sort(dim=1).values
        first = torch.arange(prefix).expand(2, -1)
        x = taps["block.0.tokens"].take_along_dim(
            torch.cat([first, chosen + prefix], dim=1)[:, :, None], 1
        )
        turned = rotations(teacher, kept.gather(1, chosen))
        for block, rotation in zip(teacher.blocks[1:], turned[1:], strict=True):
            x = block(x, rope=rotation.transpose(1, 2))
        expected = teacher.forward_head(teacher.norm(x))
        found = SparseViT(teacher, narrow={1: 0.5})(images, kept).logits
    assert relative_error(found, expected) < 1e-5
    assert relative_error(whole(images, kept).logits.detach(), expected) > 1e-4


def test_a_share_of_one_changes_nothing_and_one_token_goes_on_at_least() -> None:
    teacher = make_teacher("deit_tiny_patch16_224", depth=3)
    images, kept = random_images(teacher), random_kept(2, 5, 196)
    expected = SparseViT(teacher)(images, kept).logits
    torch.testing.assert_close(SparseViT(teacher, narrow={1: 1.0})(images, kept).logits, expected)
    least = SparseViT(teacher, narrow={2: 0.01})(images, kept, importance=True)
    assert (least.importance > 0).sum(1).tolist() == [1, 1]
    assert SparseViT(teacher).narrow == {} and SparseViT(teacher, narrow={}).narrow == {}


def test_inverts_and_stays_narrow_in_copies(teacher: VisionTransformer) -> None:
    narrowed = SparseViT(teacher, narrow={1: 0.5})
    assert narrowed.at_size((16, 24)).narrow == copy.deepcopy(narrowed).narrow == {1: 0.5}
    narrow, whole = (frames(make(vit))[0] for vit in (narrowed, teacher))
    assert (narrow[-1] - whole[-1]).abs().max() > 1e-3
    assert all(map(torch.equal, narrow, frames(make(copy.deepcopy(narrowed)))[0]))


def test_taps_in_front_are_those_of_all_tokens(teacher: VisionTransformer) -> None:
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    (ours, theirs) = (
        vit(images, taps=["block.0.tokens"]).taps["block.0.tokens"]
        for vit in (SparseViT(teacher, narrow={1: 0.5}), SparseViT(teacher))
    )
    torch.testing.assert_close(ours, theirs)


def test_taps_of_narrowed_blocks_are_refused(teacher: VisionTransformer) -> None:
    narrowed = SparseViT(teacher, narrow={1: 0.5})
    message = "expected taps in front of block 1, from which on narrow leaves tokens out, got"
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    for until in (None, 2):
        with pytest.raises(ValueError, match=message):
            narrowed(images, taps=["attention.last"], until=until)
    with pytest.raises(ValueError, match=f"'rollout' can't score this teacher: {message}"):
        make(narrowed, importance="rollout")
    make(narrowed, importance=Attention((0,)))


@pytest.mark.parametrize(
    ("narrow", "message"),
    [
        ({0: 0.5}, r"expected blocks to narrow in 1\.\.1, got 0"),
        ({2: 0.5}, r"expected blocks to narrow in 1\.\.1, got 2"),
        ({"a": 0.5}, r"expected blocks to narrow in 1\.\.1, got 'a'"),
        ({1: 0}, r"expected shares to narrow to in \(0, 1\], got 0"),
        ({1: 1.5}, r"expected shares to narrow to in \(0, 1\], got 1.5"),
        ({1: "half"}, r"expected shares to narrow to in \(0, 1\], got 'half'"),
        (0.5, r"expected narrow as {block: share}, {6: 0.5}, got 0.5"),
        ([(1, 0.5)], r"expected narrow as {block: share}, {6: 0.5}, got \[\(1, 0.5\)\]"),
    ],
)
def test_what_can_not_be_narrowed_is_refused(
    teacher: VisionTransformer, narrow: object, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        SparseViT(teacher, narrow=narrow)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224 average with class token", "vit_base_patch16_siglip_224"],
)
def test_teachers_that_read_all_tokens_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a teacher whose head reads its class token, by which"):
        SparseViT(make_teacher(name), narrow={1: 0.5}, probe=False)
