"""How well an ImageNet classifier recognises what CLIP's tower was inverted towards.

CLIP's image tower, ViT-B/16 at 224 px, is inverted towards its embeddings of ten photographs. The
judge, EfficientNet-Lite0, took no part. It ranks the photograph's class among 1000; rank 0 is the
best, and chance is 500. The tower's products are in bfloat16, by autocast.

Images are kept in the folder of the packages, so a run goes on where it was cut off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.clip.packages import folder
from benchmarks.clip.photographs import SIDE, Photographs, load_photographs
from benchmarks.clip.tower import load_tower
from benchmarks.harness.environment import describe, record, result_file
from smi_fast import (
    Dense,
    Fourier,
    LossInputs,
    Objective,
    Parametrization,
    Schedule,
    SparseInverter,
    SparseViT,
    StopSchedule,
    TotalVariation,
    load_cnn,
    recipes,
)
from smi_fast.background import over
from smi_fast.inversion.inputs import image_space
from smi_fast.jitter import Jitter
from smi_fast.teacher.space import ImageSpace

ITERATIONS, QUICK_ITERATIONS = 80, 2
SEED = 0


@dataclass(frozen=True, eq=False)
class CentredCosine(Objective):
    """One minus the cosine of an image's embedding and a photograph's, the mean over images.

    The mean of the photographs' embeddings is subtracted from both, since embeddings of CLIP share
    a large common part. The targets are numbers of photographs.

    Args:
        embeddings: [N, E] of the photographs.
    """

    embeddings: Tensor
    name: str = "centred_cosine"
    weight: float = 1.0

    def __call__(self, inputs: LossInputs) -> Tensor:
        centre = self.embeddings.mean(0)
        wanted = (self.embeddings - centre)[inputs.targets]
        return (1 - F.cosine_similarity(inputs.logits.float() - centre, wanted)).mean()


@dataclass(frozen=True)
class Contender:
    """What the optimiser moves, and which patches stop when.

    Attributes:
        parametrization: what the optimiser moves.
        lr: learning rate.
        jitter: of the images.
        keep: share of the patches that stay after a stop; 1 for no stop.
        stop: share of the iterations after which the others stop.
        importance: what patches are ranked by.
        priors: objectives beside the embedding.
    """

    parametrization: Parametrization
    lr: float
    jitter: Jitter
    keep: float = 1.0
    stop: float = 0.1
    importance: str = "attention"
    priors: tuple[Objective, ...] = ()

    def schedule(self, iterations: int) -> Schedule:
        if self.keep == 1:
            return Dense()
        return StopSchedule.once(iterations, keep=self.keep, at=self.stop)


def contenders() -> dict[str, Contender]:
    """By name, those first which the others are compared with."""
    published, clear = recipes.smi(), recipes.clear()
    pixels = Contender(
        published.parametrization,
        float(published.lr),  # type: ignore[arg-type]
        published.jitter,
        priors=(TotalVariation(per_image=False),),
    )
    default = Contender(clear.parametrization, float(clear.lr), clear.jitter)  # type: ignore[arg-type]
    by_gradient = replace(default, keep=0.7, stop=0.25, importance="gradient")
    return {
        "pixels, dense": pixels,
        "default, dense": default,
        "default, 137 of 196 patches by gradient": by_gradient,
        "default, 92 of 196 patches": replace(default, keep=0.47),
        "default, 137 of 196 patches by attention": replace(by_gradient, importance="attention"),
        "default, 92 of 196 patches by gradient": replace(by_gradient, keep=0.47),
        "decay 1, dense": replace(default, parametrization=Fourier(1.0)),
        "red, green and blue, dense": replace(default, parametrization=Fourier(colour=False)),
        "pixels, 137 of 196 patches by gradient": replace(
            pixels, keep=0.7, stop=0.25, importance="gradient"
        ),
    }


def invert(
    teacher: SparseViT, contender: Contender, embeddings: Tensor, iterations: int
) -> dict[str, Any]:
    """One image for each photograph: images in [0, 1], masks, losses, and how they were made."""
    inverter = SparseInverter(
        teacher,
        objectives=[CentredCosine(embeddings), *contender.priors],
        parametrization=contender.parametrization,
        schedule=contender.schedule(iterations),
        importance=contender.importance,
        iterations=iterations,
        lr=contender.lr,
        jitter=contender.jitter,
    )
    commit = describe()["commit"]  # before a run during which the checkout may change
    generator = torch.Generator().manual_seed(SEED)
    with torch.autocast("cpu", torch.bfloat16):
        result = inverter.invert(range(len(embeddings)), generator=generator, progress=False)
    return {
        "images": result.images,
        "masks": result.masks,
        "loss": result.history[CentredCosine.name][-1],
        "seconds": result.seconds,
        "commit": commit,
    }


def made(
    path: Path, teacher: SparseViT, contender: Contender, embeddings: Tensor, iterations: int
) -> dict[str, Any]:
    """What :func:`invert` returns, from the file of an earlier run where there is one."""
    if not path.exists():
        found = invert(teacher, contender, embeddings, iterations)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(found, partial)
        partial.replace(path)
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def ranks(logits: Tensor, classes: Tensor) -> list[int]:
    """For each image how many classes of [B, C] are more probable than its own."""
    own = logits.gather(1, classes[:, None])
    return (logits > own).sum(1).tolist()


@torch.no_grad()
def verdict(judge: nn.Module, space: ImageSpace, images: Tensor, classes: Tensor) -> dict[str, Any]:
    """The ranks that a judge gives the classes of images in [0, 1]."""
    found = ranks(judge(space.normalize(images)), classes)
    return {"mean_rank": round(mean(found), 1), "median_rank": median(found), "ranks": found}


def judge_space(judge: nn.Module) -> ImageSpace:
    """The space of a judge that takes photographs as they are."""
    settings = getattr(judge, "pretrained_cfg")  # noqa: B009
    return ImageSpace(3, SIDE, SIDE, *(torch.tensor(settings[key]) for key in ("mean", "std")))


def picture(rows: Mapping[str, Tensor], side: int = 96) -> Image.Image:
    """Images [N, 3, H, W] in [0, 1], a row for each name, in 256 colours."""
    small = [F.interpolate(images, (side, side), mode="area") for images in rows.values()]
    sheet = torch.cat([torch.cat(tuple(images), dim=2) for images in small], dim=1)
    return Image.fromarray((sheet * 255).byte().permute(1, 2, 0).numpy()).quantize(256)


def measure(photographs: Photographs, names: list[str], iterations: int) -> dict[str, Any]:
    """Make or load the images of each contender, and judge them."""
    teacher, judge = SparseViT(load_tower()), load_cnn("efficientnet-lite0")
    space, classes = judge_space(judge), photographs.classes
    normalize = image_space(teacher, None, None).normalize
    with torch.no_grad():
        embeddings = teacher(normalize(photographs.images)).logits
    measured = {"photographs": verdict(judge, space, photographs.images, classes)}
    runs = folder() / f"{len(classes)}-photographs-{iterations}-iterations"
    sheet = {"photographs": photographs.images}
    for name in names:
        path = runs / (re.sub(r"\W+", "-", name) + ".pt")
        run = made(path, teacher, contenders()[name], embeddings, iterations)
        masked = over(run["images"], run["masks"], "mean")
        measured[name] = {
            "whole": verdict(judge, space, run["images"], classes),
            "kept_patches_over_mean": verdict(judge, space, masked, classes),
            **{key: run[key] for key in ("loss", "seconds", "commit")},
        }
        sheet[name] = run["images"]
        print(f"{name}: {measured[name]}", flush=True)
    return {"measured": measured, "sheet": sheet}


def main(quick: bool = False) -> None:
    photographs = load_photographs()
    names = list(contenders())
    iterations = QUICK_ITERATIONS if quick else ITERATIONS
    if quick:
        names = ["pixels, dense", "default, dense"]
        photographs = Photographs(
            photographs.images[:2], photographs.classes[:2], photographs.names[:2]
        )
    found = measure(photographs, names, iterations)
    setting = {"iterations": iterations, "photographs": photographs.names, "seed": SEED}
    record("photographs", {**setting, **found["measured"]}, quick=quick)
    shown = {name: found["sheet"][name] for name in ("photographs", *names[:4])}
    picture(shown).save(result_file("photographs.png", quick=quick), optimize=True)
