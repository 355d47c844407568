"""The benchmark that runs a checkout of the published code, here a small stand-in for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import published_code
from benchmarks.speed import yardstick
from benchmarks.speed.loops import Workload, time_phases
from smi_fast import StopSchedule

BUILD = """
from types import MethodType
import torch
from timm.models.vision_transformer import VisionTransformer

def forward(self, x, now, then):
    now = now if now.shape == then.shape else now.gather(1, then)
    return self.head(x.mean((2, 3)).repeat(1, 2)), [], now

def build_model(name, Pretrained):
    assert (name, Pretrained) == ("deit_tiny_patch16_224", False)
    net = VisionTransformer(img_size=32, patch_size=8, embed_dim=6, depth=1, num_heads=1)
    net.forward = MethodType(forward, net)
    return net.cuda()
"""
SMI = """
import torch
from tqdm import tqdm

class SMI:
    def __init__(self, teacher, name, student, num_classes, iterations, synthesis_batch_size, tv2,
                 save_dir, normalizer):
        assert tv2 == 1e-4 and num_classes == 1000
        self.teacher, self.iterations, self.size = teacher, iterations, synthesis_batch_size
        self.normalizer = normalizer

    def synthesize(self, targets, num_patches, prune_it, prune_ratio):
        now = torch.arange(num_patches).repeat(self.size, 1)
        then = now
        for it in tqdm(range(self.iterations)):
            print("noise")
            if it in prune_it:
                left = int((now.shape[1] - 1) * (1 - prune_ratio[prune_it.index(it)]))
                then = torch.arange(left + 1).repeat(self.size, 1)
            _, _, now = self.teacher(torch.full((self.size, 3, 32, 32), float(it)), now, then)
        self.normalizer(torch.zeros(self.size, 3, 32, 32), True)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("utils/build_model.py", BUILD), ("synthesis/smi.py", SMI)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    for name in ("synthesis", "synthesis.smi"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_iterations_of_the_published_code_are_seen_from_outside(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vit = published_code.teacher_of(checkout, "deit_tiny_patch16_224").teacher
    workload = Workload(vit, torch.tensor([1, 4]), torch.randn(2, 3, 32, 32))
    run = yardstick.published_code_loop(checkout, "deit_tiny", workload)
    seen: list[tuple[int, float, int]] = []

    def callback(number: int, images: Tensor, kept: Tensor) -> None:
        seen.append((number, images.unique().item(), kept.shape[1]))
        assert kept.min() == 0 and kept.shape == (2, kept.shape[1])

    run(StopSchedule((2, 3), (0.5, 0.25)), 4, callback)
    assert seen == [(0, 0.0, 16), (1, 1.0, 16), (2, 2.0, 8), (3, 3.0, 6)]
    assert [*time_phases(run, StopSchedule((), ()), 2)] == [16]
    assert capsys.readouterr().out == ""


def test_a_folder_without_the_code_is_refused(checkout: Path) -> None:
    published_code.check(checkout)
    (checkout / "synthesis/smi.py").unlink()
    with pytest.raises(SystemExit, match="has no synthesis/smi"):
        published_code.check(checkout)
