"""The published interface, called as the published script calls it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast import Dense, SparseInverter, StopSchedule
from tests.compat.published import NORMALIZER, make, seed, small_vit
from tests.helpers.inversions import PUBLISHED
from tests.helpers.teachers import patch_as_published, tiny_vit

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")


@pytest.fixture
def teacher() -> VisionTransformer:
    return tiny_vit(img_size=32)


@pytest.mark.parametrize(
    ("prune_it", "prune_ratio", "schedule"),
    [([-1], [0], Dense()), ([2, 5], [0.3, 0.3], StopSchedule((2, 5), (0.3, 0.3)))],
)
def test_draws_and_returns_what_the_published_loop_does(
    teacher: VisionTransformer, tmp_path: Path, prune_it: list, prune_ratio: list, schedule: Dense
) -> None:
    seed()
    smi = make(teacher, tmp_path)
    made = smi.synthesize(num_patches=17, prune_it=prune_it, prune_ratio=prune_ratio)

    # The published order of draws: noise, then targets, then two shifts and a flip per iteration.
    seed()
    init = torch.randn(size=[3, 3, 32, 32])
    targets = torch.randint(low=0, high=5, size=(3,)).sort()[0]
    shift, flip = torch.zeros(8, 2, dtype=torch.int64), torch.zeros(8, dtype=torch.bool)
    for it in range(8):
        if it + 1 not in prune_it and it not in prune_it:
            shift[it] = torch.tensor([random.randint(-4, 4), random.randint(-4, 4)])
            flip[it] = random.random() > 0.5
    inverter = SparseInverter(
        teacher,
        **PUBLISHED,
        schedule=schedule,
        mean=NORMALIZER.mean,
        std=NORMALIZER.std,
        iterations=8,
        background="regularized",
        final_mask="reranked",
    )
    expected = inverter.invert(targets, init=init, jitter=(shift, flip), progress=False)
    assert torch.equal(made["synthetic"], expected.images)
    assert torch.equal(made["masked_synthetic"], expected.over("black"))
    tokens = 17 if prune_it == [-1] else int(17 * 0.7 * 0.7)
    assert (expected.masks.flatten(1).sum(1) == min(tokens, 16)).all()

    shown = expected.images if prune_it == [-1] else expected.over("black")
    saved = np.stack([np.asarray(Image.open(tmp_path / f"0-{i}.png")) for i in range(3)])
    assert np.array_equal(saved, (shown * 255).byte().permute(0, 2, 3, 1).numpy())


def test_sample_gives_shuffled_batches_for_ever(teacher: VisionTransformer, tmp_path: Path) -> None:
    smi = make(teacher, tmp_path, iterations=1)
    with pytest.raises(RuntimeError, match="synthesize"):
        smi.sample()
    images = smi.synthesize(torch.tensor([0, 1, 2]), num_patches=17)["synthetic"]
    stored = {image.tobytes() for image in (images * 255).byte().numpy()}
    batches = [smi.sample() for _ in range(4)]
    assert [len(batch) for batch in batches] == [2, 1, 2, 1]
    epoch = torch.cat(batches[:2])
    assert {image.tobytes() for image in (epoch * 255).round().byte().numpy()} == stored


def test_transform_and_further_images(teacher: VisionTransformer, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    Image.new("L", (5, 5), 9).save(tmp_path / "more" / "grey.JPEG")
    Image.new("L", (5, 5), 9).save(tmp_path / "more" / "not_read.bmp")

    def transform(image: Image.Image) -> Tensor:
        return torch.tensor([*image.size, len(image.getbands())])

    smi = make(
        teacher, tmp_path / "pool", iterations=1, transform=transform, sample_batch_size=4,
        init_dataset=tmp_path / "more",
    )  # fmt: skip
    smi.synthesize(num_patches=17)
    assert sorted(smi.sample().tolist()) == [[5, 5, 3]] + [[32, 32, 3]] * 3


def test_patched_model_gives_the_same_images(tmp_path: Path) -> None:
    """As published's build_model patches it, and then called by the script with indices."""
    smi = make(small_vit(), tmp_path / "a")
    seed()
    plain = smi.synthesize(num_patches=17)
    teacher = patch_as_published(small_vit())
    smi = make(teacher, tmp_path / "b")
    seed()
    assert torch.equal(plain["synthetic"], smi.synthesize(num_patches=17)["synthetic"])
    every = torch.arange(17).expand(2, -1)
    logits, _, kept = teacher(smi.sample(), every, every)
    assert logits.shape == (2, 5) and torch.equal(kept, every)


def test_replaced_head_has_the_number_of_classes(tmp_path: Path) -> None:
    """A script calls reset_classifier on the patched model, or replaces the head itself."""
    teacher = patch_as_published(small_vit())
    teacher.reset_classifier(10)
    smi = make(teacher, tmp_path, num_classes=10)
    made = smi.synthesize(torch.tensor([7, 8, 9]), num_patches=17)
    assert made["targets"].tolist() == [7, 8, 9]
    teacher.head = nn.Linear(32, 12)
    assert make(teacher, tmp_path, num_classes=12).num_classes == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adv": 1.0}, "a student with adv=1.0, got None"),
        ({"bn": 0.5, "bnsource": "vgg"}, "bnsource resnet50v1 or resnet50v2, or a CNN, got 'vgg'"),
        ({"normalizer": None}, "a normalizer with mean and std, got None"),
        (
            {"img_shape": (3, 64, 64)},
            r"img_shape \(3, 32, 32\) and patch_size 8, got \(3, 64, 64\)",
        ),
        ({"patch_size": 16}, "patch_size 8, got .* and 16"),
        ({"num_classes": 1000}, "5 classes, got 1000"),
        ({"device": "meta"}, "the teacher on meta, it is on cpu"),
        ({"device": "cuda"}, "the teacher on cuda, it is on cpu"),
    ],
)
def test_what_cannot_be_done_is_refused(
    teacher: VisionTransformer, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(teacher, tmp_path, **options)


def test_other_token_count_is_refused(teacher: VisionTransformer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_patches=17 for this teacher, got 197"):
        make(teacher, tmp_path).synthesize()


def published_prior_terms(
    cnn: nn.Module, student: nn.Module, teacher: nn.Module, images: Tensor, targets: Tensor
) -> Tensor:
    """Cross-entropy + 0.3 bn + 0.7 adv, as the published loop writes them."""
    features: list[tuple[nn.Module, Tensor]] = []
    for norm in cnn.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_pre_hook(lambda norm, given: features.append((norm, given[0])))
    cnn(images)
    loss_bn = 0.0
    for index, (norm, x) in enumerate(features):
        flat = x.transpose(0, 1).flatten(1)
        distance = torch.norm(norm.running_var - flat.var(1, unbiased=False))
        distance = distance + torch.norm(norm.running_mean - x.mean([0, 2, 3]))
        loss_bn = loss_bn + distance * (10.0 if index == 0 else 1.0)
    logits = teacher(images)
    p, q = (torch.softmax(x / 3, dim=1) for x in (student(images), logits))
    m = (0.5 * (p + q)).clamp(0.01, 0.99)
    p, q = p.clamp(0.01, 0.99), q.clamp(0.01, 0.99)
    js = 0.5 * sum(F.kl_div(x.log(), m, reduction="batchmean") for x in (p, q))
    return F.cross_entropy(logits, targets) + 0.3 * loss_bn - 0.7 * js


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
def test_batch_norm_and_student_follow_the_published_loop(
    teacher: VisionTransformer, tmp_path: Path
) -> None:
    """Three iterations of torch's own Adam on the published loss, jittered as it is drawn."""
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3, 2), norms[0], nn.ReLU(), nn.Conv2d(4, 4, 3), norms[1])
    student = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 5))
    teacher.double().eval(), cnn.double().eval(), student.double()
    options = {"adv": 0.7, "bn": 0.3, "bnsource": cnn, "student": student, "tv2": 0}
    seed()
    smi = make(teacher, tmp_path, iterations=3, **options)
    made = smi.synthesize(num_patches=17)["synthetic"]
    assert student.training and not cnn[1]._forward_pre_hooks

    seed()
    pixels = torch.randn(3, 3, 32, 32, requires_grad=True)
    targets = torch.randint(low=0, high=5, size=(3,)).sort()[0]
    mean, std = (torch.tensor(x)[:, None, None] for x in (NORMALIZER.mean, NORMALIZER.std))
    adam = torch.optim.Adam([pixels], 0.25, betas=(0.5, 0.99))
    student.eval()
    for _ in range(3):
        moved = pixels.roll((random.randint(-4, 4), random.randint(-4, 4)), (2, 3))
        moved = moved.flip(3) if random.random() > 0.5 else moved
        adam.zero_grad()
        published_prior_terms(copy.deepcopy(cnn), student, teacher, moved, targets).backward()
        adam.step()
        pixels.data = torch.clamp(pixels.data, -mean / std, (1 - mean) / std)
    expected = (pixels.detach() * std + mean).clamp(0, 1)
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)


def test_published_source_of_batch_norm_is_torchvision(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pytest.importorskip("torchvision.models")
    asked = []

    def resnet50(weights: str) -> nn.Module:
        asked.append(models.get_weight(f"ResNet50_Weights.{weights}"))
        return models.resnet18().eval()

    monkeypatch.setattr(models, "resnet50", resnet50)
    smi = make(teacher, tmp_path, bn=0.01, bnsource="resnet50v1", iterations=1)
    assert asked == [models.ResNet50_Weights.IMAGENET1K_V1]
    assert len(smi.bn_hooks) == 20 and not smi.prior.training

    def offline(weights: str) -> nn.Module:
        raise OSError("no network")

    monkeypatch.setattr(models, "resnet50", offline)
    with pytest.raises(ValueError, match=r"weights of resnet50v2 can't be loaded .*no network"):
        make(teacher, tmp_path, bn=0.01)
