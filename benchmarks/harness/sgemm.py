"""The speed of this machine's sgemm, with which the speed of an iteration is compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks.harness.timing import clocked

SQUARE = ((2048, 2048, 2048),)
# The least work of one sample. It is long enough for the clock, and warms the caches.
LEAST_GFLOP = 30


def sgemm(shapes: Sequence[tuple[int, int, int]]) -> Callable[[], float]:
    """A contender that returns the GFLOP/s of GEMMs [rows, inner] @ [inner, columns]."""
    operands = [
        (torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns))
        for rows, inner, columns in shapes
    ]
    once = sum(2 * rows * inner * columns for rows, inner, columns in shapes) / 1e9
    repeats = math.ceil(LEAST_GFLOP / once)

    def multiply() -> None:
        for _ in range(repeats):
            for left, right, out in operands:
                torch.mm(left, right, out=out)

    seconds = clocked(multiply)
    return lambda: repeats * once / seconds()


def block_shapes(vit: VisionTransformer, rows: int) -> list[tuple[int, int, int]]:
    """The GEMMs of one block on ``rows`` tokens: four layers, forward and input gradient."""
    block = vit.blocks[0]
    layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    sides = [tuple(layer.weight.shape) for layer in layers]
    return [shape for out, inner in sides for shape in ((rows, inner, out), (rows, out, inner))]
