"""Importance: each kind against a plain formula on the kept tokens, and in the loop."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import (
    CrossEntropy,
    Dense,
    Jitter,
    PatchRebirth,
    SparseViT,
    Stop,
    TotalVariation,
    UserTerm,
)
from smi_fast.augmentations import GaussianNoise
from smi_fast.importance import NAMES, Attention, Gradient, Importance, Random, Rollout, Smoothed
from tests.helpers.inversions import frames, make, run
from tests.helpers.schedules import Rebirth
from tests.helpers.teachers import patch_as_published


def stops(teacher: VisionTransformer, importance: object, **options: Any) -> list[Stop]:
    """What a schedule is told, at the stops 3 and 6."""
    schedule = Rebirth()
    run(teacher, schedule=schedule, importance=importance, **options)
    return schedule.stops


def scored(teacher: VisionTransformer, importance: object) -> list[tuple[Tensor, Stop]]:
    """The images that are scored before each stop, and what the schedule is told."""
    images, _ = frames(make(teacher, schedule=Rebirth(), importance=importance))
    return [(images[stop.iteration - 2], stop) for stop in stops(teacher, importance)]


def maps_of(teacher: VisionTransformer, images: Tensor, kept: Tensor) -> list[Tensor]:
    """The attention [B, heads, N, N] of each block among the class token and kept patches."""
    plain = patch_as_published(copy.deepcopy(teacher))
    tokens = torch.cat([kept.new_zeros(len(kept), 1), kept + 1], dim=1)
    with torch.no_grad():
        return plain(images, tokens, tokens)[1]


@pytest.mark.usefixtures("each_backend")
def test_attention_is_that_of_the_class_token(teacher: VisionTransformer) -> None:
    for images, stop in scored(teacher, "attention"):
        row = maps_of(teacher, images, stop.kept)[-1][:, :, 0, 1:]
        torch.testing.assert_close(stop.importance, row.mean(1))
        ours = SparseViT(teacher)(images, stop.kept, importance=True).importance
        assert torch.equal(ours, stop.importance)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("blocks", [(0,), (-1,), (0, 1), (-2, -1)])
def test_attention_of_blocks_is_their_mean(
    teacher: VisionTransformer, blocks: tuple[int, ...]
) -> None:
    for images, stop in scored(teacher, Attention(blocks)):
        maps = maps_of(teacher, images, stop.kept)
        rows = torch.stack([maps[block][:, :, 0, 1:].mean(1) for block in blocks])
        torch.testing.assert_close(stop.importance, rows.mean(0))


@pytest.mark.usefixtures("each_backend")
def test_rollout_multiplies_the_attention_among_kept_tokens(teacher: VisionTransformer) -> None:
    for images, stop in scored(teacher, "rollout"):
        product = torch.eye(1 + stop.kept.shape[1], dtype=torch.float64)
        for maps in maps_of(teacher, images, stop.kept):
            product = (maps.mean(1) + torch.eye(maps.shape[-1])) / 2 @ product
        torch.testing.assert_close(product.sum(2), torch.ones_like(product[:, 0]))
        torch.testing.assert_close(stop.importance, product[:, 0, 1:])


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_rollout_begins_with_what_the_head_reads(pool: str) -> None:
    vit = VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5,
        global_pool=pool, class_token=False, reg_tokens=2,
    ).eval().double()  # fmt: skip
    taps = [f"attention.{block}" for block in range(3)]
    for images, stop in scored(vit, Rollout()):
        output = SparseViT(vit)(images, stop.kept, importance=True, taps=taps)
        product = torch.eye(2 + stop.kept.shape[1], dtype=torch.float64)
        for name in taps:
            product = (output.taps[name].mean(1) + torch.eye(len(product[-1]))) / 2 @ product
        patches = product[:, 2:]
        weights = torch.ones(2, patches.shape[1]) if pool == "avg" else output.importance
        row = (weights[:, :, None] * patches).sum(1) / weights.sum(1, keepdim=True)
        torch.testing.assert_close(stop.importance, row[:, 2:])


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_gradient_times_token(teacher: VisionTransformer, weight: float) -> None:
    """The loss's derivative for a factor of the token, by autograd through timm's own block."""

    def loss(images: Tensor, logits: Tensor) -> Tensor:
        return -weight * logits[:, 1].sum()

    options = {"objectives": [UserTerm(loss, "loss")], "importance": Gradient()}
    images, _ = frames(make(teacher, schedule=Rebirth(), **options))
    for stop in stops(teacher, **options):
        count = stop.kept.shape[1]
        factor = torch.ones(2, count, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            tokens = teacher._pos_embed(teacher.patch_embed(images[stop.iteration - 2]))
            index = torch.cat([stop.kept.new_zeros(2, 1), stop.kept + 1], dim=1)
            x = teacher.blocks[0](tokens.take_along_dim(index[:, :, None], 1))
        scaled = torch.cat([x[:, :1], x[:, 1:] * factor[:, :, None]], dim=1)
        logits = teacher.head(teacher.norm(teacher.blocks[1](scaled))[:, 0])
        (slope,) = torch.autograd.grad(loss(images[0], logits), factor)
        torch.testing.assert_close(stop.importance, slope.abs(), rtol=1e-7, atol=1e-14)
        assert slope.abs().max() > 1e-9


def test_random_is_one_order_of_the_generator(teacher: VisionTransformer) -> None:
    first, second = stops(teacher, "random")
    again = stops(teacher, Random())[1]
    assert torch.equal(second.importance, again.importance)
    on_grid = torch.zeros(2, 24).scatter(1, first.kept, first.importance)
    assert torch.equal(second.importance, on_grid.gather(1, second.kept))
    assert not torch.equal(first.importance[0], first.importance[1])
    other = Rebirth()
    run(teacher, seed=1, schedule=other, importance="random")
    assert not torch.equal(other.stops[0].importance, first.importance)


@pytest.mark.parametrize("name", ["attention", "rollout", "gradient", "random"])
def test_smoothed_is_the_mean_over_neighbours(teacher: VisionTransformer, name: str) -> None:
    (plain, _), (smoothed, _) = stops(teacher, name), stops(teacher, f"smoothed-{name}")
    on_grid = torch.zeros(2, 24, dtype=plain.importance.dtype)
    on_grid = on_grid.scatter(1, plain.kept, plain.importance).view(2, 1, 4, 6)
    mean = F.conv2d(on_grid, torch.full((1, 1, 3, 3), 1 / 9).to(on_grid), padding=1).flatten(1)
    torch.testing.assert_close(smoothed.importance, mean)


def test_a_function_is_an_importance(teacher: VisionTransformer) -> None:
    seen = []

    def columns(inputs: Any) -> Tensor:
        seen.append(dataclasses.replace(inputs, view=inputs.view.clone()))
        return (inputs.kept % inputs.teacher.grid[1]).double()

    images, _ = frames(make(teacher, schedule=Rebirth(), importance=columns))
    assert [len(inputs.kept[0]) for inputs in seen] == [24, 21]
    assert torch.equal(seen[0].view, images[1]) and not seen[0].view.requires_grad
    attention = SparseViT(teacher)(images[1], importance=True).importance
    assert torch.equal(seen[0].attention, attention)
    found = run(teacher, schedule=PatchRebirth(6), importance=columns, iterations=12)
    groups = found.sparse_images().kept.view(2, 6, 4)
    assert [(group % 6).unique().tolist() for group in groups[0]] == [
        [c] for c in (5, 4, 3, 2, 1, 0)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_parts_and_equal_copies_score_as_the_whole_batch(
    teacher: VisionTransformer, name: str
) -> None:
    options = {"objectives": [CrossEntropy()], "jitter": Jitter(share=0, flip=False)}
    whole = stops(teacher, name, **options)
    # With more copies the generator draws more before the random order.
    for ways in ({"max_batch": 1}, {} if "random" in name else {"copies": 2}):
        for stop, other in zip(whole, stops(teacher, name, **options, **ways), strict=True):
            assert torch.equal(stop.kept, other.kept)
            torch.testing.assert_close(other.importance, stop.importance)


def test_augmented_images_are_scored(teacher: VisionTransformer) -> None:
    plain, noisy = (stops(teacher, "rollout", augment=a) for a in (None, GaussianNoise(0.5)))
    assert (noisy[0].importance - plain[0].importance).abs().max() > 1e-4


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("name", ["rollout", "gradient"])
def test_a_captured_loop_scores_alike(teacher: VisionTransformer, name: str) -> None:
    captured = stops(teacher, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smi_fast.inversion.loop.Loop._can_capture", lambda self: False)
        for stop, other in zip(captured, stops(teacher, name), strict=True):
            assert torch.equal(stop.importance, other.importance)


class Wrong(Importance):
    """Returns what it was made with."""

    def __init__(self, scores: object) -> None:
        self.scores = scores

    def __repr__(self) -> str:
        return "Wrong()"

    def __call__(self, inputs: object) -> object:
        return self.scores


@pytest.mark.parametrize(
    ("importance", "kind", "message"),
    [
        ("size", ValueError, "expected importance attention, rollout, .*random, got 'size'"),
        ("smoothed-size", ValueError, "expected importance attention.*, got 'smoothed-size'"),
        (3, TypeError, "expected importance as a name or a function, got 3"),
        (Rollout, TypeError, "expected importance as a name or a function, got <class"),
        (
            Attention((5,)),
            ValueError,
            r"Attention\(blocks=\(5,\)\) can't score this teacher: .*blocks",
        ),
        (Smoothed(Gradient(2)), ValueError, r"can't score this teacher: expected blocks in -2..1"),
    ],
)
def test_what_is_no_importance_is_refused(
    teacher: VisionTransformer, importance: object, kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        make(teacher, importance=importance)


def test_a_teacher_that_can_not_be_scored_is_refused() -> None:
    size = {
        "img_size": (32, 48),
        "patch_size": 8,
        "embed_dim": 32,
        "num_heads": 2,
        "num_classes": 5,
    }
    without = VisionTransformer(**size, depth=2, class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match=r"can't score this teacher: .* no class token"):
        make(without, importance=Attention((-1,)))
    with pytest.raises(
        ValueError, match=r"'gradient' can't score this teacher: .*-1..0, got \(-2,"
    ):
        make(VisionTransformer(**size, depth=1), importance="gradient")


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (Wrong(None), r"Wrong\(\) to return scores \[2, 24\], got NoneType"),
        (Wrong(torch.zeros(2, 3)), r"Wrong\(\) to return scores \[2, 24\], got \[2, 3\]"),
        (Wrong(torch.ones(2, 24) > 0), r"return real numbers on cpu, got torch.bool on cpu"),
        (Wrong(torch.ones(2, 24, device="meta")), "real numbers on cpu, got torch.float32 on meta"),
        (Wrong(torch.full((2, 24), torch.nan)), "expected finite scores .* before the stop at 3"),
    ],
)
def test_what_is_no_score_is_refused(
    teacher: VisionTransformer, importance: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(teacher, importance=importance)


def test_gradient_needs_an_objective_that_reads_tokens(teacher: VisionTransformer) -> None:
    with pytest.raises(ValueError, match="needs an objective that depends on the tokens"):
        run(teacher, importance="gradient", objectives=[TotalVariation()])


def test_without_stops_nothing_is_scored(teacher: VisionTransformer) -> None:
    result = run(teacher, importance=Wrong(None), schedule=Dense())
    assert torch.equal(result.images, run(teacher, schedule=Dense()).images)


@pytest.mark.parametrize("blocks", [(), 5, "ab", (1.5,), (True,)])
def test_attention_needs_blocks(blocks: object) -> None:
    message = f"expected blocks, such as (-1,), got {blocks!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Attention(blocks)


def test_blocks_may_be_a_list() -> None:
    assert Attention([-1, 0]) == Attention((-1, 0))


@pytest.mark.parametrize("block", ["2", 1.0, None, True])
def test_gradient_needs_a_block(block: object) -> None:
    with pytest.raises(ValueError, match=f"^expected a block, such as -2, got {block!r}$"):
        Gradient(block)


@pytest.mark.parametrize("given", ["rollout", Rollout, None])
def test_smoothed_needs_an_importance(given: object) -> None:
    with pytest.raises(TypeError, match=r"^expected an importance to smooth, such as Rollout\(\)"):
        Smoothed(given)
