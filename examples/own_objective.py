"""Add objectives of one's own to the published loss: a class that reads attention, a function."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

import smi_fast
from smi_fast import LossInputs, Objective


class AttentionEntropy(Objective):
    """Negative entropy of the class token's attention: spreads attention over the kept patches."""

    name = "attention_entropy"

    def __init__(self, weight: float = 0.1) -> None:
        self.weight = weight

    def taps(self, depth: int) -> tuple[str, ...]:
        return ("attention.last.row",)

    def __call__(self, inputs: LossInputs) -> Tensor:
        row = inputs.taps["attention.last.row"]  # [B, heads, tokens]
        return (row * row.clamp(min=1e-9).log()).sum(-1).mean()


def redness(images: Tensor, logits: Tensor) -> Tensor:
    """How far green and blue are above red: smaller for redder images."""
    return images[:, 1:].mean() - images[:, 0].mean()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=100)
    options = parser.parse_args(arguments)

    inverter = smi_fast.SparseInverter(
        smi_fast.load_teacher("fashion-canvas"),
        objectives=[
            smi_fast.CrossEntropy(),
            smi_fast.TotalVariation(),
            AttentionEntropy(),
            redness,
        ],
        iterations=options.iterations,
    )
    result = inverter.invert(range(10), generator=torch.Generator().manual_seed(0))
    for name, values in result.history.items():
        print(f"{name:20} {values[0]:8.3f} -> {values[-1]:8.3f}")


if __name__ == "__main__":
    main()
