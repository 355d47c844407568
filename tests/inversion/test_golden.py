"""Replays recordings of the published loop (Egg-Hu/SMI) in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast import Dense, SparseInverter, StopSchedule
from tests.helpers.inversions import PUBLISHED

pytestmark = pytest.mark.usefixtures("each_backend")

GOLDEN = Path(__file__).parents[1] / "golden"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Recording:
    """One recording and the teacher that it was made with."""

    def __init__(self, name: str) -> None:
        self.arrays = dict(np.load(GOLDEN / f"published_loop_{name}.npz"))
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

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    @property
    def schedule(self) -> Dense | StopSchedule:
        if self.arrays["prune_it"].tolist() == [-1]:
            return Dense()
        return StopSchedule(tuple(self["prune_it"].tolist()), tuple(self["prune_ratio"].tolist()))


@pytest.mark.parametrize("name", ["dense", "patch16"])
def test_replay(name: str) -> None:
    recording = Recording(name)
    inverter = SparseInverter(
        recording.teacher,
        **PUBLISHED,
        schedule=recording.schedule,
        iterations=len(recording["ce"]),
        background="regularized",
        final_mask="reranked",
        **IMAGENET,
    )
    stops = {}
    result = inverter.invert(
        recording["targets"],
        init=recording["init"],
        jitter=(recording["shift"], recording["flip"]),
        progress=False,
        callback=lambda t, images, kept: stops.setdefault(kept.shape[1], kept),
    )

    def worst(values: list[float], expected: str) -> float:
        return (torch.tensor(values, dtype=torch.float64) - recording[expected]).abs().max().item()

    assert worst(result.history["cross_entropy"], "ce") < 1e-8
    assert worst(result.history["total_variation"], "tv") < 1e-8
    stops.pop(196)
    for index, kept in enumerate(stops.values()):
        patches = recording[f"kept_{index}"][:, 1:] - 1
        assert torch.equal(kept, patches.sort(dim=1).values)
    assert len(stops) == len(inverter.schedule.at)
    assert (result.images - recording["synthetic"]).abs().max() < 1e-6
    shown = recording["masked"].unflatten(2, (14, 16)).unflatten(1, (14, 16)).any(4).any(2)
    assert torch.equal(result.masks, shown)
