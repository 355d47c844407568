"""Students: networks with random weights that learn a teacher's logits on images alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.fashion_canvas.data import CLASSES, normalise
from benchmarks.fashion_canvas.train_teacher import CONFIG, sine_positions, vit_logits
from benchmarks.transfer.sources import Pictures
from smi_fast import SparseViT
from smi_fast.background import over

BATCH = 64
TEMPERATURE = 4.0
PATCH = CONFIG["patch_size"]
VIT = {**CONFIG, "embed_dim": 96, "depth": 4, "num_heads": 3}


def cnn() -> nn.Module:
    """Four convolutions with BatchNorm: 9 million multiply-adds."""
    layers: list[nn.Module] = []
    for inputs, outputs, size, stride in ((3, 24, 5, 2), (24, 48, 3, 2), (48, 96, 3, 2),
                                          (96, 128, 3, 1)):  # fmt: skip
        convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(CLASSES)))
    return nn.Sequential(*layers, *head)


def vit() -> nn.Module:
    """A ViT of 4 blocks of width 96."""
    model = VisionTransformer(**VIT)
    model.pos_embed.data.copy_(sine_positions(VIT["embed_dim"]))
    return model


@dataclass(frozen=True)
class Student:
    """A network to train.

    Attributes:
        make: makes it, with random weights.
        lr: greatest learning rate.
        on_tokens: whether it sees kept patches only, as tokens.
    """

    make: Callable[[], nn.Module]
    lr: float
    on_tokens: bool = False


STUDENTS = {
    "CNN": Student(cnn, 3e-3),
    "ViT": Student(vit, 1e-3),
    "ViT on kept tokens": Student(vit, 1e-3, on_tokens=True),
}


def moved(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images and masks, rolled by up to a patch along each axis and mirrored half of the time.

    Whole patches are moved, so that kept patches stay whole.
    """
    down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
    images = images.roll((down * PATCH, right * PATCH), dims=(2, 3))
    masks = masks.roll((down, right), dims=(1, 2))
    if torch.rand((), generator=generator) < 0.5:
        images, masks = images.flip(3), masks.flip(2)
    return images, masks


def recoloured(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images in [0, 1] whose channels are brighter or darker by up to a fifth."""
    gains = 0.8 + 0.4 * torch.rand(len(images), images.shape[1], 1, 1, generator=generator)
    return (images * gains).clamp(0, 1)


class Training:
    """A student that learns from images alone: its distribution is to be the teacher's.

    Args:
        chosen: the student.
        teacher: sees what the student sees.
        steps: batches of 64, over all calls of :meth:`learn`.
        seed: of the student's weights and of its batches.

    Attributes:
        student: the network.
    """

    def __init__(self, chosen: Student, teacher: SparseViT, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.student = chosen.make()
        self._on_tokens, self._teacher = chosen.on_tokens, teacher
        self._generator = torch.Generator().manual_seed(seed)
        self._adam = torch.optim.AdamW(self.student.parameters(), weight_decay=0.02)
        self._rate = torch.optim.lr_scheduler.OneCycleLR(
            self._adam, chosen.lr, total_steps=steps, pct_start=0.1
        )

    def learn(self, pictures: Pictures, background: str | None, steps: int) -> None:
        """Take some steps.

        Args:
            pictures: the images.
            background: "mean" or "black" shows kept patches over it, None shows whole images. A
                student on tokens sees kept patches only, whatever it is.
            steps: number of batches.
        """
        shown = pictures.pixels
        if background is not None and not self._on_tokens:
            shown = over(shown, pictures.masks, background)
        self.student.train()
        for batch in batches(len(shown), steps, self._generator):
            images, masks = moved(shown[batch], pictures.masks[batch], self._generator)
            self._step(normalise(recoloured(images, self._generator)), masks)
        self.student.eval()

    def _step(self, images: Tensor, masks: Tensor) -> None:
        kept = None
        if self._on_tokens:
            kept = masks.flatten(1).nonzero()[:, 1].view(len(masks), -1)
        with torch.no_grad():
            wanted = (self._teacher(images, kept).logits / TEMPERATURE).softmax(1)
        loss = F.cross_entropy(self._logits(images, kept) / TEMPERATURE, wanted)
        self._adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self._adam.step()
        self._rate.step()

    def _logits(self, images: Tensor, kept: Tensor | None) -> Tensor:
        if kept is None:
            logits: Tensor = self.student(images)
            return logits
        return vit_logits(self.student, images, kept)


def batches(count: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches that take each image once before they take one again."""
    size, left = min(BATCH, count), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(left) < size:
            left = torch.randperm(count, generator=generator)
        batch, left = left[:size], left[size:]
        yield batch
