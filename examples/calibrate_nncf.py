"""Quantise a ViT to 8 bits with NNCF: images of a pool calibrate it.

pip install 'smi-fast[nncf]', and fill a pool first:
smi-fast invert --teacher fashion-canvas --classes 0-9 --per-class 8 --out pool
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import nncf
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import smi_fast


def quantised(teacher: nn.Module, batches: DataLoader[Tensor]) -> nn.Module:
    """The teacher with weights and activations of 8 bits, whose ranges are those of the batches."""
    model: nn.Module = nncf.quantize(
        teacher, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER
    )
    return model


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", help="made from the same teacher")
    parser.add_argument("--teacher", default="fashion-canvas")
    options = parser.parse_args(argv)

    teacher = smi_fast.load_teacher(options.teacher)
    batches = smi_fast.calibration(options.pool, teacher, batch_size=8)
    images = torch.cat([*batches])
    before, after = teacher(images), quantised(teacher, batches)(images)
    same = (before.argmax(1) == after.argmax(1)).float().mean().item()
    error = ((after - before).norm() / before.norm()).item()
    print(f"the same class as before for {same:.0%} of {len(images)} images")
    print(f"logits differ by {error:.1%}")


if __name__ == "__main__":
    main()
