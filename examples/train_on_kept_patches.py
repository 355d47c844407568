"""Train a student on kept patches alone: it learns a teacher's logits from shards.

First make a pool, whose images keep equally many patches, and write its patches and logits:
smi-fast invert --teacher fashion-canvas --classes 0-9 --per-class 40 --out pool
smi-fast export pool --layout shards --teacher fashion-canvas --out shards
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, Subset

from smi_fast import SparseStudent
from smi_fast.pool.shards import SparseImageDataset, normalized
from smi_fast.teacher.space import ImageSpace

TEMPERATURE, HELD_OUT = 4.0, 5


class Distilled(SparseImageDataset):
    """Gives the teacher's logits in place of the label."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        patches, kept, _ = super().__getitem__(index)
        logits = self.logits(index)
        if logits is None:
            raise SystemExit("expected shards with logits: export them with --teacher")
        return patches, kept, logits.float()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", help="folder of shards with logits")
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    dataset = Distilled(options.shards)
    patches, _, logits = dataset[0]
    side, size = patches.shape[1], [count * patches.shape[1] for count in dataset.grid]
    student = SparseStudent(
        VisionTransformer(size, side, num_classes=len(logits), embed_dim=96, depth=4, num_heads=3)
    )
    space = ImageSpace(3, *size, mean=torch.full((3,), 0.5), std=torch.full((3,), 0.5))
    held_out = range(0, len(dataset), HELD_OUT)
    training = [index for index in range(len(dataset)) if index not in held_out]

    adam = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(options.epochs):
        for patches, kept, logits in DataLoader(Subset(dataset, training), 32, shuffle=True):
            wanted = (logits / TEMPERATURE).softmax(1)
            loss = F.cross_entropy(student(normalized(patches, space), kept) / TEMPERATURE, wanted)
            adam.zero_grad()
            loss.backward()
            adam.step()
    ((patches, kept, logits),) = DataLoader(Subset(dataset, held_out), len(held_out))
    with torch.no_grad():
        same = student.eval()(normalized(patches, space), kept).argmax(1) == logits.argmax(1)
    print(f"the student agrees with its teacher on {same.float().mean():.0%} of {len(same)} images")


if __name__ == "__main__":
    main()
