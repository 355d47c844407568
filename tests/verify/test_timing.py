"""The times of ``smi-fast verify``, on the CPU and small: only the events of CUDA differ."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast.verify import timing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SIDE": 32, "KEPT": (4, 2), "WARM_UP": 0, "REPEATS": 1}.items():
        monkeypatch.setattr(timing, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_ops_are_timed_beside_their_alternatives() -> None:
    entries = list(timing.op_times(CPU, batch=2))
    ways = {entry["op"]: set(entry["milliseconds"]) for entry in entries}
    assert {"eager", "torch.compile", "sdpa"} <= ways["gather_attention_backward"]
    assert len(ways) == 8 and all(t > 0 for e in entries for t in e["milliseconds"].values())


def test_iterations_are_timed_dense_and_sparse() -> None:
    teacher = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )
    *steps, last = timing.step_times(CPU, teacher, batch=2)
    assert [step["step"] for step in steps] == ["2 images, 4 patches", "2 images, 2 patches"] * 2
    assert last["ratio"] == steps[0]["milliseconds"] / steps[3]["milliseconds"]
