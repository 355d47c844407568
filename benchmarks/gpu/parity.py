"""The recordings of the published loop, replayed on a GPU in every precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.baselines.recordings import MEAN, NAMES, STD, Recording, replay
from smi_fast.engine.precision import FLOAT32, PRECISIONS
from smi_fast.verify.stages import attempt

FLOAT64 = "float64"
# What float64 must reach, as on the CPU. Other precisions only say how far they are.
LIMITS = {"cross_entropy": 1e-8, "total_variation": 1e-8, "pixels": 1e-6}


def send_parity(send: Callable[[object], None], device: str) -> None:
    """Send a line for each recording and precision."""
    for name in NAMES:
        for precision in (FLOAT64, *PRECISIONS):
            named = {"kind": "parity", "recording": name, "precision": precision}
            attempt(send, named, "failures", parity, name, precision, device)


def parity(name: str, precision: str, device: str) -> dict[str, Any]:
    """How far a replay is from its recording.

    Returns:
        a line: the largest differences of the losses and of pixels, the least share of a kept set
        and of the last mask that agrees, and the confidence of the float32 teacher in the images.
    """
    recording = Recording(name)
    dtype = torch.float64 if precision == FLOAT64 else torch.float32
    products = FLOAT32 if precision == FLOAT64 else precision
    made = replay(recording, dtype, products, device)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    images = (made.result.images.cpu().float() - mean) / std
    with torch.no_grad():
        logits = recording.teacher.float()(images.to(device))
    right = logits.softmax(1).cpu().gather(1, recording["targets"][:, None])
    found = {
        "cross_entropy": made.worst("cross_entropy", recording["ce"]),
        "total_variation": made.worst("total_variation", recording["tv"]),
        "pixels": (made.result.images.cpu() - recording["synthetic"]).abs().max().item(),
    }
    kept = [
        _overlap(ours, theirs) for ours, theirs in zip(made.kept, recording.kept(), strict=True)
    ]
    masks = (made.result.masks.cpu() == recording.masks()).double().mean().item()
    shares = {"kept": min(kept, default=1.0), "masks": masks}
    failures = []
    if precision == FLOAT64:
        failures = [f"{key}: {found[key]:.3g}" for key in LIMITS if not found[key] < LIMITS[key]]
        failures += [f"{key}: {share:.3g} agrees" for key, share in shares.items() if share < 1]
    confidence = right.mean().item()
    return {**found, **shares, "confidence": confidence, "failures": failures}


def _overlap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The share of the patches int64 [B, K] that both sets have."""
    same = (ours[:, :, None] == theirs[:, None]).any(2)
    return same.double().mean().item()
