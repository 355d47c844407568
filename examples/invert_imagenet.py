"""Invert classes of any Vision Transformer of timm, by its name.

    python examples/invert_imagenet.py deit_small_patch16_224 --classes 207 281 817
    python examples/invert_imagenet.py deit_small_patch16_224 --checkpoint deit_small.pth

Without a checkpoint timm downloads its pretrained weights. "fashion-canvas" needs no download.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.utils import save_image

import smi_fast
from smi_fast.zoo import UnknownTeacher


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("teacher", help="a model of timm, or fashion-canvas")
    parser.add_argument("--checkpoint", type=Path, help="its weights, .safetensors or .pth")
    parser.add_argument("--classes", type=int, nargs="+", default=[207, 281, 817])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("inverted"))
    options = parser.parse_args(arguments)

    try:
        teacher = smi_fast.load_teacher(options.teacher, options.checkpoint)
    except (UnknownTeacher, FileNotFoundError) as error:
        sys.exit(str(error))
    teacher = teacher.to("cuda" if torch.cuda.is_available() else "cpu")

    inverter = smi_fast.SparseInverter(
        teacher, **smi_fast.recipes.clear().options(iterations=options.iterations)
    )
    result = inverter.invert(options.classes, generator=torch.Generator().manual_seed(0))

    options.out.mkdir(parents=True, exist_ok=True)
    for label, image, masked in zip(
        options.classes, result.images, result.over("mean"), strict=True
    ):
        save_image([image, masked], options.out / f"class_{label}.png")
    for label, confidence in zip(options.classes, result.confidence.tolist(), strict=True):
        print(f"class {label}: the teacher is {confidence:.0%} sure, from the kept patches alone")
    print(f"{result.seconds:.1f} s for {len(options.classes)} images, see {options.out}")


if __name__ == "__main__":
    main()
