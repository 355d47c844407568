"""The times of ``smi-fast verify``, on the CPU and small: only the events of CUDA differ."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast.ops import reference
from smi_fast.verify import stages, timing
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
    ops = dict.fromkeys(call.op for call in timing.deit_calls(batch=2))
    entries = [entry for op in ops for entry in timing.op_times(CPU, op, batch=2)]
    ways = {entry["op"]: set(entry["milliseconds"]) for entry in entries}
    assert {"eager", "torch.compile", "sdpa"} <= ways["gather_attention_backward"]
    assert len(ways) == 10 and all(t > 0 for e in entries for t in e["milliseconds"].values())
    assert not any(entry["failed"] for entry in entries)


def test_way_that_raises_or_is_wrong_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(function: object, **_: object) -> object:
        raise SyntaxError("no compiler")

    def wrong(*arguments: Any) -> None:
        reference.adam_clamp_(*arguments)
        arguments[0].add_(0.1)

    monkeypatch.setattr(torch, "compile", refuses)
    functions = SimpleNamespace(adam_clamp_=wrong)
    planted = timing.backends.Backend("planted", functions, lambda *_: None)
    monkeypatch.setattr(timing.backends, "BACKENDS", (planted, timing.backends.BACKENDS[-1]))
    entries = list(timing.op_times(CPU, "adam_clamp_", batch=2))
    assert entries
    for entry in entries:
        assert set(entry["milliseconds"]) == {"eager"}
        assert entry["failed"]["torch.compile"] == "SyntaxError: no compiler"
        assert "error 0." in entry["failed"]["planted"]


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
        names = ("backend", "kept", "precision") if len(arguments) == 3 else ("op",)
        yield {**dict(zip(names, arguments, strict=True)), "milliseconds": 1.0}

    monkeypatch.setattr(stages.isolation, "messages", messages)
    entries = [
        *timing.op_entries(CPU, 60),
        *timing.step_entries(CPU, 60),
    ]
    failed = [entry for entry in entries if "not_timed" in entry]
    assert len(entries) == 10 + 4 and len(failed) == 2
    assert failed[0]["op"] == "adam_clamp_" and "SIGSEGV" in failed[0]["not_timed"]
    assert failed[1]["backend"] == "auto" and "5 s" in failed[1]["not_timed"]


def test_dense_over_sparse_is_told_where_both_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def messages(work: object, place: str, *arguments: Any, **_: object) -> Iterator[object]:
        backend, kept, precision = arguments
        named = {"backend": backend, "precision": precision, "kept": kept}
        yield {"kind": "time", **named, "milliseconds": 6.0 if backend == "reference" else kept}

    monkeypatch.setattr(stages.isolation, "messages", messages)
    *_, last = timing.step_entries(CPU, 60)
    assert last["ratio"] == 3.0 and "dense eager" in last["step"]


def test_sustained_time_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        clock[0] += 0.2

    taken, count = timing.sustained(call, CPU)
    assert count == 3 and taken == pytest.approx(200)
