"""The published loop, restated: whole images, torch's own Adam, and torch's own loader.

It says in which order the published script draws random numbers, and is written from that order.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from smi_fast.compat import SMI
from tests.helpers.teachers import patch_as_published

NORMALIZER = SimpleNamespace(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SIDE, PATCH, GRID, TOKENS, CLASSES, ITERATIONS, BATCH = 32, 8, 4, 17, 5, 8, 3
TV2 = 1e-4


def seed(number: int = 7) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def generators() -> list[Any]:
    """The states of all generators that a loop may draw from."""
    numpy = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]]


def small_vit() -> VisionTransformer:
    seed(3)
    vit = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES
    )
    with torch.no_grad():
        vit.blocks[-1].attn.qkv.weight *= 8  # no near ties of importance
        vit.head.weight *= 20
    return vit.eval()


def make(teacher: nn.Module, folder: Path, **options: Any) -> SMI:
    options = {
        "teacher": teacher,
        "teacher_name": "deit_tiny_16_imagenet",
        "student": None,
        "num_classes": CLASSES,
        "img_shape": (3, SIDE, SIDE),
        "patch_size": PATCH,
        "iterations": ITERATIONS,
        "lr_g": 0.25,
        "synthesis_batch_size": BATCH,
        "sample_batch_size": 2,
        "tv2": TV2,
        "save_dir": folder,
        "normalizer": NORMALIZER,
        **options,
    }
    return SMI(**options)


class PublishedLoop:
    """``synthesize`` and ``sample`` of the published class, for the sizes above."""

    def __init__(
        self, teacher: VisionTransformer, student: nn.Module, folder: Path, transform: Callable
    ) -> None:
        self.teacher, self.student, self.folder = patch_as_published(teacher), student, folder
        self.transform, self.batches = transform, 0
        folder.mkdir()

    def synthesize(
        self,
        prune_it: list[int],
        prune_ratio: list[float],
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> dict[str, Tensor]:
        self.student.eval()
        images = torch.randn(BATCH, 3, SIDE, SIDE).requires_grad_()
        targets = torch.randint(0, CLASSES, (BATCH,)).sort().values
        mean, std = (torch.tensor(x)[:, None, None] for x in (NORMALIZER.mean, NORMALIZER.std))
        adam = torch.optim.Adam([images], 0.25, betas=(0.5, 0.99))
        every = torch.arange(TOKENS).repeat(BATCH, 1)
        current, following, attention = every, every, torch.empty(0)
        for it in range(ITERATIONS):
            seen, tokens = images, current
            stopping = it in prune_it and it + 1 not in prune_it
            if stopping:
                following = self._top(attention, prune_ratio[prune_it.index(it)])
            elif it + 1 not in prune_it:
                seen, tokens = jittered(images, current)
            logits, maps, answered = self.teacher(seen, tokens, following)
            attention, current = maps[-1].detach(), answered if stopping else current
            adam.zero_grad()
            (loss(logits, targets) + TV2 * total_variation(images)).backward()
            adam.step()
            with torch.no_grad():
                images.copy_(images.clamp(-mean / std, (1 - mean) / std))
        self.student.train()
        whole = images.detach() * std + mean
        masked = whole * self._mask(whole, prune_ratio)
        self._save(whole if prune_ratio == [0] else masked)
        files = Folder(self.folder, self.transform)
        self.loader = DataLoader(files, batch_size=2, shuffle=True, num_workers=4)
        self.epoch = iter(self.loader)
        return {"synthetic": whole, "masked_synthetic": masked}

    def sample(self) -> Tensor:
        batch = next(self.epoch, None)
        if batch is None:
            self.epoch = iter(self.loader)
            batch = next(self.epoch)
        return batch

    def _top(self, attention: Tensor, ratio: float) -> Tensor:
        scores = attention.mean(dim=1)[:, 0, 1:]
        top = scores.topk(int(scores.shape[1] * (1.0 - ratio)), dim=1).indices + 1
        return torch.cat([torch.zeros(BATCH, 1, dtype=torch.int64), top], dim=1)

    @torch.no_grad()
    def _mask(self, whole: Tensor, prune_ratio: list[float]) -> Tensor:
        every = torch.arange(TOKENS).repeat(BATCH, 1)
        scores = self.teacher(whole, every, every)[1][-1].mean(dim=1)[:, 0, 1:]
        share = 1
        for ratio in prune_ratio:
            share = share * (1.0 - ratio)
        top = scores.topk(min(int(TOKENS * share), TOKENS - 1), dim=1).indices
        mask = torch.zeros(BATCH, GRID * GRID).scatter(1, top, 1.0).view(BATCH, 1, GRID, GRID)
        return F.interpolate(mask, scale_factor=PATCH, mode="nearest")

    def _save(self, images: Tensor) -> None:
        for index, image in enumerate(images.clamp(0, 1).permute(0, 2, 3, 1).numpy()):
            path = self.folder / f"{self.batches}-{index}.png"
            Image.fromarray((image * 255).astype("uint8")).save(path)
        self.batches += 1


class Folder(Dataset):
    """The images of a folder, as it is walked.

    It doesn't refer to the loop: a cycle's iterator waits five seconds for each of its workers.
    """

    def __init__(self, folder: Path, transform: Callable) -> None:
        walked = os.walk(folder)
        self.paths = [os.path.join(where, name) for where, _, names in walked for name in names]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(self.paths[index]))


def jittered(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Images rolled and mirrored as drawn, and the tokens' places in them."""
    limit = SIDE // 8
    down, right = random.randint(-limit, limit), random.randint(-limit, limit)
    flip = random.random() > 0.5
    images = images.roll((down, right), (2, 3))
    images = images.flip(3) if flip else images
    if tokens.shape[1] == TOKENS:
        return images, tokens
    rows, columns = (tokens[:, 1:] - 1) // GRID, (tokens[:, 1:] - 1) % GRID
    rows = (rows + int(np.floor(down / PATCH + 0.5))) % GRID
    columns = (columns + int(np.floor(right / PATCH + 0.5))) % GRID
    columns = GRID - 1 - columns if flip else columns
    return images, torch.cat([tokens[:, :1], rows * GRID + columns + 1], dim=1)


def total_variation(x: Tensor) -> Tensor:
    differences = (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    return sum(difference.norm() for difference in differences)
