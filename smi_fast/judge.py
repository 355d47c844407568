"""A network that takes no part in inversion and says what it sees in the finished images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import as_file, files

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smi_fast.zoo import EMBEDDED

CLASSES = 10


class Residual(nn.Module):
    """Two convolutions with GroupNorm, and a shortcut; the first one halves the sides."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(8, outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, 2, bias=False)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.act(self.path(x) + self.shortcut(x))
        return activated


def judge_cnn() -> nn.Sequential:
    """Three residual blocks: 20 million multiply-adds at 64 px. The weights are random."""
    stem = (nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.GroupNorm(4, 24), nn.SiLU())
    blocks = (Residual(24, 48), Residual(48, 96), Residual(96, 128))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES))
    return nn.Sequential(*stem, *blocks, *head)


def load_judge(name: str = EMBEDDED) -> nn.Sequential:
    """A trained judge, frozen, in eval mode. Without its last layer it gives features [N, 128].

    >>> load_judge("fashion-canvas")(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 10])

    Args:
        name: "fashion-canvas", for the classes of the embedded teacher.

    Returns:
        the network. Its ``pretrained_cfg`` has ``mean``, ``std`` and ``label_names``.

    Raises:
        ValueError: another name.
    """
    if name != EMBEDDED:
        raise ValueError(f"expected the judge {EMBEDDED}, got {name!r}")
    judge = judge_cnn()
    with as_file(files("smi_fast") / "weights") as folder:
        card = json.loads((folder / "fashion_canvas_judge.json").read_text())
        judge.load_state_dict(load_file(folder / "fashion_canvas_judge.safetensors"), strict=True)
    judge.pretrained_cfg = {  # type: ignore[assignment]
        "mean": tuple(card["mean"]),
        "std": tuple(card["std"]),
        "label_names": tuple(card["classes"]),
    }
    return judge.eval().requires_grad_(False)


def check_judge(judge: nn.Module, class_names: Sequence[str]) -> None:
    """Refuse a judge of other classes.

    Raises:
        ValueError: its classes are others.
    """
    own = list(judge.pretrained_cfg["label_names"])  # type: ignore[index]
    if own != list(class_names):
        raise ValueError(
            f"expected a judge of the teacher's classes, got one of {', '.join(own)}: leave it out"
        )


@torch.no_grad()
def verdicts(judge: nn.Module, pixels: Tensor) -> list[dict[str, object]]:
    """What a judge sees in whole images, as entries of their records.

    Args:
        judge: a network of :func:`load_judge`.
        pixels: [B, 3, H, W] in [0, 1].

    Returns:
        for each image ``judge``, the name of the class that it sees, and ``judge_confidence``.
    """
    card = judge.pretrained_cfg
    mean, std = (torch.tensor(card[key])[:, None, None] for key in ("mean", "std"))  # type: ignore[index]
    likely = judge((pixels.detach().cpu().float() - mean) / std).softmax(1).max(1)
    return [
        {"judge": card["label_names"][label], "judge_confidence": confidence}  # type: ignore[index]
        for confidence, label in zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
    ]
