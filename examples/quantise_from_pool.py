"""Quantise a ViT to 8 bits with nothing but the checkpoint: images of a pool calibrate it.

Fill a pool first: smi-fast invert --teacher fashion-canvas --classes 0-9 --per-class 8 --out pool
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import smi_fast


def quantised(teacher: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """The teacher with weights and activations of 8 bits, whose ranges are those of the batches."""
    count = torch.export.Dim("images")
    exported = torch.export.export(teacher, (batches[0],), dynamic_shapes=({0: count},))
    quantiser = X86InductorQuantizer()
    quantiser.set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported.module(), quantiser)
    for batch in batches:
        prepared(batch)
    return convert_pt2e(prepared)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", help="made from the same teacher")
    parser.add_argument("--teacher", default="fashion-canvas")
    options = parser.parse_args(argv)

    teacher = smi_fast.load_teacher(options.teacher)
    batches = [*smi_fast.calibration(options.pool, teacher, batch_size=16)]
    model = quantised(teacher, batches)
    images = torch.cat(batches)
    before, after = teacher(images), model(images)
    same = (before.argmax(1) == after.argmax(1)).float().mean().item()
    error = ((after - before).norm() / before.norm()).item()
    print(f"the same class as before for {same:.0%} of {len(images)} images")
    print(f"logits differ by {error:.1%}")


if __name__ == "__main__":
    main()
