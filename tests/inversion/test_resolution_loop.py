"""Images that grow in a run: it equals one inversion after another."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import (
    AttentionPrior,
    CrossEntropy,
    Dense,
    Fourier,
    Parametrization,
    Pixels,
    Pyramid,
    ResolutionSchedule,
    SparseViT,
)
from smi_fast.inversion.sizes import scale_shift
from smi_fast.ops.grid import patch_mask
from tests.helpers.inversions import TARGETS, frames, make, pixels_of, run
from tests.helpers.teachers import EVA, TEACHERS, make_teacher

T, AT = 10, 4
SCHEDULE = ResolutionSchedule((24, 48), at=(AT,))
SMALL = (16, 24)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("deit_tiny_distilled_patch16_224", (112, 112)),
        ("vit_small_patch14_reg4_dinov2", (112, 84)),
        ("vit_base_patch16_siglip_224", (64, 112)),
        ("deit_tiny_patch16_224 rectangle", (48, 80)),
        ("vit_small_patch16_dinov3", (48, 64)),
        ("eva02_tiny_patch14_224", (56, 42)),
    ],
)
def test_a_teacher_of_another_size_is_timms(name: str, size: tuple[int, int]) -> None:
    assert name in {**TEACHERS, **EVA}
    teacher = make_teacher(name)
    resized = copy.deepcopy(teacher)
    resized.set_input_size(img_size=size)
    images, sparse = torch.randn(2, 3, *size), SparseViT(teacher, probe=False)
    with torch.no_grad():
        found = sparse.at_size(size)
        torch.testing.assert_close(found(images).logits, resized(images), rtol=0, atol=1e-4)
        assert found.image_size == size and sparse.image_size == tuple(teacher.patch_embed.img_size)
        # The teacher itself stays as it was, and the weights are shared.
        assert found.vit.blocks[0].norm1.weight.data_ptr() == (
            teacher.blocks[0].norm1.weight.data_ptr()
        )
        sparse(torch.randn(1, 3, *sparse.image_size))


@pytest.mark.parametrize("size", [(100, 112), (0, 16)])
def test_a_size_of_no_whole_patches_is_refused(size: tuple[int, int]) -> None:
    sparse = SparseViT(make_teacher("deit_tiny_patch16_224", depth=1), probe=False)
    with pytest.raises(ValueError, match=r"expected a size that patches of 16 pixels divide, got"):
        sparse.at_size(size)


def tables() -> tuple[Tensor, Tensor]:
    """Even shifts, of which smaller images have half."""
    shift = 2 * torch.stack([torch.randint(-2, 3, (T,)), torch.randint(-3, 4, (T,))], dim=1)
    return shift, torch.rand(T) < 0.5


def chained(
    teacher: VisionTransformer, shift: Tensor, flip: Tensor, init: Tensor, **options: object
) -> tuple[Tensor, list[float]]:
    """Two dense inversions, of which the second starts from the enlarged images of the first."""
    shift, flip = shift.clone(), flip.clone()
    shift[AT - 1 : AT + 1], flip[AT - 1 : AT + 1] = 0, False
    small = SparseViT(teacher).at_size(SMALL)
    first = make(small, schedule=Dense(), iterations=AT, **options)
    images, _ = frames(first, init=init, jitter=(shift[:AT] // 2, flip[:AT]))
    enlarged = F.interpolate(images[-1], (32, 48), mode="bilinear", align_corners=False)
    second = make(teacher, schedule=Dense(), iterations=T - AT, **options)
    result = second.invert(TARGETS, init=enlarged, jitter=(shift[AT:], flip[AT:]), progress=False)
    return result.images, result.history["cross_entropy"]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("parametrization", [Pixels(), Fourier(), Pyramid()])
def test_equals_one_inversion_after_another(
    teacher: VisionTransformer, parametrization: Parametrization
) -> None:
    shift, flip = tables()
    init = torch.rand(2, 3, *SMALL, dtype=torch.float64)
    options = {"parametrization": parametrization}
    inverter = make(teacher, schedule=SCHEDULE, **options)
    result = inverter.invert(TARGETS, init=init, jitter=(shift, flip), progress=False)
    images, entropy = chained(teacher, shift, flip, init, **options)
    torch.testing.assert_close(result.images, images, rtol=0, atol=1e-8)
    assert result.history["cross_entropy"][AT:] == pytest.approx(entropy, abs=1e-8)
    assert [(p.patches, p.iterations) for p in result.timing] == [(6, AT), (24, T - AT)]
    assert result.masks.all() and result.masks.shape == (2, 4, 6)


@pytest.mark.parametrize("parametrization", [Pixels(), Fourier()])
def test_what_does_not_stay_is_the_enlarged_image(
    teacher: VisionTransformer, parametrization: Parametrization
) -> None:
    schedule = ResolutionSchedule((24, 48), at=(AT,), keep=1 / 3)
    options = {"schedule": schedule, "parametrization": parametrization}
    images, kept = frames(make(teacher, **options))
    result = run(teacher, **options)
    assert [len(patches[0]) for patches in kept] == [6] * AT + [8] * (T - AT)
    assert torch.equal(result.masks, patch_mask(kept[-1], 4, 6))
    enlarged = F.interpolate(images[AT - 1], (32, 48), mode="bilinear", align_corners=False)
    stays = pixels_of(kept[-1])
    torch.testing.assert_close(images[-1][~stays], enlarged[~stays], rtol=0, atol=1e-9)
    assert ((images[-1] - enlarged)[stays].abs() > 1e-3).double().mean() > 0.9
    # The parts of the patches that the small teacher finds most important before the last update.
    small = SparseViT(teacher).at_size(SMALL)
    importance = small(images[AT - 2], importance=True).importance
    parents = 3 * (kept[-1] // 6 // 2) + kept[-1] % 6 // 2
    best = importance.topk(2, dim=1).indices
    assert [{*row} for row in parents.tolist()] == [{*row} for row in best.tolist()]


def test_objectives_begin_anew_for_the_larger_grid(teacher: VisionTransformer) -> None:
    prior = AttentionPrior()
    result = run(teacher, schedule=SCHEDULE, objectives=[CrossEntropy(), prior])
    assert prior._mixtures.shape[-1] == 24 and len(result.history[prior.name]) == T


@pytest.mark.parametrize("number", [1, 6])
def test_an_interrupted_run_gives_whole_images(teacher: VisionTransformer, number: int) -> None:
    seen: list[Tensor] = []

    def callback(iteration: int, images: Tensor, kept: Tensor) -> None:
        seen.append(images.clone())
        if iteration == number:
            raise KeyboardInterrupt

    inverter = make(teacher, schedule=SCHEDULE)
    result = inverter.invert(TARGETS, progress=False, callback=callback)
    assert result.interrupted and result.iterations == number + 1
    assert result.masks.shape == (2, 4, 6) and len(result.history["cross_entropy"]) == number + 1
    last = F.interpolate(seen[-1], (32, 48), mode="bilinear", align_corners=False)
    pixels = inverter.settings.space.denormalize(last if number < AT else seen[-1])
    torch.testing.assert_close(result.images, pixels, rtol=0, atol=1e-12)
    whole = SparseViT(teacher)(inverter.settings.space.normalize(result.images)).logits
    torch.testing.assert_close(result.logits, whole)


def test_replaced_weights_are_those_of_the_small_teacher_too(teacher: VisionTransformer) -> None:
    changed = copy.deepcopy(teacher)
    inverter, sparse = make(changed, schedule=SCHEDULE), SparseViT(changed)
    for name in ("pos_embed", "norm.weight"):
        parent = changed.get_submodule(name.rpartition(".")[0])
        weight = changed.get_parameter(name).detach() * 1.5
        setattr(parent, name.rpartition(".")[2], torch.nn.Parameter(weight))
    small = torch.randn(2, 3, *SMALL, dtype=torch.float64)
    expected = SparseViT(changed).at_size(SMALL)(small).logits
    assert torch.equal(sparse.at_size(SMALL)(small).logits, expected)
    images = frames(inverter)[0]
    expected = frames(make(changed, schedule=SCHEDULE))[0]
    assert all(map(torch.equal, images, expected))
    assert not torch.equal(images[0], frames(make(teacher, schedule=SCHEDULE))[0][0])


def test_a_captured_loop_is_the_same(
    teacher: VisionTransformer, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = run(teacher, schedule=SCHEDULE)
    assert replays
    monkeypatch.setattr("smi_fast.inversion.loop.Loop._can_capture", lambda self: False)
    assert torch.equal(captured.images, run(teacher, schedule=SCHEDULE).images)


def test_shifts_are_scaled_to_the_nearest_pixel() -> None:
    shift = torch.tensor([[-3, 4], [5, -6], [7, 8]])[:, None].repeat(1, 2, 1)
    found = scale_shift(shift, {0: (16, 24), 1: (24, 36), 2: (32, 48)}, (32, 48))
    assert found[:, 0].tolist() == [[-1, 2], [4, -4], [7, 8]]
    assert torch.equal(found[:, 0], found[:, 1]) and shift[0, 0, 0] == -3
