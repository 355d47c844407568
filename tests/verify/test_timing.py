"""The times of ``smi-fast verify``, on the CPU and small: only the events of CUDA differ."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast.verify import timing
from smi_fast.verify.isolation import Ended

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = ("reference", "auto")
    steps = tuple((backend, kept, "float32") for backend in backends for kept in (4, 2))
    sizes = {"SIDE": 32, "KEPT": (4, 2), "STEPS": steps, "WARM_UP": 0, "REPEATS": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(timing, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_ops_are_timed_beside_their_alternatives() -> None:
    ops = dict.fromkeys(call.op for call in timing._deit_calls(batch=2))
    entries = [entry for op in ops for entry in timing.op_times(CPU, op, batch=2)]
    ways = {entry["op"]: set(entry["milliseconds"]) for entry in entries}
    assert {"eager", "torch.compile", "sdpa"} <= ways["gather_attention_backward"]
    assert len(ways) == 10 and all(t > 0 for e in entries for t in e["milliseconds"].values())
    assert not any(entry["failed"] for entry in entries)


def test_way_that_raises_or_is_wrong_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(function: object, **_: object) -> object:
        raise SyntaxError("no compiler")

    monkeypatch.setattr(torch, "compile", refuses)
    wrong = frozenset({("cpp", "adam_clamp_")})
    for entry in timing.op_times(CPU, "adam_clamp_", wrong, batch=2):
        assert set(entry["milliseconds"]) == {"eager"}
        assert entry["failed"].pop("torch.compile") == "SyntaxError: no compiler"
        assert entry["failed"] in ({"cpp": "it is wrong"}, {})


def test_iterations_are_timed_dense_and_sparse() -> None:
    steps = [timing.step_time(CPU, tiny(), *each, batch=2) for each in timing.STEPS]
    assert [step["step"] for step in steps] == ["2 images, 4 patches", "2 images, 2 patches"] * 2
    assert all(step["milliseconds"] > 0 for step in steps)


def tiny() -> VisionTransformer:
    return VisionTransformer(
        img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )


def test_crash_of_one_entry_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for processes: that of an op is killed, that of an iteration hangs."""

    def messages(work: object, place: str, *arguments: object, **_: object) -> Iterator[object]:
        if "adam_clamp_" in arguments:
            raise Ended("its process was ended by SIGSEGV")
        if arguments == (timing.backends.AUTO, 2, "float32"):
            raise Ended("its process took longer than 5 s")
        yield {"of": arguments, "milliseconds": 1.0}

    monkeypatch.setattr(timing.isolation, "messages", messages)
    wrong = frozenset({("planted", "total_variation")})
    entries = list(timing.entries(CPU, wrong, limit=5))
    failed = [entry for entry in entries if "not_timed" in entry]
    assert len(entries) == 10 + 4 and len(failed) == 2
    assert failed[0] == {"op": "adam_clamp_", "not_timed": "its process was ended by SIGSEGV"}
    assert failed[1]["backend"] == "auto" and "5 s" in failed[1]["not_timed"]


def test_iteration_with_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.isolation, "messages", lambda *_, **__: [{"milliseconds": 1.0}])
    chosen = timing.backends.choose("adam_clamp_", CPU, torch.float32).name
    entries = list(timing.entries(CPU, frozenset({(chosen, "adam_clamp_")}), limit=5))
    said = [entry["not_timed"] for entry in entries if "not_timed" in entry]
    assert said == [f"{chosen} adam_clamp_ is wrong"] * 2
    assert not any("ratio" in entry for entry in entries)
    said = timing._wrong_in_step(CPU, frozenset({("triton", "linear_gelu_")}))
    assert said == ["triton linear_gelu_"]
