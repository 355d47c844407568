"""Numbers of patches of their own: each image is as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from smi_fast import SparseViT
from smi_fast.engine.cpu import CpuEngine
from smi_fast.teacher.ragged import RaggedRows
from smi_fast.verify.cases import random_kept
from tests.helpers.teachers import make_teacher, random_images, relative_error

LENGTHS = [7, 20, 1]


def with_gradient(sparse: SparseViT, images: Tensor, kept: Tensor, **options: object) -> tuple:
    images = images.clone().requires_grad_()
    output = sparse(images, kept, importance=True, **options)
    (gradient,) = torch.autograd.grad(torch.linalg.vector_norm(output.logits, dim=1).sum(), images)
    return output.logits.detach(), output.importance, gradient


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224 rectangle",
        "deit_tiny_distilled_patch16_224",
        "vit_tiny_patch16_224 qk norm",
        "vit_small_patch16_dinov3",
        "vit_small_patch16_rope_mixed_224",
    ],
)
def test_each_image_is_as_if_it_were_alone(name: str) -> None:
    teacher = make_teacher(name, depth=3)
    if teacher.global_pool != "token" or teacher.attn_pool is not None:
        teacher = make_teacher(name, depth=3, global_pool="token", class_token=True)
    sparse, images = SparseViT(teacher), random_images(teacher, 3)
    kept = random_kept(3, 20, teacher.patch_embed.num_patches)
    shift, flip = torch.tensor([[3, -5], [16, 2], [0, 9]]), torch.tensor([True, False, True])
    lengths = torch.tensor(LENGTHS)
    logits, importance, gradient = with_gradient(
        sparse, images, kept, lengths=lengths, jitter=(shift, flip)
    )
    for i, length in enumerate(LENGTHS):
        alone = (images[i : i + 1], kept[i : i + 1, :length])
        expected = with_gradient(sparse, *alone, jitter=(shift[i : i + 1], flip[i : i + 1]))
        assert relative_error(logits[i : i + 1], expected[0]) < 1e-5
        torch.testing.assert_close(importance[i, :length], expected[1][0], rtol=1e-4, atol=1e-7)
        assert not importance[i, length:].any()
        assert relative_error(gradient[i : i + 1], expected[2]) < 1e-4
        # Pixels that no patch shows have no gradient at all.
        assert torch.equal(gradient[i : i + 1] != 0, expected[2] != 0)


def test_all_lengths_equal_to_the_number_kept_change_nothing() -> None:
    teacher = make_teacher("deit_tiny_patch16_224", depth=2)
    sparse, images, kept = SparseViT(teacher), random_images(teacher), random_kept(2, 9, 196)
    whole = with_gradient(sparse, images, kept)
    found = with_gradient(sparse, images, kept, lengths=torch.tensor([9, 9]))
    for ours, expected in zip(found, whole, strict=True):
        assert relative_error(ours, expected) < 1e-4


def test_what_is_behind_the_length_does_not_matter() -> None:
    sparse = SparseViT(make_teacher("deit_tiny_patch16_224", depth=2))
    images, lengths = torch.randn(2, 3, 224, 224), torch.tensor([3, 0])
    first = torch.arange(8).expand(2, -1)
    other = torch.cat([first[:, :3], first[:, 3:] + 90], dim=1)
    other[1] = torch.arange(40, 48)
    found = [sparse(images, kept, lengths=lengths).logits for kept in (first, other)]
    assert torch.equal(*found) and found[0].isfinite().all()


@pytest.fixture
def rows_of_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of rows of each linear layer that a block runs."""
    rows: list[int] = []
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        rows.append(x.numel() // x.shape[-1])
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    return rows


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_padded_rows_cost_no_product(
    rows_of_layers: list[int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_teacher("deit_tiny_patch16_224", depth=3)
    sparse = SparseViT(teacher, probe=False, backend=backend)
    run, run_last, packed = CpuEngine.run_ragged, CpuEngine.last_block_rows, []

    def watched(self: CpuEngine, rows: Tensor, *arguments: object) -> Tensor:
        packed.append(len(rows))
        return run(self, rows, *arguments)

    def watched_last(self: CpuEngine, x: Tensor, read: int, offsets: Tensor) -> object:
        packed.append(len(x[0]))
        return run_last(self, x, read, offsets=offsets)

    monkeypatch.setattr(CpuEngine, "run_ragged", watched)
    monkeypatch.setattr(CpuEngine, "last_block_rows", watched_last)
    rows_of_layers.clear()
    images, kept = torch.randn(3, 3, 224, 224), random_kept(3, 20, 196)
    sparse(images, kept, lengths=torch.tensor(LENGTHS))
    count = sum(LENGTHS) + 3
    # Projection and two layers of the MLP, of two blocks; of the last only the class tokens; head.
    assert rows_of_layers == ([count] * 6 + [3] * 4 if backend == "reference" else [3])
    assert packed == ([] if backend == "reference" else [count] * 2)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"]
)
def test_the_engine_gives_what_blocks_one_by_one_give(name: str, depth: int) -> None:
    """In float64; one image has no patch at all."""
    teacher = make_teacher(name, depth=depth, img_size=56 if "14" in name else 64).double()
    images, lengths = random_images(teacher, 4).double(), torch.tensor([5, 0, 12, 1])
    kept = random_kept(4, 12, teacher.patch_embed.num_patches)
    found = [
        with_gradient(SparseViT(teacher, backend=backend), images, kept, lengths=lengths)
        for backend in ("auto", "reference")
    ]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert found[0][1].shape == (4, 12) and not found[0][1][1].any()


def test_the_engine_refuses_offsets_that_do_not_fit() -> None:
    qkv, q_bias, out = torch.randn(1, 5, 3, 2, 8), torch.zeros(16), torch.empty(1, 5, 16)
    for offsets in ([0, 3], [1, 5], [0, 4, 3, 5], [0, 6], []):
        with pytest.raises(RuntimeError, match="expected ascending offsets from 0 to 5"):
            torch.ops.smi_fast.attend_(qkv, q_bias, out, torch.tensor(offsets, dtype=torch.int64))
    engine = CpuEngine(make_teacher("deit_tiny_patch16_224", depth=1).blocks)
    for offsets, message in (
        ([0, 4, 5], "at least 2 tokens in each image, got 1"),
        ([0, 3], "ascending offsets from 0 to 5"),
    ):
        with pytest.raises(RuntimeError, match=f"expected {message}"):
            engine.last_block_rows(torch.randn(1, 5, 192), 2, offsets=torch.tensor(offsets))
    rows = torch.randn(2, 1, 16), q_bias, torch.randn(1, 5, 2, 2, 8)
    for offsets, message in (
        ([0, 5], "keys of 2 images, got 1"),
        ([0, 5, 5], "a token in each image, got none in 1"),
    ):
        with pytest.raises(RuntimeError, match=f"expected {message}"):
            torch.ops.smi_fast.attend_rows(*rows, torch.tensor(offsets))


def test_rows_are_packed_and_unpacked() -> None:
    x = torch.randn(3, 5, 2)
    rows = RaggedRows.of(torch.tensor([2, 0, 5]), 5, packed=True)
    packed = rows.pack(x)
    assert torch.equal(packed[0], torch.cat([x[0, :2], x[2]]))
    back = rows.unpack(packed)
    assert torch.equal(back[0, :2], x[0, :2]) and torch.equal(back[2], x[2])
    assert not back[0, 2:].any() and not back[1].any()
    padded = RaggedRows.of(torch.tensor([2, 0, 5]), 5, packed=False)
    assert padded.pack(x) is x and padded.unpack(x) is x


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([1, 5]), r"numbers in 0\.\.4, got \[1, 5\]"),
        (torch.tensor([-1, 2]), r"numbers in 0\.\.4, got \[-1, 2\]"),
        (torch.tensor([1]), r"got torch.int64 \[1\] on cpu"),
        (torch.tensor([1.0, 2.0]), r"got torch.float32 \[2\] on cpu"),
        (torch.tensor([1, 2], device="meta"), r"got torch.int64 \[2\] on meta"),
        ([1, 2], "got list"),
    ],
)
def test_wrong_lengths_are_refused(lengths: object, message: str) -> None:
    sparse = SparseViT(make_teacher("deit_tiny_patch16_224", depth=1), probe=False)
    images, kept = torch.randn(2, 3, 224, 224), torch.arange(4).expand(2, -1)
    with pytest.raises(ValueError, match=f"^expected lengths int64 .*{message}$"):
        sparse(images, kept, lengths=lengths)


def test_what_reads_every_token_is_refused() -> None:
    name = "vit_tiny_patch16_224 average with class token"
    images, lengths = torch.randn(1, 3, 224, 224), torch.tensor([3])
    with pytest.raises(ValueError, match="whose head reads its class token with lengths, got one"):
        SparseViT(make_teacher(name), probe=False)(images, lengths=lengths)
    teacher = make_teacher("deit_tiny_patch16_224", depth=2)
    message = "^expected neither taps nor until together with lengths$"
    for options in ({"taps": ["block.0.tokens"]}, {"until": 1}):
        with pytest.raises(ValueError, match=message):
            SparseViT(teacher, probe=False)(images, lengths=lengths, **options)
    with pytest.raises(ValueError, match=r"^expected no narrow together with lengths, got {1: 0.5"):
        SparseViT(teacher, probe=False, narrow={1: 0.5})(images, lengths=lengths)
