"""Several rounds of the published script draw the same numbers and give the same images."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from smi_fast.compat.pool import to_tensor
from tests.compat.published import (
    BATCH,
    CLASSES,
    TOKENS,
    PublishedLoop,
    generators,
    make,
    seed,
    small_vit,
)
from tests.helpers.teachers import patch_as_published

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker"),
    pytest.mark.skipif(
        multiprocessing.get_start_method() != "fork", reason="the published loader forks here"
    ),
]


def flipped_at_random(image: Image.Image) -> Tensor:
    """A transform like RandomHorizontalFlip, that draws from each library's generator."""
    tensor = to_tensor(image)
    tensor = tensor.flip(2) if torch.rand(1) < 0.5 else tensor
    tensor = tensor.flip(1) if random.random() < 0.5 else tensor
    return tensor * float(np.random.rand())  # noqa: NPY002


def small_student() -> nn.Module:
    seed(5)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, CLASSES))


def be_a_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)


def start_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")


def run_out_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(process: BaseProcess) -> None:
        raise BlockingIOError(11, "no more processes")

    monkeypatch.setattr(BaseProcess, "start", start)


class Transcript:
    """What the calls of test_kt.py make, draw and leave behind."""

    def __init__(self, loop: Any, teacher: nn.Module, student: nn.Module, **options: Any) -> None:
        self.images: list[Tensor] = []
        self.samples: list[Tensor] = []
        self.states: list[Any] = []
        for epoch in range(3):
            made = loop.synthesize(prune_it=[2, 5], prune_ratio=[0.3, 0.3], **options)
            self.images += [made["synthetic"], made["masked_synthetic"]]
            self.states += [generators(), student.training]
            # In the last epoch the images are shuffled anew, twice.
            batches = [loop.sample() for _ in range(12 if epoch == 2 else 1)]
            every = torch.arange(TOKENS).repeat(len(batches[0]), 1)
            with torch.no_grad():
                wanted = teacher(batches[0], current_abs_index=every, next_relative_index=every)[0]
            F.mse_loss(student(batches[0]), wanted).backward()  # its dropout draws as well
            self.samples += batches
            self.states.append(generators())
            student.eval()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "prevent", [None, be_a_daemon, start_otherwise, run_out_of_processes], ids=str
)
def test_every_epoch_of_the_script_is_the_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prevent: Callable | None
) -> None:
    """With worker processes, and where there can be none."""
    teacher, student = patch_as_published(small_vit()), small_student()
    published = PublishedLoop(teacher, student, tmp_path / "theirs", flipped_at_random)
    seed()
    theirs = Transcript(published, teacher, student)

    teacher, student = patch_as_published(small_vit()), small_student()
    smi = make(teacher, tmp_path / "ours", student=student, transform=flipped_at_random)
    if prevent is not None:
        prevent(monkeypatch)
    seed()
    ours = Transcript(smi, teacher, student, num_patches=TOKENS)

    assert ours.states == theirs.states
    assert len(smi.data_pool.get_dataset()) == 3 * BATCH
    for found, expected in zip(ours.images, theirs.images, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    for found, expected in zip(ours.samples, theirs.samples, strict=True):
        # A pixel may be rounded to the next of 256 values when it is saved.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 + 1 / 255)


STOPS = [
    ([-1], [0]),
    ([-1], [0.3]),  # dense, and masked at the end
    ([-1], [0.3, 0.3]),
    ([3], [0.0]),  # without jitter at 2 and 3
    ([2, 5], [0.3, 0.3]),
    ([2, 3], [0.3, 0.3]),  # the stop at 2 is skipped
    ([2, 3, 4, 6], [0.1, 0.2, 0.3, 0.2]),
    ([2, 90], [0.3, 0.3]),  # the second is never reached
    ([2, 8], [0.3, 0.3]),
    ([7, 8], [0.3, 0.3]),
    ([5, 2], [0.2, 0.4]),
]


@pytest.mark.parametrize(("prune_it", "prune_ratio"), STOPS, ids=str)
def test_stops_are_taken_as_published(
    tmp_path: Path, prune_it: list[int], prune_ratio: list[float]
) -> None:
    published = PublishedLoop(small_vit(), small_student(), tmp_path / "theirs", to_tensor)
    seed()
    theirs = published.synthesize(prune_it, prune_ratio)
    state = generators()

    smi = make(small_vit(), tmp_path / "ours")
    seed()
    ours = smi.synthesize(num_patches=TOKENS, prune_it=prune_it, prune_ratio=prune_ratio)
    assert generators() == state
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-3)
    for file in (tmp_path / "theirs").iterdir():
        saved, expected = (to_tensor(Image.open(p)) for p in (tmp_path / "ours" / file.name, file))
        torch.testing.assert_close(saved, expected, rtol=0, atol=1e-3 + 1 / 255)


@pytest.mark.parametrize(
    ("prune_it", "prune_ratio", "message"),
    [
        ([0, 5], [0.3, 0.3], "ascend from 1 or later, got .0, 5"),
        ([2, 5], [0.3], "a prune_ratio for the stop at 5, got .0.3"),
        ([2], [1.0], "shares to drop in"),
        ([2], [0.99], "drops all of 16 patches"),
    ],
)
def test_stops_that_the_published_loop_fails_at(
    tmp_path: Path, prune_it: list[int], prune_ratio: list[float], message: str
) -> None:
    smi = make(small_vit(), tmp_path)
    with pytest.raises(ValueError, match=message):
        smi.synthesize(num_patches=TOKENS, prune_it=prune_it, prune_ratio=prune_ratio)


@pytest.mark.parametrize("given", ["classes", "probabilities"])
def test_soft_labels_of_tbd_mi(tmp_path: Path, given: str) -> None:
    """That code's loss is the KL divergence from the soft labels."""
    probabilities: list[Tensor] = []

    def divergence(logits: Tensor, classes: Tensor) -> Tensor:
        soft = torch.full((BATCH, CLASSES), 0.2 / (CLASSES - 1))
        soft[range(BATCH), classes] = 0.8
        probabilities.append(soft)
        return F.kl_div(logits.log_softmax(1), soft, reduction="batchmean")

    published = PublishedLoop(small_vit(), small_student(), tmp_path / "theirs", to_tensor)
    seed()
    expected = published.synthesize([3], [0.5], loss=divergence)

    smi = make(small_vit(), tmp_path / "ours")
    options: dict[str, Any] = {"use_soft_label": True, "soft_label_alpha": 0.8}
    if given == "probabilities":
        options = {"targets": probabilities[0]}
    seed()
    made = smi.synthesize(num_patches=TOKENS, prune_it=[3], prune_ratio=[0.5], **options)
    torch.testing.assert_close(made["synthetic"], expected["synthetic"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(made["targets"], probabilities[0].numpy())
