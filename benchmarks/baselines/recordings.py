"""Recordings of the published loop, in float64, and their replay by smi_fast."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import Dense, InversionResult, Pixels, SparseInverter, StopSchedule
from smi_fast.engine.precision import FLOAT32
from smi_fast.objectives import CrossEntropy, TotalVariation

FOLDER = Path(__file__).parents[2] / "tests" / "golden"
NAMES = ("dense", "patch16")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Recording:
    """One recording and the teacher that it was made with.

    Attributes:
        arrays: by name; targets, init, shift and flip went in, the others came out.
        teacher: in float64.
    """

    def __init__(self, name: str) -> None:
        self.arrays = dict(np.load(FOLDER / f"published_loop_{name}.npz"))
        config = json.loads(str(self.arrays["config"]))
        self.teacher = VisionTransformer(
            img_size=224,
            patch_size=config["patch"],
            embed_dim=config["dim"],
            depth=config["depth"],
            num_heads=config["heads"],
            num_classes=config["classes"],
        )
        weights = {
            k[7:]: torch.from_numpy(v) for k, v in self.arrays.items() if k.startswith("weight/")
        }
        self.teacher.load_state_dict(weights)
        self.teacher.double()

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    @property
    def schedule(self) -> Dense | StopSchedule:
        if self.arrays["prune_it"].tolist() == [-1]:
            return Dense()
        return StopSchedule(tuple(self["prune_it"].tolist()), tuple(self["prune_ratio"].tolist()))

    def kept(self) -> list[Tensor]:
        """int64 [B, K], the patches that are left after each stop, ascending."""
        count = 0 if isinstance(self.schedule, Dense) else len(self.schedule.at)
        found = (self[f"kept_{index}"][:, 1:] - 1 for index in range(count))
        return [patches.sort(dim=1).values for patches in found]

    def masks(self) -> Tensor:
        """bool [B, rows, columns], the patches that the last mask shows."""
        return self["masked"].unflatten(2, (14, 16)).unflatten(1, (14, 16)).any(4).any(2)


@dataclass(frozen=True)
class Replay:
    """What smi_fast makes of the same start.

    Attributes:
        result: of the inversion.
        kept: int64 [B, K], on the CPU, after each stop.
    """

    result: InversionResult
    kept: list[Tensor]

    def worst(self, objective: str, expected: Tensor) -> float:
        """The largest difference of an objective in any iteration."""
        values = torch.tensor(self.result.history[objective], dtype=torch.float64)
        return (values - expected).abs().max().item()


def replay(
    recording: Recording,
    dtype: torch.dtype = torch.float64,
    precision: str = FLOAT32,
    device: str | torch.device = "cpu",
) -> Replay:
    """Invert from the start of a recording.

    Args:
        recording: its teacher is moved to the device and the data type.
        dtype: of the teacher and of the images.
        precision: of the teacher's products.
        device: where to run.
    """
    inverter = SparseInverter(
        recording.teacher.to(device, dtype),
        objectives=(CrossEntropy(), TotalVariation(1e-4, per_image=False)),
        parametrization=Pixels(),
        lr=0.25,
        betas=(0.5, 0.99),
        schedule=recording.schedule,
        iterations=len(recording["ce"]),
        background="regularized",
        final_mask="reranked",
        mean=MEAN,
        std=STD,
        precision=precision,
    )
    stops: dict[int, Tensor] = {}
    result = inverter.invert(
        recording["targets"],
        init=recording["init"].to(dtype),
        jitter=(recording["shift"], recording["flip"]),
        progress=False,
        callback=lambda t, images, kept: stops.setdefault(kept.shape[1], kept.cpu()),
    )
    return Replay(result, [*stops.values()][1:])
