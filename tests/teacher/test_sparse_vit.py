"""SparseViT against timm: logits, pixel gradients, subsets, and a teacher left alone."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast import SparseViT, ops
from smi_fast.verify.cases import random_kept
from tests.helpers.inversions import pixels_of
from tests.helpers.teachers import (
    TEACHERS,
    make_teacher,
    random_images,
    relative_error,
    with_gradient,
)


@pytest.mark.parametrize("name", TEACHERS)
def test_equals_timm_with_every_patch(name: str) -> None:
    teacher = make_teacher(name)
    images = random_images(teacher)
    logits, gradient = with_gradient(teacher, images)
    ours, our_gradient = with_gradient(SparseViT(teacher), images)
    assert relative_error(ours, logits) < 1e-5
    assert relative_error(our_gradient, gradient) < 1e-4


def test_equals_timm_with_a_gate() -> None:
    teacher = make_teacher("vit_tiny_patch16_224", img_size=48, depth=2)
    if not hasattr(teacher.blocks[0].attn, "gate"):
        pytest.skip("timm has no gated attention")
    for block in teacher.blocks:
        block.attn.gate = nn.Linear(192, 192)
    images = random_images(teacher)
    pairs = zip(
        with_gradient(SparseViT(teacher), images), with_gradient(teacher, images), strict=True
    )
    assert all(relative_error(ours, own) < 1e-4 for ours, own in pairs)


@pytest.mark.parametrize(
    ("head", "classes"),
    [
        (nn.Identity(), 0),
        (nn.Linear(192, 3), 3),
        (nn.Sequential(nn.BatchNorm1d(192), nn.Linear(192, 7)), 7),
    ],
)
def test_classes_are_those_of_a_head_that_replaced_timms(head: nn.Module, classes: int) -> None:
    teacher = make_teacher("deit_tiny_patch16_224", depth=1)
    teacher.head = head
    sparse = SparseViT(teacher)
    images = torch.randn(2, 3, 224, 224)
    assert teacher.num_classes == 10 and sparse.num_classes == classes
    assert relative_error(sparse(images).logits, teacher.eval()(images)) < 1e-5


class OnlyKept(nn.Module):
    """A timm model fed with given tokens only: what sparse inversion means by kept."""

    def __init__(self, teacher: VisionTransformer, kept: Tensor) -> None:
        super().__init__()
        self.teacher = teacher
        prefix = torch.arange(teacher.num_prefix_tokens).expand(len(kept), -1)
        self.rows = torch.cat([prefix, kept + teacher.num_prefix_tokens], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        teacher = self.teacher
        x = teacher._pos_embed(teacher.patch_embed(images))
        x = x.gather(1, self.rows[..., None].expand(-1, -1, x.shape[2]))
        return teacher.forward_head(teacher.norm(teacher.blocks(teacher.norm_pre(x))))


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("count", [1, 7])
def test_equals_timm_on_a_subset_of_tokens(name: str, count: int) -> None:
    teacher = make_teacher(name, depth=2)
    images = random_images(teacher)
    kept = random_kept(2, count, teacher.patch_embed.num_patches)
    logits, gradient = with_gradient(OnlyKept(teacher, kept), images)
    ours, our_gradient = with_gradient(SparseViT(teacher), images, kept)
    assert relative_error(ours, logits) < 1e-5
    assert relative_error(our_gradient, gradient) < 1e-4
    assert torch.equal(our_gradient != 0, gradient != 0)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
def test_float64(name: str) -> None:
    teacher = make_teacher(name, depth=2).double()
    images = random_images(teacher).double()
    expected, ours = with_gradient(teacher, images), with_gradient(SparseViT(teacher), images)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_jitter_equals_a_jittered_image() -> None:
    teacher = make_teacher("deit_tiny_patch16_224", depth=2).double()
    images = random_images(teacher).double()
    rolled = images.roll((-9, 21), (2, 3)).flip(3)
    jittered = SparseViT(teacher)(images, jitter=((-9, 21), True)).logits
    torch.testing.assert_close(jittered, teacher(rolled))


def attention_maps(teacher: VisionTransformer, images: Tensor) -> Tensor:
    """Softmax attention of the last block, [B, H, N, N], from the block's own input."""
    seen = []
    block = teacher.blocks[-1]
    handle = block.norm1.register_forward_hook(lambda *hooked: seen.append(hooked[2]))
    teacher(images)
    handle.remove()
    attention = block.attn
    qkv = attention.qkv(seen[0]).unflatten(2, (3, attention.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return (attention.q_norm(q) * attention.scale @ attention.k_norm(k).mT).softmax(-1)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("deit_tiny_patch16_224", slice(0, 1)),
        ("deit_tiny_distilled_patch16_224", slice(0, 1)),
        ("vit_small_patch14_reg4_dinov2", slice(0, 1)),
        ("vit_medium_patch16_gap_256", slice(0, None)),
        ("vit_tiny_patch16_224 average with class token", slice(1, None)),
    ],
)
@torch.no_grad()
def test_importance_is_the_attention_of_what_the_head_reads(name: str, rows: slice) -> None:
    teacher = make_teacher(name, depth=2)
    images = random_images(teacher)
    maps = attention_maps(teacher, images)
    expected = maps[:, :, rows, teacher.num_prefix_tokens :].mean((1, 2))
    importance = SparseViT(teacher)(images, importance=True).importance
    torch.testing.assert_close(importance, expected, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_importance_of_map_pooling_is_its_own_attention() -> None:
    teacher = make_teacher("vit_base_patch16_siglip_224")
    images = random_images(teacher)
    pool, features = teacher.attn_pool, teacher.forward_features(images)
    q = pool.q(pool.latent).reshape(pool.num_heads, -1)
    k = pool.kv(features)[..., : teacher.embed_dim].unflatten(2, (pool.num_heads, -1))
    scores = torch.einsum("hd,bnhd->bhn", q, k) * pool.scale
    importance = SparseViT(teacher)(images, importance=True).importance
    torch.testing.assert_close(importance, scores.softmax(-1).mean(1), rtol=1e-4, atol=1e-7)


def test_importance_changes_no_logits_and_has_no_gradient() -> None:
    for name in ("deit_tiny_patch16_224", "vit_medium_patch16_gap_256"):
        teacher = SparseViT(make_teacher(name, depth=2))
        images = torch.randn(1, 3, *teacher.image_size, requires_grad=True)
        kept = random_kept(1, 9, teacher.num_patches)
        plain, scored = teacher(images, kept), teacher(images, kept, importance=True)
        assert plain.importance is None and not scored.importance.requires_grad
        torch.testing.assert_close(scored.logits, plain.logits)


def test_importance_follows_the_order_of_kept_under_jitter() -> None:
    teacher = SparseViT(make_teacher("deit_tiny_patch16_224", depth=2))
    images, kept = torch.randn(1, 3, 224, 224), random_kept(1, 20, 196)
    shuffled = kept[:, torch.randperm(20)]
    jitter = ((16, -32), True)
    a = teacher(images, kept, jitter=jitter, importance=True).importance
    b = teacher(images, shuffled, jitter=jitter, importance=True).importance
    torch.testing.assert_close(b.gather(1, shuffled.argsort()), a)


def test_teacher_is_left_as_it_was() -> None:
    teacher = make_teacher("deit_tiny_patch16_224", depth=2).train()
    teacher.blocks[0].mlp.fc1.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    flags = {name: p.requires_grad for name, p in teacher.named_parameters()}
    sparse = SparseViT(teacher)
    with_gradient(sparse, torch.randn(1, 3, 224, 224))
    assert teacher.training and not sparse.vit.training and not sparse.train().training
    assert {name: p.requires_grad for name, p in teacher.named_parameters()} == flags
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert not any(m._forward_hooks or m._backward_hooks for m in teacher.modules())
    pairs = zip(teacher.parameters(), sparse.vit.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() and not b.requires_grad for a, b in pairs)


def test_no_weight_gradient_is_computed() -> None:
    """What backward saves holds no activation that only a weight's gradient would need."""
    teacher = SparseViT(make_teacher("deit_tiny_patch16_224", depth=2))
    images = torch.randn(1, 3, 224, 224, requires_grad=True)
    logits = teacher(images).logits
    nodes, leaves = [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert leaves == {id(images)}


def test_last_block_computes_only_rows_that_are_read() -> None:
    """Where plain PyTorch computes it; the engine's has a test of its own."""
    sizes = {}
    for name in (
        "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "vit_medium_patch16_gap_256",
    ):
        sparse = SparseViT(make_teacher(name, depth=2), backend="reference")
        rows = []
        sparse.vit.blocks[-1].mlp.fc1.register_forward_hook(
            lambda module, given, out, rows=rows: rows.append(out.shape[1])
        )
        sparse(torch.randn(1, 3, *sparse.image_size))
        sizes[name] = rows
    assert list(sizes.values()) == [[1], [2], [256]]


def test_bad_images_are_refused() -> None:
    sparse = SparseViT(make_teacher("deit_tiny_patch16_224", depth=1))
    with pytest.raises(
        ValueError, match=r"expected images \[B, 3, 224, 224\] .* got \[1, 3, 230, 224\]"
    ):
        sparse(torch.zeros(1, 3, 230, 224))
    with pytest.raises(ValueError, match=r"torch.float32 on cpu, got torch.float64 on cpu"):
        sparse(torch.zeros(1, 3, 224, 224, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"on cpu, got torch.float32 on meta"):
        sparse(torch.zeros(1, 3, 224, 224, device="meta"))
    with pytest.raises(ValueError, match=r"kept int64 \[1, K\], got torch.int64 \[2, 3\]"):
        sparse(torch.zeros(1, 3, 224, 224), torch.zeros(2, 3, dtype=torch.int64))


def test_compiles_into_one_graph() -> None:
    sparse = SparseViT(make_teacher("deit_tiny_patch16_224", depth=2))
    images, kept = torch.randn(1, 3, 224, 224), random_kept(1, 5, 196)
    jitter = (torch.tensor([3, -17]), torch.tensor(True))
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    expected = sparse(images, kept, jitter=jitter, importance=True)
    traced = compiled(images, kept, jitter=jitter, importance=True)
    torch.testing.assert_close(traced.logits, expected.logits)
    torch.testing.assert_close(traced.importance, expected.importance)


def test_pixel_mask_is_of_the_kept_patches(teacher: VisionTransformer) -> None:
    sparse, kept = SparseViT(teacher), torch.tensor([[0, 8, 23], [5, 6, 7]])
    mask = sparse.pixel_mask(kept)
    assert mask.dtype == torch.bool and torch.equal(mask.expand(-1, 3, -1, -1), pixels_of(kept))
    assert mask.shape == (2, 1, 32, 48) and sparse.pixel_mask(sparse.every_patch(2)).all()
    assert not sparse.pixel_mask(kept[:, :0]).any()


def test_a_loop_of_your_own_freezes_the_background_with_it(teacher: VisionTransformer) -> None:
    sparse, kept = SparseViT(teacher), random_kept(2, 5, 24)
    background = random_images(teacher).double()
    images = background.clone().requires_grad_()
    frozen = torch.where(sparse.pixel_mask(kept), images, background)
    (gradient,) = torch.autograd.grad(sparse(frozen, kept).logits.square().sum(), images)
    assert torch.equal(gradient != 0, pixels_of(kept))


@pytest.mark.parametrize("name", TEACHERS)
def test_patches_that_were_gathered_before(name: str) -> None:
    teacher = SparseViT(make_teacher(name))
    images = random_images(teacher.vit)
    kept = random_kept(len(images), teacher.num_patches, max(1, teacher.num_patches // 3))
    patches, _ = ops.gather_patches(images, kept, patch_size=teacher.patch_size)
    patches = patches.detach().requires_grad_()
    expected = teacher(images, kept, importance=True)
    found = teacher.forward_patches(patches, kept, importance=True)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.importance, expected.importance)
    found.logits.square().sum().backward()
    assert patches.grad.abs().amax(dim=(1, 2)).min() > 0


def test_forward_patches_says_what_it_expected(teacher: VisionTransformer) -> None:
    sparse = SparseViT(teacher)
    width = 3 * sparse.patch_size**2
    patches, kept = torch.zeros(2, 3, width).to(sparse.dtype), torch.tensor([[0, 1, 2], [3, 1, 0]])
    last = sparse.num_patches - 1
    for given, places, sentence in (
        (
            patches[0],
            kept,
            rf"patches {sparse.dtype} \[B, K, {width}\] .* got .* \[3, ",
        ),
        (patches[..., 1:], kept, rf"patches {sparse.dtype} \[B, K, {width}\] for this"),
        (patches.byte(), kept, "for this teacher, got torch.uint8"),
        (patches, kept[:, :2], r"kept int64 \[2, 3\] for these patches, got torch.int64 \[2, 2\]"),
        (patches, kept.int(), "for these patches, got torch.int32"),
        (patches, kept - 1, rf"expected kept in 0..{last}, got -1..2"),
        (patches, kept + last, rf"expected kept in 0..{last}, got {last}..{last + 3}"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sparse.forward_patches(given, places)
