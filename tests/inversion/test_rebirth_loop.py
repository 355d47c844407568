"""Patch rebirth, whole: against the published description, and against a plain loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import (
    CrossEntropy,
    Fourier,
    Jitter,
    Parametrization,
    PatchRebirth,
    Pixels,
    Pyramid,
    SparseViT,
    TotalVariation,
    recipes,
)
from smi_fast.augmentations import GaussianNoise
from smi_fast.ops import gather_patches
from tests.helpers.inversions import SPACE, TARGETS, denormalized, frames, make, run
from tests.helpers.parametrizations import Linear

V, T, N, P, GRID = 4, 14, 24, 8, (4, 6)


def blackened(images: Tensor, patches: Tensor) -> Tensor:
    """Images [B, 3, 32, 48], black but in the patches [B, K]."""
    found = torch.zeros_like(images)
    for image, source, row in zip(found, images, patches.tolist(), strict=True):
        for patch in row:
            y, x = P * (patch // GRID[1]), P * (patch % GRID[1])
            image[:, y : y + P, x : x + P] = source[:, y : y + P, x : x + P]
    return found


@pytest.mark.parametrize("parametrization", [Pixels(), Fourier(), Pyramid(), Linear()])
def test_is_what_was_published(
    teacher: VisionTransformer, parametrization: Parametrization
) -> None:
    """At t_k the N/v active patches with the highest class-token attention are detached. Together
    they form one sparse image with the trajectory's label, all else is black; the others go on.
    """
    options = {"schedule": PatchRebirth(V), "iterations": T, "parametrization": parametrization}
    result, (images, _) = run(teacher, **options), frames(make(teacher, **options))
    found = result.sparse_images()
    assert len(found) == V * len(TARGETS)
    assert found.targets.tolist() == [label for label in TARGETS for _ in range(V)]
    assert found.trajectory.tolist() == [0] * V + [1] * V
    assert found.age.tolist() == [3, 6, 9, T] * 2  # t_k = k * floor(14 / 4)
    assert found.masks.dtype == torch.bool and found.masks.sum((1, 2)).tolist() == [N // V] * 8

    active = torch.arange(N).expand(2, -1)
    for k, age in enumerate((3, 6, 9, T)):
        group = found.kept[k::V]
        if age < T:
            # Class-token attention among the active patches, before the last update.
            scored = SparseViT(teacher)(images[age - 2], active, importance=True).importance
            best = scored.topk(N // V, dim=1).indices
            assert torch.equal(group, active.gather(1, best).sort(dim=1).values)
        pixels = denormalized(images[age - 1]).clamp(0, 1)
        inside = gather_patches(pixels, group, patch_size=P)[0]
        torch.testing.assert_close(found.pixels[k::V], inside, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            blackened(found.canvases, group), blackened(pixels, group), rtol=0, atol=1e-12
        )
        assert torch.equal(found.over("black")[k::V], blackened(found.canvases, group))
        alone = SparseViT(teacher)(images[age - 1], group).logits
        torch.testing.assert_close(found.logits[k::V], alone, rtol=0, atol=1e-9)
        stays = (active[:, :, None] != group[:, None]).all(2)
        active = active[stays].view(2, -1)
    assert active.shape[1] == 0  # the images cover the grid


def test_the_images_of_128_take_a_vth_of_the_trajectories(teacher: VisionTransformer) -> None:
    targets = torch.arange(32) % 5
    inverter = make(teacher, schedule=PatchRebirth(V), iterations=T)
    found = inverter.invert(targets, progress=False).sparse_images()
    assert len(found) == 128 and torch.equal(found.targets, targets.repeat_interleave(4))
    covered = found.kept.view(32, -1).sort(dim=1).values
    assert torch.equal(covered, torch.arange(N).expand(32, -1))


class PlainLoop:
    """Patch rebirth in plain PyTorch: whole images, tokens picked by hand, Adam by hand.

    Images are rolled by whole patches and mirrored. So the place of each patch is where its number
    is in a grid of numbers that is rolled and mirrored likewise.
    """

    lr, betas, eps, tv = 0.25, (0.5, 0.99), 1e-8, 1e-4

    def __init__(self, teacher: VisionTransformer, first: Tensor, targets: Tensor) -> None:
        self.teacher, self.images, self.targets = teacher, first.clone(), targets
        self.mean, self.std = (
            torch.tensor(SPACE[k], dtype=torch.float64)[:, None, None] for k in SPACE
        )
        self.m, self.s = torch.zeros_like(first), torch.zeros_like(first)

    def run(self, v: int, iterations: int, shift: Tensor, flip: Tensor) -> list[tuple]:
        """For each group its patches, and the pixels in [0, 1] when it leaves."""
        kept = torch.arange(N).expand(len(self.targets), -1)
        stops, found = [k * (iterations // v) for k in range(1, v)], []
        attention = torch.empty(0)
        for t in range(iterations):
            if t in stops:
                ranked = attention.argsort(dim=1, descending=True)
                found.append((kept.gather(1, ranked[:, : N // v]), self.pixels()))
                kept = kept.gather(1, ranked[:, N // v :])
            still = t in stops or t + 1 in stops
            down, right, mirrored = (0, 0, False) if still else (*shift[t].tolist(), bool(flip[t]))
            attention = self.step(t + 1, kept, (down, right), mirrored)
        return [*found, (kept, self.pixels())]

    def pixels(self) -> Tensor:
        return (self.images * self.std + self.mean).clamp(0, 1)

    def step(self, number: int, kept: Tensor, shift: tuple[int, int], mirrored: bool) -> Tensor:
        """One iteration, counted from 1; returns the attention to the kept patches."""
        images = self.images.clone().requires_grad_()
        seen, cells = images.roll(shift, (2, 3)), torch.arange(N).view(GRID)
        cells = cells.roll((shift[0] // P, shift[1] // P), (0, 1))
        if mirrored:
            seen, cells = seen.flip(3), cells.flip(1)
        logits, attention = self.forward(seen, cells.flatten().argsort()[kept])
        mask = blackened(torch.ones_like(images), kept).bool()
        loss = F.cross_entropy(logits, self.targets) + self.tv * variation(images, mask)
        (gradient,) = torch.autograd.grad(loss, images)
        first, second = self.betas
        m = first * self.m + (1 - first) * gradient
        s = second * self.s + (1 - second) * gradient**2
        deviation = (s / (1 - second**number)).sqrt() + self.eps
        moved = self.images - self.lr * (m / (1 - first**number)) / deviation
        moved = moved.clamp(-self.mean / self.std, (1 - self.mean) / self.std)
        self.m, self.s = torch.where(mask, m, self.m), torch.where(mask, s, self.s)
        self.images = torch.where(mask, moved, self.images)
        return attention

    def forward(self, images: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the class token's attention to the patches at ``places`` [B, K]."""
        vit = self.teacher
        tokens = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        tokens = tokens.take_along_dim(places[:, :, None], 1)
        x = torch.cat(
            [(vit.cls_token + vit.pos_embed[:, :1]).expand(len(tokens), -1, -1), tokens], 1
        )
        maps = torch.empty(0)
        for block in vit.blocks:
            qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.num_heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            maps = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            x = x + block.attn.proj((maps @ v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return vit.head(vit.norm(x)[:, 0]), maps[:, :, 0, 1:].mean(1).detach()


def variation(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of the norms of four neighbour differences, where one of the two is in the mask."""
    pairs = [
        (x[..., 1:, :] - x[..., :-1, :], mask[..., 1:, :] | mask[..., :-1, :]),
        (x[..., 1:] - x[..., :-1], mask[..., 1:] | mask[..., :-1]),
        (x[..., 1:, 1:] - x[..., :-1, :-1], mask[..., 1:, 1:] | mask[..., :-1, :-1]),
        (x[..., 1:, :-1] - x[..., :-1, 1:], mask[..., 1:, :-1] | mask[..., :-1, 1:]),
    ]
    return sum((difference * counts).norm() for difference, counts in pairs)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(("v", "iterations"), [(2, 10), (4, 14), (6, 20)])
def test_equals_a_plain_loop(teacher: VisionTransformer, v: int, iterations: int) -> None:
    first = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    shift = torch.stack([torch.randint(-2, 3, (iterations,)), torch.randint(-3, 4, (iterations,))])
    shift, flip = P * shift.T.contiguous(), torch.rand(iterations) < 0.5
    loop = PlainLoop(teacher, first, torch.tensor(TARGETS))
    expected = loop.run(v, iterations, shift, flip)
    inverter = make(teacher, schedule=PatchRebirth(v), iterations=iterations)
    result = inverter.invert(TARGETS, init=first, jitter=(shift, flip), progress=False)
    found = result.sparse_images()
    assert len(expected) == v
    for k, (kept, pixels) in enumerate(expected):
        assert torch.equal(found.kept[k::v], kept.sort(dim=1).values)
        torch.testing.assert_close(
            blackened(found.canvases, kept), blackened(pixels, kept), rtol=0, atol=1e-9
        )
    torch.testing.assert_close(result.images, loop.pixels(), rtol=0, atol=1e-9)


SPLIT = {
    "copies": {"copies": 2, "jitter": Jitter(per_image=True)},
    "parts": {"max_batch": 1, "objectives": (CrossEntropy(), TotalVariation())},
    "augment": {"augment": GaussianNoise(0.1)},
    "regularized": {"background": "regularized"},
    "recipe": recipes.clear().options(iterations=T, schedule=PatchRebirth(V, order="random")),
}


@pytest.mark.parametrize("name", SPLIT)
def test_works_with(teacher: VisionTransformer, name: str) -> None:
    """Every image is of one age, and its pixels are those of its patches when they left."""
    options = {"schedule": PatchRebirth(V), "iterations": T, **SPLIT[name]}
    result, (images, _) = run(teacher, **options), frames(make(teacher, **options))
    found = result.sparse_images()
    for k, age in enumerate((3, 6, 9, T)):
        pixels = denormalized(images[age - 1]).clamp(0, 1)
        inside = gather_patches(pixels, found.kept[k::V], patch_size=P)[0]
        torch.testing.assert_close(found.pixels[k::V], inside, rtol=0, atol=1e-12)
        shown = gather_patches(found.canvases, found.kept[k::V], patch_size=P)[0]
        assert torch.equal(shown, found.pixels[k::V])
    again = run(teacher, **options).sparse_images()
    assert torch.equal(again.kept, found.kept) and torch.equal(again.pixels, found.pixels)


def test_parts_give_the_images_of_the_whole_batch(teacher: VisionTransformer) -> None:
    options = {"objectives": (CrossEntropy(),), "schedule": PatchRebirth(V), "iterations": T}
    whole = run(teacher, **options).sparse_images()
    parts = run(teacher, **options, max_batch=1).sparse_images()
    assert torch.equal(whole.kept, parts.kept)
    torch.testing.assert_close(parts.pixels, whole.pixels, rtol=0, atol=1e-9)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=0, atol=1e-9)


def test_without_rebirth_each_trajectory_is_one_sparse_image(teacher: VisionTransformer) -> None:
    result = run(teacher)
    found = result.sparse_images()
    assert torch.equal(found.kept, result.kept) and torch.equal(found.masks, result.masks)
    assert torch.equal(found.canvases, result.images) and torch.equal(found.logits, result.logits)
    assert (found.trajectory.tolist(), found.age.tolist()) == ([0, 1], [10, 10])


def test_groups_of_different_sizes_are_refused(teacher: VisionTransformer) -> None:
    def stop(number: int, images: Tensor, kept: Tensor) -> None:
        if number == 7:
            raise KeyboardInterrupt

    inverter = make(teacher, schedule=PatchRebirth(V), iterations=T)
    result = inverter.invert(TARGETS, progress=False, callback=stop)
    assert result.interrupted
    with pytest.raises(
        ValueError, match=r"groups of one size, got 6, 6, 12 patches: read finished"
    ):
        result.sparse_images()
