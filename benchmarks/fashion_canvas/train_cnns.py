"""Train the CNN prior and the two judges on the CPU.

Run it as ``python -m benchmarks.fashion_canvas.train_cnns [NAME …]``. The prior is the CNN whose
BatchNorm statistics inversion matches. The judges take no part in inversion and only classify the
images. All three differ in architecture and seed, and the judges have no BatchNorm.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.fashion_canvas.data import CLASSES, MEAN, STD, TEST_SEED, canvases
from benchmarks.fashion_canvas.train_teacher import WEIGHTS, accuracy, train_cnn
from smi_fast.judge import judge_cnn
from smi_fast.zoo import small_cnn

JUDGE = WEIGHTS / "fashion_canvas_judge.safetensors"
SECOND_JUDGE = Path(__file__).parent / "second_judge_cnn.safetensors"


def second_judge_cnn() -> nn.Sequential:
    """A plain CNN without shortcuts: 30 million multiply-adds at 64 px."""
    widths = ((3, 32, 5, 2), (32, 64, 3, 2), (64, 64, 3, 1), (64, 112, 3, 2), (112, 112, 3, 1))
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in (*widths, (112, 144, 3, 2)):
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        # One group of all channels is LayerNorm over an image.
        layers += [convolution, nn.GroupNorm(1, outputs), nn.GELU()]
    head = (nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(144, len(CLASSES)))
    return nn.Sequential(*layers, *head)


def _load(judge: nn.Sequential, weights: Path) -> nn.Sequential:
    judge.load_state_dict(load_file(weights), strict=True)
    return judge.eval().requires_grad_(False)


def load_second_judge() -> nn.Sequential:
    """The trained second judge, frozen. Without its last layer it gives features [N, 144]."""
    return _load(second_judge_cnn(), SECOND_JUDGE)


@dataclass(frozen=True)
class TrainingRun:
    """A network to train.

    Attributes:
        make: makes the network.
        seed: of its first weights and of its canvases.
        weights: the file to write.
    """

    make: Callable[[], nn.Module]
    seed: int
    weights: Path


PRIOR = WEIGHTS / "fashion_canvas_cnn.safetensors"
RUNS = {
    "prior": TrainingRun(lambda: small_cnn(len(CLASSES)), 10, PRIOR),
    "judge": TrainingRun(judge_cnn, 20, JUDGE),
    "second-judge": TrainingRun(second_judge_cnn, 30, SECOND_JUDGE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    for name in options.names or RUNS:
        run = RUNS[name]
        torch.manual_seed(run.seed)
        cnn = train_cnn(run.make(), options.steps, run.seed)
        images, labels, _ = canvases("t10k", seed=TEST_SEED)
        card = {
            "mean": MEAN,
            "std": STD,
            "classes": CLASSES,
            "test_accuracy": round(accuracy(cnn, images, labels), 4),
            "steps": options.steps,
            "seed": run.seed,
        }
        save_file(cnn.state_dict(), run.weights)
        run.weights.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
        print(f"{name}: test accuracy {card['test_accuracy']:.1%}, written to {run.weights}")


if __name__ == "__main__":
    main()
