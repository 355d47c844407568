"""The interface of the published class (Egg-Hu/SMI, ``synthesis.SMI``), implemented by smi_fast.

In a published script, ``from smi_fast.compat import SMI`` replaces ``from synthesis import SMI``.
The class draws noise and jitter from the same global generators in the same order. It follows the
published loop (background "regularized", final mask "reranked") and returns the same tensors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from smi_fast.inversion import SparseInverter
from smi_fast.jitter import JITTER_SHARE
from smi_fast.objectives import (
    AdversarialJS,
    BatchNormMatching,
    CrossEntropy,
    L2Norm,
    Objective,
    TotalVariation,
)
from smi_fast.schedules import Dense, Schedule, StopSchedule, still_iterations
from smi_fast.teacher import SparseViT

# Weights of torchvision's ResNet-50, by their published names.
RESNETS = {"resnet50v1": "IMAGENET1K_V1", "resnet50v2": "IMAGENET1K_V2"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class Normalizer(Protocol):
    """An object with the mean and std of each channel."""

    mean: Sequence[float]
    std: Sequence[float]


class SMI:
    """A replacement for the published ``SMI``, with its constructor and methods.

    Args:
        teacher: a timm ``VisionTransformer``, also one that the published ``build_model`` has
            patched.
        teacher_name: ignored, as in the published class.
        student: network for :class:`AdversarialJS`; ignored while ``adv`` is 0.
        num_classes: number of classes; must be the teacher's.
        img_shape: (channels, height, width); must be the teacher's.
        patch_size: side of a patch in pixels; must be the teacher's.
        iterations: iterations of the optimiser.
        lr_g: learning rate.
        synthesis_batch_size: number of images that a call of ``synthesize`` inverts.
        sample_batch_size: largest number of images that a call of ``sample`` returns.
        adv: weight of :class:`AdversarialJS`, with ``bounded=False``.
        bn: weight of :class:`BatchNormMatching`.
        oh: weight of :class:`CrossEntropy`.
        tv1: weight of :class:`TotalVariation` with norm "l1".
        tv2: weight of :class:`TotalVariation` with norm "l2".
        l2: weight of :class:`L2Norm`.
        save_dir: folder for the inverted images, created when missing.
        transform: called with each PIL image that ``sample`` reads; by default it returns a tensor
            [3, H, W] in [0, 1].
        normalizer: object with the ``mean`` and ``std`` of each channel.
        device: device to run on; must be the teacher's.
        bnsource: "resnet50v1" or "resnet50v2" of torchvision, as published, or a CNN; ignored
            while ``bn`` is 0.
        init_dataset: folder with further images for ``sample``.

    Raises:
        ValueError: ``adv`` without a student, an unknown ``bnsource`` or one whose weights can't be
            loaded, no normalizer, or a device or sizes that aren't the teacher's.
        UnsupportedTeacher: the teacher can't be computed exactly on kept patches.
    """

    def __init__(
        self,
        teacher: nn.Module,
        teacher_name: str,
        student: nn.Module | None,
        num_classes: int,
        img_shape: tuple[int, int, int] = (3, 224, 224),
        patch_size: int = 16,
        iterations: int = 2000,
        lr_g: float = 0.25,
        synthesis_batch_size: int = 128,
        sample_batch_size: int = 128,
        adv: float = 0.0,
        bn: float = 0,
        oh: float = 1,
        tv1: float = 0.0,
        tv2: float = 1e-5,
        l2: float = 0.0,
        save_dir: str | Path = "",
        transform: Callable[[Image.Image], Any] | None = None,
        normalizer: Normalizer | None = None,
        device: str | torch.device = "cpu",
        bnsource: str | nn.Module = "resnet50v2",
        init_dataset: str | Path | None = None,
    ) -> None:
        if adv and student is None:
            raise ValueError(f"expected a student with adv={adv}, got None")
        if normalizer is None:
            raise ValueError("expected a normalizer with mean and std, got None")
        self.teacher = SparseViT(teacher)
        if self.teacher.device != torch.device(device):
            raise ValueError(f"expected the teacher on {device}, it is on {self.teacher.device}")
        shape = (self.teacher.channels, *self.teacher.image_size)
        if tuple(img_shape) != shape or patch_size != self.teacher.patch_size:
            raise ValueError(
                f"expected the teacher's img_shape {shape} and patch_size "
                f"{self.teacher.patch_size}, got {tuple(img_shape)} and {patch_size}"
            )
        if num_classes != self.teacher.num_classes:
            raise ValueError(
                f"the teacher has {self.teacher.num_classes} classes, got {num_classes}"
            )
        objectives: tuple[Objective, ...] = (
            CrossEntropy(oh),
            TotalVariation(tv1, "l1"),
            TotalVariation(tv2, "l2"),
            L2Norm(l2),
        )
        self.objectives = [objective for objective in objectives if objective.weight]
        if bn:
            self.objectives.append(BatchNormMatching(_load_cnn(bnsource, device), weight=bn))
        self.student = student if adv else None
        if self.student is not None:
            self.objectives.append(AdversarialJS(self.student, adv, bounded=False))
        self.iterations, self.lr = iterations, lr_g
        self.normalizer = normalizer
        self.synthesis_batch_size, self.sample_batch_size = synthesis_batch_size, sample_batch_size
        self.save_dir, self.transform = Path(save_dir), transform
        self.init_dataset = None if init_dataset is None else Path(init_dataset)
        self._batches = 0
        self._iterator: Iterator[Any] | None = None

    def synthesize(
        self,
        targets: Tensor | None = None,
        num_patches: int = 197,
        prune_it: Sequence[int] = (-1,),
        prune_ratio: Sequence[float] = (0,),
    ) -> dict[str, Tensor]:
        """Invert one batch and save it in ``save_dir``.

        Args:
            targets: int64 [synthesis_batch_size]; by default random and sorted.
            num_patches: number of tokens of a whole image, class token included.
            prune_it: iterations of the stops; [-1] for a dense run.
            prune_ratio: fraction of the kept patches that each stop drops; [0] for a dense run.

        Returns:
            "synthetic", images [B, 3, H, W] in [0, 1]; and "masked_synthetic", the same images with
            black in place of dropped patches.

        Raises:
            ValueError: ``num_patches`` isn't the teacher's, or the stops don't ascend, lie past the
                last iteration or drop all patches.
        """
        teacher = self.teacher
        tokens = teacher.num_patches + teacher.num_prefix_tokens
        if num_patches != tokens:
            raise ValueError(f"expected num_patches={tokens} for this teacher, got {num_patches}")
        dense = list(prune_it) == [-1] or list(prune_ratio) == [0]
        schedule: Schedule = Dense() if dense else StopSchedule(tuple(prune_it), tuple(prune_ratio))
        inverter = SparseInverter(
            teacher,
            objectives=self.objectives,
            schedule=schedule,
            mean=self.normalizer.mean,
            std=self.normalizer.std,
            iterations=self.iterations,
            lr=self.lr,
            background="regularized",
            final_mask="reranked",
        )
        shape = (self.synthesis_batch_size, teacher.channels, *teacher.image_size)
        init = torch.randn(shape, device=teacher.device)
        if targets is None:
            drawn = torch.randint(0, teacher.num_classes, (self.synthesis_batch_size,))
            targets = drawn.sort().values
        if self.student is not None:
            self.student.eval()
        result = inverter.invert(
            targets.to(teacher.device),
            init=init,
            jitter=self._published_jitter(schedule),
            progress=True,
        )
        if self.student is not None:
            self.student.train()
        self._save(result.images if dense else result.masked_images)
        self._iterator = None
        return {"synthetic": result.images, "masked_synthetic": result.masked_images}

    def sample(self) -> Any:
        """The next batch of the shuffled images in ``save_dir`` and ``init_dataset``.

        After the last batch the images are shuffled again.

        Raises:
            RuntimeError: before the first call of ``synthesize``.
        """
        if self._batches == 0:
            raise RuntimeError("call synthesize() before sample(): there are no images yet")
        try:
            if self._iterator is None:
                raise StopIteration
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self._loader())
            return next(self._iterator)

    def _published_jitter(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Jitter as the published loop draws it: shift int64 [T, 2] and flip bool [T].

        That loop draws only in the iterations that it jitters.
        """
        still = still_iterations(schedule)
        limits = [side // JITTER_SHARE for side in self.teacher.image_size]
        shifts, flips = [], []
        for iteration in range(self.iterations):
            drawn = iteration not in still
            shifts.append([random.randint(-m, m) if drawn else 0 for m in limits])
            flips.append(drawn and random.random() > 0.5)
        return torch.tensor(shifts), torch.tensor(flips)

    def _save(self, images: Tensor) -> None:
        self.save_dir.mkdir(parents=True, exist_ok=True)
        pixels = (images.permute(0, 2, 3, 1) * 255).byte().cpu().numpy()
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(self.save_dir / f"{self._batches}-{index}.png")
        self._batches += 1

    def _loader(self) -> DataLoader[Any]:
        folders = [self.save_dir, *([] if self.init_dataset is None else [self.init_dataset])]
        dataset: ConcatDataset[Any] = ConcatDataset(
            [_Images(folder, self.transform) for folder in folders]
        )
        return DataLoader(dataset, batch_size=self.sample_batch_size, shuffle=True)


def _load_cnn(source: str | nn.Module, device: str | torch.device) -> nn.Module:
    """The CNN of the objective ``bn``."""
    if isinstance(source, nn.Module):
        return source.to(device)
    if source not in RESNETS:
        raise ValueError(f"expected bnsource {' or '.join(RESNETS)}, or a CNN, got {source!r}")
    try:
        from torchvision.models import resnet50

        resnet: nn.Module = resnet50(weights=RESNETS[source])
    except (ImportError, OSError) as error:
        raise ValueError(
            f"the weights of {source} can't be loaded ({type(error).__name__}: {error}); "
            "pass a CNN as bnsource"
        ) from error
    return resnet.to(device)


class _Images(Dataset[Any]):
    """The images in a folder and its subfolders."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Any] | None) -> None:
        paths = folder.rglob("*")
        self.paths = sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
        self.transform = transform or _to_tensor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
