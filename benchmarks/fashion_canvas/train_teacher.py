"""Train the embedded teacher on the CPU.

Run it as ``python -m benchmarks.fashion_canvas.train_teacher``. A small CNN learns the canvases in
minutes. The ViT then learns from the labels and from the CNN's probabilities (distillation). Two
things make it learn fast enough on two cores:

- a curriculum: items start in the centre with one size, and end in any place with any size;
- dropped tokens: for most of the run the ViT sees some of the patches, preferably of the
  foreground, as it does later in sparse inversion.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.fashion_canvas.data import (
    CLASSES,
    ITEM_SIDES,
    MEAN,
    SIDE,
    STD,
    TEST_SEED,
    canvases,
    load_items,
    normalise,
    render,
)
from smi_fast.zoo import small_cnn

CONFIG = {
    "img_size": SIDE,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "num_classes": len(CLASSES),
}
GRID = SIDE // 8
BATCH = 64
VALIDATION = 5000
WEIGHTS = Path(__file__).parents[2] / "smi_fast" / "weights"


@dataclass(frozen=True)
class Stage:
    """A stage of the curriculum.

    Attributes:
        share: of all training steps.
        item_sides: smallest and largest side of an item at the end of the stage.
        displacement: of items at the end of the stage, see :func:`render`.
        patches: patches that the ViT sees during the stage.
    """

    share: float
    item_sides: tuple[float, float]
    displacement: float
    patches: int


CURRICULUM = (
    Stage(share=0.20, item_sides=(32, 34), displacement=0.1, patches=20),
    Stage(share=0.35, item_sides=(32, 44), displacement=1.0, patches=28),
    Stage(share=0.30, item_sides=ITEM_SIDES, displacement=1.0, patches=36),
    Stage(share=0.15, item_sides=ITEM_SIDES, displacement=1.0, patches=GRID * GRID),
)


def curriculum(progress: float) -> tuple[tuple[float, float], float, int]:
    """Item sides, displacement and patches at a progress in [0, 1).

    The first two change linearly within each stage.
    """
    before = Stage(share=0, item_sides=(32, 32), displacement=0.0, patches=0)
    for stage in CURRICULUM:
        if progress < stage.share or stage is CURRICULUM[-1]:
            done = min(progress / stage.share, 1.0)
            low, high = (
                a + (b - a) * done for a, b in zip(before.item_sides, stage.item_sides, strict=True)
            )
            moved = stage.displacement - before.displacement
            return (low, high), before.displacement + moved * done, stage.patches
        progress -= stage.share
        before = stage
    raise AssertionError("unreachable")


def foreground_first(foreground: Tensor, count: int, generator: torch.Generator) -> Tensor | None:
    """Indices [B, count] of the patches to see, mostly foreground; None for all patches."""
    if count == GRID * GRID:
        return None
    share = F.avg_pool2d(foreground[:, None].float(), SIDE // GRID).flatten(1)
    return (0.7 * (share > 0.02) + torch.rand(share.shape, generator=generator)).topk(count).indices


def vit_logits(model: VisionTransformer, images: Tensor, kept: Tensor | None) -> Tensor:
    """Logits from the kept patches; None keeps all."""
    tokens = model._pos_embed(model.patch_embed(images))
    if kept is not None:
        rows = torch.cat([kept.new_zeros(len(kept), 1), kept + 1], dim=1)
        tokens = tokens.gather(1, rows[:, :, None].expand(-1, -1, tokens.shape[2]))
    return model.forward_head(model.norm(model.blocks(tokens)))


def sine_positions(width: int) -> Tensor:
    """Sine-cosine positions [1, 1 + GRID², width], which show the ViT what lies side by side."""
    frequencies = torch.pi / 2 ** torch.linspace(0, math.log2(GRID * 4), width // 4)
    angles = torch.arange(GRID)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None].expand(GRID, GRID, -1)
    positions = torch.cat([rows, rows.transpose(0, 1)], dim=2).reshape(1, GRID * GRID, width)
    return F.pad(positions, (0, 0, 1, 0)) * 0.5


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy on images in [0, 1]."""
    training = model.training
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    right = sum((model(normalise(x)).argmax(1) == y).sum().item() for x, y in batches)
    model.train(training)
    return right / len(labels)


class CanvasStream:
    """An endless stream of training batches, without the items held out for validation."""

    def __init__(self, seed: int) -> None:
        items, labels = load_items("train")
        self.items, self.labels = items[:-VALIDATION], labels[:-VALIDATION]
        self.generator = torch.Generator().manual_seed(seed)

    def batch(
        self, item_sides: tuple[float, float], displacement: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images, normalised; labels; foreground."""
        chosen = torch.randint(len(self.items), (BATCH,), generator=self.generator)
        images, foreground = render(
            self.items[chosen], self.generator, item_sides=item_sides, displacement=displacement
        )
        if torch.rand((), generator=self.generator) < 0.5:
            images, foreground = images.flip(3), foreground.flip(2)
        return normalise(images), self.labels[chosen], foreground


class Report:
    """Prints the validation accuracy every 500 steps."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.start = name, steps, time.perf_counter()
        self.images, self.labels, _ = canvases("train", seed=2, last=2000)

    def __call__(self, step: int, model: nn.Module, loss: Tensor) -> None:
        if step % 500 == 499 or step == self.steps - 1:
            seconds = time.perf_counter() - self.start
            print(
                f"{self.name} step {step + 1}/{self.steps}  loss {loss.item():.3f}  "
                f"validation {accuracy(model, self.images, self.labels):.1%}  {seconds:.0f} s  "
                f"{(step + 1) * BATCH / seconds:.0f} images/s",
                flush=True,
            )


def train_cnn(cnn: nn.Module, steps: int, seed: int) -> nn.Module:
    """Train a CNN on the labels and return it frozen."""
    stream, report = CanvasStream(seed), Report("cnn", steps)
    optimiser = torch.optim.AdamW(cnn.parameters(), weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for step in range(steps):
        # The CNN needs a shorter curriculum than the ViT: it ends after half of the steps.
        sides, displacement, _ = curriculum(2 * step / steps)
        images, labels, _ = stream.batch(sides, displacement)
        loss = F.cross_entropy(cnn(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
        report(step, cnn, loss)
    return cnn.eval().requires_grad_(False)


def train_vit(
    steps: int, cnn: nn.Module, seed: int, config: dict[str, int] = CONFIG
) -> VisionTransformer:
    """Train the ViT on the labels and on a CNN's probabilities."""
    stream, model, report = CanvasStream(seed), VisionTransformer(**config), Report("vit", steps)
    model.pos_embed.data.copy_(sine_positions(config["embed_dim"]))
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.03, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.2e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        sides, displacement, patches = curriculum(step / steps)
        images, labels, foreground = stream.batch(sides, displacement)
        logits = vit_logits(model, images, foreground_first(foreground, patches, stream.generator))
        # A temperature of 2 keeps the probabilities of similar classes visible.
        distillation = F.cross_entropy(logits / 2, (cnn(images) / 2).softmax(1))
        loss = F.cross_entropy(logits, labels) + 2 * distillation
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        report(step, model, loss)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cnn-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=WEIGHTS, help="folder for the .safetensors and .json"
    )
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    cnn = train_cnn(small_cnn(len(CLASSES)), options.cnn_steps, options.seed)
    model = train_vit(options.steps, cnn, options.seed + 1)
    images, labels, _ = canvases("t10k", seed=TEST_SEED)
    card = {
        "model": CONFIG,
        "mean": MEAN,
        "std": STD,
        "classes": CLASSES,
        "test_accuracy": round(accuracy(model, images, labels), 4),
        "cnn_test_accuracy": round(accuracy(cnn, images, labels), 4),
        "steps": options.steps,
        "cnn_steps": options.cnn_steps,
        "batch": BATCH,
        "seed": options.seed,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), options.out / "fashion_canvas.safetensors")
    (options.out / "fashion_canvas.json").write_text(json.dumps(card, indent=1) + "\n")
    print(
        f"test accuracy {card['test_accuracy']:.1%} (CNN {card['cnn_test_accuracy']:.1%}); "
        f"wrote {options.out}"
    )


if __name__ == "__main__":
    main()
