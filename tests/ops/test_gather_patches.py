"""gather_patches against roll, flip, unfold and gather."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast import ops
from smi_fast.verify.cases import random_kept

pytestmark = pytest.mark.usefixtures("each_backend")


def roll_flip_unfold_gather(
    images: Tensor, positions: Tensor, shift: tuple[int, int], flip: bool, patch_size: int
) -> Tensor:
    """The docstring's expression: jitters the whole image, then picks patches."""
    jittered = images.roll(shift, (2, 3))
    jittered = jittered.flip(3) if flip else jittered
    patches = F.unfold(jittered, patch_size, stride=patch_size).mT
    return patches.gather(1, positions[..., None].expand(-1, -1, patches.shape[2]))


def published_cell(
    patch: int, shift: tuple[int, int], flip: bool, size: int, grid: tuple[int, int]
) -> int:
    """Where a patch goes, one by one: to the nearest cell, a half upwards, then mirrored."""
    row, column = divmod(patch, grid[1])
    row = int(row + (shift[0] / size + 0.5) // 1) % grid[0]
    column = int(column + (shift[1] / size + 0.5) // 1) % grid[1]
    return row * grid[1] + (grid[1] - 1 - column if flip else column)


def check(
    images: Tensor, kept: Tensor, shift: tuple[int, int], flip: bool, patch_size: int
) -> None:
    grid = images.shape[2] // patch_size, images.shape[3] // patch_size
    patches, positions = ops.gather_patches(images, kept, shift, flip, patch_size=patch_size)
    expected = [
        [published_cell(p, shift, flip, patch_size, grid) for p in row] for row in kept.tolist()
    ]
    assert positions.tolist() == expected
    jittered = roll_flip_unfold_gather(images, positions, shift, flip, patch_size)
    assert torch.equal(patches, jittered)


@pytest.mark.parametrize("flip", [False, True])
def test_window_gather_is_roll_flip_unfold_gather_for_every_shift(flip: bool) -> None:
    images, kept = torch.randn(2, 1, 96, 64), random_kept(2, 7, 24)
    for rows in range(-28, 29):
        for columns in range(-28, 29):
            check(images, kept, (rows, columns), flip, 16)


@pytest.mark.parametrize("patch_size", [7, 8, 14, 16, 32])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (6, 2)])
@pytest.mark.parametrize("count", [1, 6, "all"])
def test_patch_sizes_and_rectangles(
    patch_size: int, grid: tuple[int, int], count: int | str
) -> None:
    height, width = grid[0] * patch_size, grid[1] * patch_size
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    total = grid[0] * grid[1]
    kept = random_kept(2, total if count == "all" else int(count), total)
    for _ in range(10):
        shift = tuple(torch.randint(-2 * height, 2 * height, (2,)).tolist())
        check(images, kept, shift, bool(torch.rand(()) < 0.5), patch_size)


def test_strided_and_expanded_images() -> None:
    images, kept = torch.randn(3, 64, 80, 3).permute(0, 3, 2, 1), random_kept(3, 5, 20)
    check(images, kept, (-9, 21), True, 16)
    check(images[:1].expand(3, -1, -1, -1), kept, (8, -8), False, 16)


def test_jitter_may_be_tensors() -> None:
    images, kept = torch.randn(2, 3, 32, 32), random_kept(2, 5, 16)
    given = ops.gather_patches(images, kept, (5, -3), True, patch_size=8)
    tensors = ops.gather_patches(
        images, kept, torch.tensor([5, -3]), torch.tensor(True), patch_size=8
    )
    assert torch.equal(given[0], tensors[0]) and torch.equal(given[1], tensors[1])


def test_each_image_may_have_its_own_jitter() -> None:
    images, kept = torch.randn(3, 2, 24, 40, dtype=torch.float64), random_kept(3, 6, 15)
    shift, flip = torch.tensor([[5, -3], [0, 0], [-13, 38]]), torch.tensor([True, False, True])
    leaf = images.clone().requires_grad_()
    patches, positions = ops.gather_patches(leaf, kept, shift, flip, patch_size=8)
    grad = torch.randn_like(patches)
    (gradient,) = torch.autograd.grad(patches, leaf, grad)
    for i in range(3):
        alone = slice(i, i + 1)
        leaf = images[alone].clone().requires_grad_()
        expected = ops.gather_patches(leaf, kept[alone], shift[i], flip[i], patch_size=8)
        assert torch.equal(patches[alone], expected[0])
        assert torch.equal(positions[alone], expected[1])
        assert torch.equal(gradient[alone], torch.autograd.grad(expected[0], leaf, grad[alone])[0])


def test_jitter_of_each_with_one_flip_for_all() -> None:
    images, kept = torch.randn(2, 3, 16, 32), random_kept(2, 3, 8)
    shift = torch.tensor([[3, 1], [-2, 30]])
    given = ops.gather_patches(images, kept, shift, True, patch_size=8)
    spelt_out = ops.gather_patches(images, kept, shift, torch.tensor([True, True]), patch_size=8)
    assert torch.equal(given[0], spelt_out[0]) and torch.equal(given[1], spelt_out[1])


def test_gradient() -> None:
    images = torch.randn(2, 2, 12, 16, dtype=torch.float64, requires_grad=True)
    kept = random_kept(2, 5, 12)
    for shift, flip in (((0, 0), False), ((3, -5), True), ((-2, 2), False)):
        assert torch.autograd.gradcheck(
            lambda x, s=shift, f=flip: ops.gather_patches(x, kept, s, f, patch_size=4)[0], images
        )


def test_gradient_of_every_patch_covers_every_pixel_once() -> None:
    images = torch.zeros(1, 3, 32, 48, requires_grad=True)
    patches, _ = ops.gather_patches(images, torch.arange(24)[None], (-7, 13), True, patch_size=8)
    patches.sum().backward()
    assert torch.equal(images.grad, torch.ones_like(images))


def test_expanded_gradient() -> None:
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    kept = random_kept(2, 3, 4)
    patches, _ = ops.gather_patches(images, kept, (3, 2), False, patch_size=8)
    patches.sum().backward()
    mask, images.grad = images.grad, None
    patches, _ = ops.gather_patches(images, kept, (3, 2), False, patch_size=8)
    patches.backward(torch.full_like(patches, 1.0))
    assert torch.equal(mask, images.grad) and set(mask.unique().tolist()) == {0.0, 1.0}


def test_empty_batch() -> None:
    patches, positions = ops.gather_patches(
        torch.zeros(0, 3, 16, 16), torch.zeros(0, 2, dtype=torch.int64), patch_size=8
    )
    assert patches.shape == (0, 2, 192) and positions.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(3, 16, 16)},
            r"expected images \[B, C, H, W\], got .*\[3, 16, 16\]",
        ),
        ({"patch_size": 5}, "multiples of the patch size 5, got 16 x 16"),
        ({"images": torch.zeros(2, 3, 20, 16)}, "of the patch size 8, got 20 x 16"),
        ({"images": torch.zeros(2, 3, 16, 20)}, "of the patch size 8, got 16 x 20"),
        ({"kept": torch.zeros(2, 3)}, r"expected kept int64 \[2, K\], got torch.float32 \[2, 3\]"),
        ({"kept": torch.zeros(1, 3, dtype=torch.int64)}, r"kept int64 \[2, K\], got .* \[1, 3\]"),
        ({"kept": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, "on cpu, got one on meta"),
        ({"shift": torch.zeros(2)}, r"shift int64 \[2\] or \[2, 2\], got torch.float32"),
        ({"shift": torch.zeros(3, 2).long()}, r"shift int64 \[2\] or \[2, 2\], got .* \[3, 2\]"),
        ({"flip": torch.zeros(2)}, r"flip bool \[\] or \[2\], got torch.float32 \[2\]"),
        ({"flip": torch.zeros(1).bool()}, r"flip bool \[\] or \[2\], got torch.bool \[1\]"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    good = {
        "images": torch.zeros(2, 3, 16, 16),
        "kept": torch.zeros(2, 1, dtype=torch.int64),
        "patch_size": 8,
    }
    with pytest.raises(ValueError, match=message):
        ops.gather_patches(**(good | change))
