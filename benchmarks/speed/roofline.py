"""A prediction, and no measurement: the least time that a step can take on a GPU, from its shapes.

Each part of a step takes at least as long as its FLOPs at the peak rate, and as its bytes, each
input read once and each output written once, at the peak bandwidth; parts run one after the other.
What a launch costs, how far from its peak a GPU stays, and what a cache keeps from one part for the
next, isn't in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import timm
from timm.models.vision_transformer import VisionTransformer

from benchmarks.harness.environment import record
from benchmarks.harness.flops import forward_flops
from smi_fast import StopSchedule

MODELS = ("deit_tiny", "deit_small", "deit_base")
BATCH, ITERATIONS = 32, 4000
PIXEL_BYTES = 4
SIZES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class GPU:
    """Peak rates of a data sheet, without sparsity.

    Attributes:
        flops: a second, by the data type of the products; float32 without tensor cores.
        bandwidth: of the memory, in bytes a second.
        source: of these numbers.
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
    """What some kernels of a step have to do, for a whole batch."""

    name: str
    flops: float
    bytes: float

    def seconds(self, gpu: GPU, dtype: str) -> tuple[float, float]:
        """At the peak rate of arithmetic, and at that of memory."""
        return self.flops / gpu.flops[dtype], self.bytes / gpu.bandwidth


def parts(vit: VisionTransformer, batch: int, kept: int, dtype: str) -> Iterator[Part]:
    """A step of CrossEntropy and TotalVariation; pixels are float32, the rest is ``dtype``.

    Of the last block, of which one row counts, the products are in and the rest is left out.
    """
    size, width, whole = SIZES[dtype], vit.embed_dim, len(vit.blocks) - 1
    rows = batch * (kept + vit.num_prefix_tokens)
    row = rows * width * size  # bytes of one activation as wide as a token
    block = vit.blocks[0]
    layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    hidden = block.mlp.fc1.out_features / width
    through = sum(layer.in_features + layer.out_features for layer in layers) / width
    weights = sum(p.numel() for p in vit.parameters() if p.dim() > 1) * size
    linear, attention = (batch * flops for flops in forward_flops(vit, kept))
    moved = whole * through * row + weights
    yield Part("linear layers, forward", linear, moved)
    yield Part("linear layers, backward", linear, moved)
    # Q, K and V are read, the output is written; then all of these and the gradients.
    yield Part("gather_attention, forward", attention, whole * 4 * row)
    yield Part("gather_attention, backward", 2 * attention, whole * 7 * row)
    # LayerNorm 2 and 3 activations, GELU the same of the hidden layer, a sum 3.
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
    """Predicted milliseconds of a step, those bound by arithmetic among them, and what binds."""
    times = [part.seconds(gpu, dtype) for part in parts]
    by_arithmetic = sum(arithmetic for arithmetic, memory in times if arithmetic >= memory)
    total = sum(map(max, times))
    return {
        "predicted_floor_ms": round(total * 1e3, 4),
        "bound_by_arithmetic_ms": round(by_arithmetic * 1e3, 4),
        "binds": "arithmetic" if by_arithmetic >= total / 2 else "memory",
    }


def predict(name: str, dtype: str, gpu: GPU) -> dict[str, object]:
    """The floors of a step of each phase, and of the published schedule against a dense run."""
    vit = timm.create_model(f"{name}_patch16_224")
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


def main() -> None:
    predictions = {
        model: {dtype: {gpu: predict(model, dtype, GPUS[gpu]) for gpu in GPUS} for dtype in SIZES}
        for model in MODELS
    }
    shown = {
        f"{kept} patches": {
            part.name: {"GFLOP": round(part.flops / 1e9, 3), "MB": round(part.bytes / 1e6, 3)}
            for part in parts(timm.create_model("deit_small_patch16_224"), BATCH, kept, "bfloat16")
        }
        for kept in (196, 46)
    }
    measured_nothing = "prediction from data sheets, not measured on any GPU"
    record(
        "roofline",
        {
            "what": measured_nothing,
            "images": BATCH,
            "iterations": ITERATIONS,
            "sources": {name: gpu.source for name, gpu in GPUS.items()},
            "parts_of_deit_small_bfloat16": shown,
            "predictions": predictions,
        },
    )
    print(f"predicted floor of a step in ms, {BATCH} images; {measured_nothing}")
    for model, dtypes in predictions.items():
        for dtype, gpus in dtypes.items():
            for gpu, found in gpus.items():
                steps = found["steps"]
                told = ", ".join(
                    f"{kept} patches {steps[kept]['predicted_floor_ms']} ({steps[kept]['binds']})"
                    for kept in (196, 46)
                )
                ratio = found["predicted_ratio_of_dense_to_sparse"]
                print(f"{model} {dtype} on {gpu}: {told}; whole runs 1 : {ratio}")


if __name__ == "__main__":
    main()
