"""Train a network that never saw data: it learns a teacher's logits on the images of a pool.

Fill a pool first: smi-fast invert --teacher fashion-canvas --classes 0-9 --per-class 40 --out pool
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import smi_fast

TEMPERATURE, HELD_OUT = 4.0, 5


def shifted(images: Tensor, most: int) -> Tensor:
    """Images [B, C, H, W], shifted by up to ``most`` pixels and mirrored half of the time."""
    down, right = torch.randint(-most, most + 1, (2,)).tolist()
    moved = images.roll((down, right), dims=(2, 3))
    return moved.flip(3) if torch.rand(()) < 0.5 else moved


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", help="made from the same teacher")
    parser.add_argument("--teacher", default="fashion-canvas")
    parser.add_argument("--student", default="resnet10t", help="any model of timm")
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    teacher = smi_fast.load_teacher(options.teacher)
    student = timm.create_model(options.student, num_classes=teacher.num_classes)
    images = torch.cat([*smi_fast.calibration(options.pool, teacher)])
    held_out = torch.arange(len(images)) % HELD_OUT == 0
    training, unseen = images[~held_out], images[held_out]

    adam = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(options.epochs):
        student.train()
        for batch in training[torch.randperm(len(training))].split(64):
            batch = shifted(batch, most=batch.shape[-1] // 8)
            with torch.no_grad():
                wanted = (teacher(batch) / TEMPERATURE).softmax(1)
            loss = F.cross_entropy(student(batch) / TEMPERATURE, wanted)
            adam.zero_grad()
            loss.backward()
            adam.step()
    with torch.no_grad():
        same = teacher(unseen).argmax(1) == student.eval()(unseen).argmax(1)
    print(f"the student agrees with its teacher on {same.float().mean():.0%} of {len(same)} images")


if __name__ == "__main__":
    main()
