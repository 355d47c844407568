"""Attributes and further methods of the published class, and those of its forks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from smi_fast.compat.pool import to_tensor
from smi_fast.compat.smi import same_device
from smi_fast.inversion.loop import Loop
from tests.compat.published import NORMALIZER, make, seed, small_vit

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")


def images(smi: Any, **options: Any) -> Tensor:
    seed()
    return smi.synthesize(num_patches=17, **options)["synthetic"]


def small_cnn() -> nn.Module:
    seed(9)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())


def test_attributes_have_the_published_names(tmp_path: Path) -> None:
    teacher, student, folder = small_vit(), nn.Dropout(), tmp_path / "a" / "b"
    smi = make(teacher, folder, student=student, oh=2, tv1=0.3, l2=0.1, save_dir=str(folder))
    assert folder.is_dir() and smi.data_pool.root == smi.save_dir == str(folder)
    assert smi.teacher is teacher and smi.student is student
    assert smi.img_size == (3, 32, 32) and smi.patch_size == 8 and smi.num_classes == 5
    weights = smi.adv, smi.bn, smi.oh, smi.tv1, smi.tv2, smi.l2
    assert weights == (0, 0, 2, 0.3, 1e-4, 0.1)
    assert (smi.lr_g, smi.iterations, smi.device) == (0.25, 8, "cpu")
    assert (smi.normalizer, smi.transform, smi.init_dataset) == (NORMALIZER, None, None)
    assert smi.data_iter is None and smi.prior is None and smi.bn_hooks == []
    assert smi.synthesize(num_patches=17).keys() == {"synthetic", "masked_synthetic", "targets"}
    assert [len(smi.data_iter.next()), len(smi.sample()), len(smi.sample())] == [2, 1, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr_g", 0.1), ("oh", 0), ("tv1", 1.0), ("tv2", 1.0), ("l2", 1.0), ("iterations", 3)],
)
def test_changed_attributes_count(tmp_path: Path, name: str, value: float) -> None:
    changed = make(small_vit(), tmp_path / "a")
    before = images(changed)
    setattr(changed, name, value)
    after = images(changed)
    assert not torch.equal(before, after)
    assert torch.equal(after, images(make(small_vit(), tmp_path / "b", **{name: value})))


def test_changed_networks_count(tmp_path: Path) -> None:
    smi = make(small_vit(), tmp_path / "a", bn=0.1, bnsource=small_cnn())
    before = images(smi)
    with torch.no_grad():
        smi.prior[0].weight.mul_(2)
    assert not torch.equal(images(smi), before)
    smi.bn = 0
    other = small_vit()
    nn.init.normal_(other.head.weight)
    smi.teacher = other
    assert torch.equal(images(smi), images(make(other, tmp_path / "b")))
    for name, value, message in [
        ("num_classes", 4, "5 classes, got 4"),
        ("adv", 1.0, "a student with adv=1.0"),
        ("img_size", (3, 64, 64), "teacher's img_shape"),
    ]:
        before = getattr(smi, name)
        setattr(smi, name, value)
        with pytest.raises(ValueError, match=message):
            images(smi)
        setattr(smi, name, before)
    smi.prior, smi.bn = None, 0.1
    with pytest.raises(ValueError, match=r"bn=0.1 in the constructor, or a CNN as prior"):
        images(smi)


def test_weights_of_zero_leave_the_noise(tmp_path: Path) -> None:
    made = images(make(small_vit(), tmp_path, oh=0, tv2=0))
    seed()
    mean, std = (torch.tensor(x)[:, None, None] for x in (NORMALIZER.mean, NORMALIZER.std))
    torch.testing.assert_close(made, (torch.randn(3, 3, 32, 32) * std + mean).clamp(0, 1))


def test_student_and_teacher_are_left_in_the_published_modes(tmp_path: Path) -> None:
    teacher, student = small_vit().train(), nn.Dropout().eval()
    images(make(teacher, tmp_path, student=student))
    assert student.training and not teacher.training


def test_hooks_measure_calls_of_the_prior(tmp_path: Path) -> None:
    smi = make(small_vit(), tmp_path, bn=0.1, bnsource=small_cnn())
    (hook,) = smi.bn_hooks
    x = torch.randn(2, 3, 32, 32)
    smi.prior(x)
    seen = smi.prior[0](x)
    variance, mean = seen.var((0, 2, 3), unbiased=False), seen.mean((0, 2, 3))
    expected = (1 - variance).norm() + mean.norm()
    torch.testing.assert_close(hook.r_feature, expected)
    assert hook.module is smi.prior[1]
    images(smi)  # although the hook holds a graph
    hook.remove()
    assert not smi.prior[1]._forward_hooks


def test_data_pool_is_a_folder_of_images(tmp_path: Path) -> None:
    smi = make(small_vit(), tmp_path / "pool")
    smi.data_pool.add(torch.full((2, 3, 4, 6), 2.0))  # clamped
    smi.data_pool.add(torch.zeros(1, 3, 4, 6))
    names = {path.name for path in (tmp_path / "pool").iterdir()}
    assert names == {"0-0.png", "0-1.png", "1-0.png"}
    plain = smi.data_pool.get_dataset()
    assert len(plain) == 3 and all(isinstance(image, Image.Image) for image in plain)
    tensors = smi.data_pool.get_dataset(transform=to_tensor)
    assert sorted(float(tensor.mean()) for tensor in tensors) == [0, 1, 1]
    assert tensors[0].shape == (3, 4, 6)


def test_a_device_without_an_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    cuda = torch.device("cuda")
    assert same_device(torch.device("cuda:1"), cuda) and same_device(cuda, cuda)
    assert not same_device(torch.device("cuda:0"), cuda)
    assert not same_device(torch.device("cpu"), cuda)
    assert same_device(torch.device("cpu"), torch.device("cpu:0"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ldr": 1, "ratio": [0] * 12}, r"^ldr, ratio of Eff-DFQT and SMI-V2 .* token merging"),
        ({"depth": 3}, "SMI has no argument depth"),
    ],
)
def test_arguments_of_other_classes_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        make(small_vit(), tmp_path, **options)


def test_share_of_a_soft_label_is_a_probability(tmp_path: Path) -> None:
    smi = make(small_vit(), tmp_path)
    with pytest.raises(ValueError, match=r"soft_label_alpha in \[0, 1\], got 1.5"):
        images(smi, use_soft_label=True, soft_label_alpha=1.5)


def test_interrupt_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(loop: Loop, iterations: range) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "run", press)
    smi = make(small_vit(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        images(smi)
    assert not list(tmp_path.iterdir()) and smi.data_iter is None
