"""Predict, without a measurement, the least time of an iteration on a GPU.

An iteration is a sequence of parts. A part takes the time of its FLOPs at the peak rate, or of its
bytes at the peak bandwidth, whichever is longer. Its bytes are those of its inputs, read once, and
of its outputs, written once. The prediction leaves out the cost of launches, the distance of real
kernels from the peak, and data that a cache keeps from one part to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks.harness.environment import record
from benchmarks.harness.flops import forward_flops
from smi_fast import StopSchedule

MODELS = ("deit_tiny", "deit_small", "deit_base")
BATCH, ITERATIONS = 32, 4000
PIXEL_BYTES = 4
SIZES = {"bfloat16": 2, "float32": 4}
# Kept patches whose parts and floors are shown: all, and those after the last stop.
SHOWN = (196, 46)
WHAT = "prediction from data sheets, not measured on any GPU"


@dataclass(frozen=True)
class GPU:
    """Peak rates from a data sheet, without structured sparsity.

    Attributes:
        flops: FLOPs per second for each data type of the GEMMs; float32 without tensor cores.
        bandwidth: bytes per second of the memory.
        source: where these numbers are published.
    """

    flops: dict[str, float]
    bandwidth: float
    source: str


GPUS = {
    "A100 SXM 80 GB": GPU(
        {"bfloat16": 312e12, "float32": 19.5e12},
        2039e9,
        "NVIDIA A100 Tensor Core GPU data sheet",
    ),
    "H100 SXM": GPU(
        {"bfloat16": 989.4e12, "float32": 66.9e12},
        3350e9,
        "NVIDIA H100 Tensor Core GPU data sheet, and its architecture white paper for the decimals",
    ),
    "B200 1000 W": GPU(
        {"bfloat16": 2250e12, "float32": 80e12},
        8000e9,
        "NVIDIA Blackwell architecture technical brief, HGX B200",
    ),
}


@dataclass(frozen=True)
class Part:
    """The work of one part of an iteration, for a whole batch."""

    name: str
    flops: float
    bytes: float

    def seconds(self, gpu: GPU, dtype: str) -> tuple[float, float]:
        """Seconds of the arithmetic, and seconds of the memory traffic, each at its peak."""
        return self.flops / gpu.flops[dtype], self.bytes / gpu.bandwidth


def parts(vit: VisionTransformer, batch: int, kept: int, dtype: str) -> Iterator[Part]:
    """The parts of an iteration with CrossEntropy and TotalVariation.

    Pixels are float32, everything else is ``dtype``. The last block computes one row; its GEMMs are
    included, its attention, norms and GELU are not.
    """
    size, width, whole = SIZES[dtype], vit.embed_dim, len(vit.blocks) - 1
    rows = batch * (kept + vit.num_prefix_tokens)
    row = rows * width * size  # Bytes of one activation as wide as a token.
    block = vit.blocks[0]
    layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    hidden = block.mlp.fc1.out_features / width
    through = sum(layer.in_features + layer.out_features for layer in layers) / width
    weights = sum(p.numel() for p in vit.parameters() if p.dim() > 1) * size
    linear, attention = (batch * flops for flops in forward_flops(vit, kept))
    moved = whole * through * row + weights
    yield Part("linear layers, forward", linear, moved)
    yield Part("linear layers, backward", linear, moved)
    # Forward reads Q, K and V and writes the output. Backward reads Q, K, V and the gradient of the
    # output, and writes the gradients of Q, K and V.
    yield Part("gather_attention, forward", attention, whole * 4 * row)
    yield Part("gather_attention, backward", 2 * attention, whole * 7 * row)
    # LayerNorm moves 2 activations forward and 3 backward, GELU the same of the hidden layer, a
    # residual sum 3.
    yield Part("rows, forward", 0, whole * (2 * 2 + 2 * hidden + 2 * 3) * row)
    yield Part("rows, backward", 0, whole * (2 * 3 + 3 * hidden + 2 * 3) * row)

    height, across = vit.patch_embed.img_size
    image = batch * vit.patch_embed.proj.in_channels * height * across
    pixels = image * kept / vit.patch_embed.num_patches
    yield Part("gather_patches, forward", 0, pixels * (PIXEL_BYTES + size))
    yield Part("gather_patches, backward", 0, pixels * size + image * PIXEL_BYTES)
    yield Part("total_variation, forward", 0, pixels * PIXEL_BYTES)
    yield Part("total_variation, backward", 0, (pixels + image) * PIXEL_BYTES)
    yield Part("sum of the gradients", 0, 3 * image * PIXEL_BYTES)
    yield Part("adam_clamp_", 0, 7 * pixels * PIXEL_BYTES)


def floor(parts: list[Part], gpu: GPU, dtype: str) -> dict[str, float | str]:
    """Predicted milliseconds of an iteration, those that arithmetic bounds, and what binds."""
    times = [part.seconds(gpu, dtype) for part in parts]
    by_arithmetic = sum(arithmetic for arithmetic, memory in times if arithmetic >= memory)
    total = sum(map(max, times))
    return {
        "predicted_floor_ms": round(total * 1e3, 4),
        "bound_by_arithmetic_ms": round(by_arithmetic * 1e3, 4),
        "binds": "arithmetic" if by_arithmetic >= total / 2 else "memory",
    }


def model(name: str) -> VisionTransformer:
    """A model that has shapes and no memory."""
    with torch.device("meta"):
        return timm.create_model(f"{name}_patch16_224")


def predict(vit: VisionTransformer, dtype: str, gpu: GPU) -> dict[str, Any]:
    """The floor of an iteration in each phase, and of a dense run over a published sparse one."""
    schedule = StopSchedule()
    counts = (vit.patch_embed.num_patches, *schedule.counts(vit.patch_embed.num_patches))
    steps = {kept: floor(list(parts(vit, BATCH, kept, dtype)), gpu, dtype) for kept in counts}
    lengths = [end - start for start, end in pairwise((0, *schedule.at, ITERATIONS))]
    floors = [float(step["predicted_floor_ms"]) for step in steps.values()]
    sparse = sum(n * time for n, time in zip(lengths, floors, strict=True))
    return {
        "steps": steps,
        "predicted_ratio_of_dense_to_sparse": round(ITERATIONS * floors[0] / sparse, 2),
    }


def main(quick: bool = False) -> None:
    vits = {name: model(name) for name in (MODELS[:1] if quick else MODELS)}
    predictions = {
        name: {dtype: {gpu: predict(vit, dtype, GPUS[gpu]) for gpu in GPUS} for dtype in SIZES}
        for name, vit in vits.items()
    }
    small = model("deit_small")
    shown = {
        f"{kept} patches": {
            part.name: {"GFLOP": round(part.flops / 1e9, 3), "MB": round(part.bytes / 1e6, 3)}
            for part in parts(small, BATCH, kept, "bfloat16")
        }
        for kept in SHOWN
    }
    record(
        "roofline",
        {
            "what": WHAT,
            "images": BATCH,
            "iterations": ITERATIONS,
            "sources": {name: gpu.source for name, gpu in GPUS.items()},
            "parts_of_deit_small_bfloat16": shown,
            "predictions": predictions,
        },
        quick=quick,
    )
    print(f"predicted floor of an iteration in ms, {BATCH} images; {WHAT}")
    for name, dtypes in predictions.items():
        for dtype, gpus in dtypes.items():
            for gpu, found in gpus.items():
                steps = found["steps"]
                floors = ", ".join(
                    f"{kept} patches {steps[kept]['predicted_floor_ms']} ({steps[kept]['binds']})"
                    for kept in SHOWN
                )
                ratio = found["predicted_ratio_of_dense_to_sparse"]
                print(f"{name} {dtype} on {gpu}: {floors}; whole runs, dense ÷ sparse: {ratio}")
