"""A loop of one's own on SparseViT: torch.optim.Adam, and any loss of images and logits."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi_fast import SparseViT, Stop, StopSchedule, load_teacher, ops
from smi_fast.jitter import Jitter
from smi_fast.schedules import still_iterations


def inversion(teacher: nn.Module, targets: Tensor, iterations: int) -> Iterator[tuple[Tensor, ...]]:
    """Yields loss, images and kept patches after each iteration; the tensors are the loop's own."""
    model, schedule = SparseViT(teacher), StopSchedule.scaled(iterations)
    mean, std = (torch.tensor(teacher.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    images = torch.randn(len(targets), model.channels, *model.image_size, requires_grad=True)
    shift, flip = Jitter().draw(iterations, model.image_size)
    still = still_iterations(schedule)  # the stops, and the iterations that score importance
    optimizer = torch.optim.Adam([images], lr=0.25, betas=(0.5, 0.99))
    kept, importance = model.every_patch(len(targets)), None
    background = images.detach()
    for t in range(iterations):
        if t in schedule.at:
            kept = schedule.select(Stop(t, kept, importance, model.grid)).kept
            background = images.detach().clone()
        jitter = None if t in still else (shift[t], flip[t])
        logits, importance, _ = model(images, kept, jitter=jitter, importance=t + 1 in schedule.at)
        _, variation = ops.total_variation(images, kept, patch_size=model.patch_size)
        loss = F.cross_entropy(logits, targets) + 1e-4 * variation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(-mean / std, (1 - mean) / std)
            # Adam's momentum moves stopped pixels too, so they are put back.
            images.copy_(torch.where(model.pixel_mask(kept), images, background))
        yield loss.detach(), images.detach(), kept


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=400)
    options = parser.parse_args(arguments)
    steps = inversion(load_teacher("fashion-canvas"), torch.arange(10), options.iterations)
    for t, (loss, _, kept) in enumerate(steps):
        if t % 50 == 0 or t + 1 == options.iterations:
            print(f"iteration {t}: loss {float(loss):.3f}, {kept.shape[1]} patches kept")


if __name__ == "__main__":
    main()
