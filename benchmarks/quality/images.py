"""Images of many inversions, kept in a folder: one more judge or measure then costs no inversion.

The folder is ``$QUALITY_IMAGES``, else ``.benchmarks/images``, which git ignores. What is in it is
not made again, so empty it after a change that makes other images. Each file says at which commit
it was made. A dense run can be taken up where it was left.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.fashion_canvas.data import CLASSES
from benchmarks.harness.environment import commit
from smi_fast import SparseInverter, SparseViT
from smi_fast.inversion.state import InversionState
from smi_fast.ops.grid import patch_mask

FOLDER = Path(".benchmarks") / "images"
# Iterations of a dense run between two saved states.
SAVE_EVERY = 200


def folder() -> Path:
    """Where images are kept."""
    return Path(os.environ.get("QUALITY_IMAGES", FOLDER))


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to make images.

    Attributes:
        options: of :class:`smi_fast.SparseInverter`, as a function of the iterations.
        arguments: of ``SparseInverter.invert``, as a function of the inverter, the targets and the
            generator; they may replace the targets.
        longest: iterations of the dense run of which shorter ones are the beginning; 0 where each
            length is a run of its own.
    """

    options: Callable[[int], dict[str, Any]]
    arguments: Callable[[SparseInverter, Tensor, torch.Generator], dict[str, Any]] | None = None
    longest: int = 0


@dataclass(frozen=True)
class Run:
    """One inversion of a number of images of each class."""

    name: str
    contender: Contender
    iterations: int
    seed: int
    per_class: int

    @property
    def wanted(self) -> Tensor:
        """int64 [N], the classes that the images are to show."""
        return torch.arange(len(CLASSES)).repeat_interleave(self.per_class)

    def path(self, *, kind: str = "safetensors") -> Path:
        """The file of the images; of another kind, a file beside it for runs of any length."""
        name = re.sub(r"\W+", "-", self.name)
        length = self.iterations if kind == "safetensors" else self.contender.longest
        file = f"{name}-{self.per_class}-{length}-{self.seed}.{kind}"
        return folder() / file


@dataclass(frozen=True)
class Images:
    """What a run made.

    Attributes:
        pixels: [N, 3, H, W] in [0, 1].
        masks: bool [N, rows, columns], the kept patches.
        logits: [N, classes], the teacher's, of the kept patches alone.
        wanted: int64 [N].
        commit: at which they were made.
    """

    pixels: Tensor
    masks: Tensor
    logits: Tensor
    wanted: Tensor
    commit: str


def images_of(teacher: SparseViT, run: Run) -> Images:
    """The images of a run, which are made if the folder doesn't have them."""
    path = run.path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = _snapshot(teacher, run) if run.contender.longest else _whole(teacher, run)
        partial = path.with_suffix(f".{os.getpid()}")
        made = {name: tensor.contiguous() for name, tensor in made.items()}
        save_file(made, partial, {"commit": commit()})
        partial.replace(path)
    with safe_open(path, "pt") as file:
        pixels, masks, logits = map(file.get_tensor, ("pixels", "masks", "logits"))
        return Images(pixels, masks, logits, run.wanted, file.metadata()["commit"])


def figures_of(path: Path, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a run found, from the file of an earlier one where there is one."""
    if not path.exists():
        found = run()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(path)
        print(f"{name}: {found}", flush=True)
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def make(teacher: SparseViT, runs: Iterable[Run]) -> None:
    """Make the images of runs that the folder doesn't have."""
    for run in runs:
        if not run.path().exists():
            images_of(teacher, run)
            print(f"{run.name}, {run.iterations} iterations, seed {run.seed}: made", flush=True)


def _arguments(run: Run, inverter: SparseInverter) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(run.seed)
    given = run.contender.arguments
    more = given(inverter, run.wanted, generator) if given else {}
    return {"targets": run.wanted, "generator": generator, **more}


def _whole(teacher: SparseViT, run: Run) -> dict[str, Tensor]:
    inverter = SparseInverter(teacher, **run.contender.options(run.iterations))
    result = inverter.invert(**_arguments(run, inverter), progress=False)
    return {"pixels": result.images, "masks": result.masks, "logits": result.logits}


def _snapshot(teacher: SparseViT, run: Run) -> dict[str, Tensor]:
    """Images of the longest dense run after ``run.iterations``."""
    inverter = SparseInverter(teacher, **run.contender.options(run.contender.longest))
    state = inverter.start(**_arguments(run, inverter))
    saved = run.path(kind="state")
    if saved.exists():
        left = torch.load(saved)
        if int(left[-1]) <= run.iterations:
            state.restore(left)
    for number in range(state.done(), run.iterations):
        state.step(number=number)
        if (number + 1) % SAVE_EVERY == 0 or number + 1 == run.iterations:
            _save(state, saved)
    images = state.images()
    with torch.no_grad():
        logits = teacher(images, state.kept).logits
    masks = patch_mask(state.kept, *teacher.grid)
    return {"pixels": state.settings.space.denormalize(images), "masks": masks, "logits": logits}


def _save(state: InversionState, path: Path) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(state.save(), partial)
    partial.replace(path)
