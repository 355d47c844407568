"""Quantise a ViT to 8 bits with Sony's Model Compression Toolkit: images of a pool calibrate it.

Its own data-free generation refuses a network without BatchNorm, as a ViT is.

pip install 'smi-fast[mct]', and fill a pool first:
smi-fast invert --teacher fashion-canvas --classes 0-9 --per-class 8 --out pool
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence

import model_compression_toolkit as mct
import numpy as np
import torch
from torch import Tensor, nn

import smi_fast


class OfImages(nn.Module):
    """A ViT without timm's optional arguments, which MCT would take for further inputs."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.vit(images)
        return logits


def quantised(teacher: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """The teacher with weights and activations of 8 bits, whose ranges are those of the batches."""

    def representative_data_gen() -> Iterator[list[np.ndarray]]:
        for batch in batches:
            yield [batch.numpy()]

    model: nn.Module
    model, _ = mct.ptq.pytorch_post_training_quantization(
        OfImages(teacher), representative_data_gen
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
