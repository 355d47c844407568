"""The published code itself, from a checkout of github.com/Egg-Hu/SMI.

It makes no callback. So the progress bar that it would draw tells when an iteration is over, and
the teacher how many patches it was given.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torch import Tensor, nn

FILES = ("synthesis/smi.py", "utils/build_model.py")


def check(checkout: Path) -> None:
    """Refuse a folder that isn't a checkout.

    Raises:
        SystemExit: a file is missing.
    """
    for name in FILES:
        if not (checkout / name).is_file():
            raise SystemExit(
                f"expected a checkout of github.com/Egg-Hu/SMI, but {checkout} has no {name}"
            )


class Watched(nn.Module):
    """A teacher of the published code that remembers what it was given last.

    Attributes:
        images: [B, 3, H, W].
        kept: int64 [B, K], the patches that it computed.
    """

    images: Tensor
    kept: Tensor

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, images: Tensor, before: Tensor, chosen: Tensor) -> Any:
        found = self.teacher(images, before, chosen)
        self.images, self.kept = images, found[2][:, 1:] - 1  # behind the class token
        return found


def teacher_of(checkout: Path, model: str) -> Watched:
    """A model by timm's name with random weights, changed as the published code changes it."""
    spec = importlib.util.spec_from_file_location("build_model", checkout / FILES[1])
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    with mock.patch.object(nn.Module, "cuda", lambda self: self):  # it asks for a GPU
        return Watched(build.build_model(model, Pretrained=False))


def invert(
    checkout: Path,
    teacher: Watched,
    targets: Tensor,
    *,
    stops: Sequence[int],
    drop: Sequence[float],
    iterations: int,
    mean: Sequence[float],
    std: Sequence[float],
    callback: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Invert one batch.

    Args:
        checkout: the folder of the published code.
        teacher: see :func:`teacher_of`.
        targets: class indices [B].
        stops: iterations before which patches are dropped; none for the dense loop.
        drop: share of the kept patches that each stop drops.
        iterations: of the run.
        mean: of each channel, for normalised space.
        std: likewise.
        callback: called with (iteration, what the teacher saw, kept) after each iteration.
    """
    with _first_on_path(checkout):
        code = importlib.import_module("synthesis.smi")

    def bar(numbers: range) -> Iterator[int]:
        for number in numbers:
            yield number
            callback(number, teacher.images, teacher.kept)

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(code, "tqdm", bar),
    ):
        code.SMI(
            *(teacher, "", nn.Identity(), teacher.teacher.num_classes),
            iterations=iterations,
            synthesis_batch_size=len(targets),
            tv2=1e-4,
            save_dir=folder,
            normalizer=_Normalizer(mean, std),
        ).synthesize(
            targets,
            num_patches=int(teacher.teacher.patch_embed.num_patches) + 1,
            prune_it=[*stops] or [-1],
            prune_ratio=[*drop] or [0],
        )


class _Normalizer(SimpleNamespace):
    """The mean and deviation that the clamp reads; images of [0, 1] are what it saves."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(mean=mean, std=std)

    def __call__(self, images: Tensor, reverse: bool) -> Tensor:
        mean, std = (images.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        return images * std + mean


@contextlib.contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
