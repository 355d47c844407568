"""The choice of the fastest way, with times that the tests choose: nothing runs on a GPU."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smi_fast import cli
from smi_fast.engine import gpu_steps
from smi_fast.ops import backends, native, reference, tuning
from smi_fast.ops.limits import AttentionSize
from smi_fast.ops.tuning import Tuning

GPU = torch.device("cuda", 0)
MACHINE = {"gpu": "H100", "torch": "2.14", "triton": "3.8", "smi_fast": "0.1"}


class Timer:
    """Times ways by what they return, and counts the timings."""

    def __init__(self) -> None:
        self.timed: list[float] = []

    def __call__(self, way: Callable[[], Any]) -> float:
        self.timed.append(way())
        return self.timed[-1]


def ways(**times: float) -> dict[str, Callable[[], float]]:
    return {name: (lambda time=time: time) for name, time in times.items()}


@pytest.fixture
def timer() -> Timer:
    return Timer()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tuning.json"


def test_fastest_is_taken_and_timed_once(path: Path, timer: Timer) -> None:
    table = Tuning(path, MACHINE, timer)
    for _ in range(3):
        assert table.fastest("op [3]", ways(a=2.0, b=1.0)) == "b"
    assert timer.timed == [2.0, 1.0]
    assert table.fastest("op [4]", ways(a=1.0, b=2.0)) == "a" and len(timer.timed) == 4


def test_the_file_decides(path: Path, timer: Timer) -> None:
    """Other times give the same choice, because nothing is timed again."""
    Tuning(path, MACHINE, timer).fastest("op", ways(a=2.0, b=1.0))
    again = Tuning(path, MACHINE, timer)
    assert again.fastest("op", ways(a=1.0, b=2.0)) == "b" and len(timer.timed) == 2
    found = json.loads(path.read_text())
    assert found["machine"] == MACHINE
    assert found["choices"] == {"op": {"takes": "b", "milliseconds": {"a": 2.0, "b": 1.0}}}


def test_way_that_is_no_more_is_not_taken(path: Path, timer: Timer) -> None:
    Tuning(path, MACHINE, timer).fastest("op", ways(a=2.0, gone=1.0))
    assert Tuning(path, MACHINE, timer).fastest("op", ways(a=2.0, b=3.0)) == "a"


def test_way_that_raises_is_not_taken(path: Path, timer: Timer) -> None:
    def raises() -> None:
        raise ArithmeticError("out of resources")

    table = Tuning(path, MACHINE, timer)
    assert table.fastest("op", {"broken": raises, **ways(a=3.0, b=2.0)}) == "b"
    assert table.fastest("none", {"first": raises, "second": raises}) == "first"
    assert "none" not in table.choices


def content(choices: Any, **machine: str) -> bytes:
    return json.dumps({"machine": {**MACHINE, **machine}, "choices": choices}).encode()


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (b"{", "one that can't be read"),
        (b"\xff\xfe", "one that can't be read"),
        (b"[]", "one that can't be read"),
        (content({"op": {"takes": "a"}}), "one that can't be read"),
        (content({"op": "a"}), "one that can't be read"),
        (content({"op": {"takes": 1, "milliseconds": {}}}), "another"),
        (content({}, gpu="A100"), "one of another machine"),
        (content({}, torch="2.15"), "one of another machine"),
    ],
)
def test_file_for_something_else_is_said_and_made_anew(
    held: bytes, said: str, path: Path, timer: Timer, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning._say.cache_clear()
    path.parent.mkdir()
    path.write_bytes(held)
    assert Tuning(path, MACHINE, timer).fastest("op", ways(a=2.0, b=1.0)) == "b"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("smi_fast: expected a tuning file of H100") and said in line
    assert Tuning(path, MACHINE, timer).choices["op"]["takes"] == "b"
    assert capsys.readouterr().err == ""


def test_processes_keep_what_others_have_found(path: Path, timer: Timer) -> None:
    one, other = (Tuning(path, MACHINE, timer) for _ in range(2))
    one.fastest("both", ways(a=1.0, b=2.0))
    other.fastest("both", ways(a=2.0, b=1.0))
    other.fastest("other", ways(a=1.0, b=2.0))
    last = Tuning(path, MACHINE, timer)
    assert {key: choice["takes"] for key, choice in last.choices.items()} == {
        "both": "a",
        "other": "a",
    }
    assert os.listdir(path.parent) == [path.name]


def test_file_is_whole_at_every_moment(
    path: Path, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that is cut off leaves the file before it."""
    table = Tuning(path, MACHINE, timer)
    table.fastest("op", ways(a=1.0, b=2.0))
    whole = path.read_text()
    write = Path.write_text

    def cut_off(self: Path, text: str, *options: Any) -> int:
        write(self, text[:20], *options)
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", cut_off)
    assert table.fastest("next", ways(a=1.0, b=2.0)) == "a"
    assert path.read_text() == whole


def test_folder_that_cannot_be_written_is_said(
    tmp_path: Path, timer: Timer, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning._say.cache_clear()
    (tmp_path / "file").write_text("")
    table = Tuning(tmp_path / "file" / "tuning.json", MACHINE, timer)
    assert [table.fastest(key, ways(a=2.0, b=1.0)) for key in "xy"] == ["b", "b"]
    said = capsys.readouterr().err
    assert "expected to write" in said and "timed again next time" in said


def test_nothing_is_timed_in_a_capture(
    path: Path, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Tuning(path, MACHINE, timer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert table.fastest("op", ways(a=2.0, b=1.0)) == "a"
    assert not timer.timed and not path.exists()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert table.fastest("op", ways(a=2.0, b=1.0)) == "b"


def test_setting_turns_it_off_and_has_two_values(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, expected in (("1", True), ("0", False)):
        monkeypatch.setattr(tuning, "SETTING", setting)
        assert tuning.is_on(GPU) == expected and not tuning.is_on(torch.device("cpu"))
    monkeypatch.setattr(tuning, "table_of", None)
    assert tuning.fastest(GPU, "op", ways(first=2.0, second=1.0)) == "first"
    monkeypatch.setattr(tuning, "SETTING", "yes")
    with pytest.raises(ValueError, match="expected SMI_FAST_TUNE 0 or 1, got 'yes'"):
        tuning.is_on(GPU)


def test_key_has_sizes_and_no_values() -> None:
    images, kept = torch.rand(2, 3, 4, 4), torch.zeros(2, 1, dtype=torch.int64)
    arguments = (images, kept, None, 4, True, 0.5, images.bfloat16())
    key = tuning.described(arguments)
    assert key == "float32[2,3,4,4] int64[2,1] - 4 1 - bfloat16[2,3,4,4]"
    assert tuning.described((images + 1, *arguments[1:])) == key


def test_file_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tuning.path_of("NVIDIA H100 80GB HBM3")
    assert path == tmp_path / "smi_fast" / "tuning-nvidia-h100-80gb-hbm3.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.path_of("a").parent == tmp_path / ".cache" / "smi_fast"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, path: Path, timer: Timer) -> Tuning:
    """A GPU with the CUDA and Triton kernels, whose choices a test can see."""
    table = Tuning(path, MACHINE, timer)
    monkeypatch.setattr(tuning, "SETTING", "1")
    monkeypatch.setattr(tuning, "table_of", lambda _: table)
    monkeypatch.setattr(native, "WHY_NO_CUDA", None)
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    monkeypatch.setattr(backends, "DEFAULT", backends.AUTO)
    monkeypatch.setattr(backends, "_gpu", lambda _: (9, 0, 227 * 1024))
    return table


def test_auto_is_tuned_and_a_name_is_not(gpu: Tuning) -> None:
    for op in backends.OPS:
        assert backends.choose(op, GPU, torch.float32).name == "tuned"
        for name in ("cuda", "triton"):
            assert backends.choose(op, GPU, torch.float32, name).name == name
        assert backends.choose(op, torch.device("cpu"), torch.float32).name != "tuned"
    size = AttentionSize(1000, 64, True)
    assert backends.choose("gather_attention", GPU, torch.float64).name == "reference"
    fast = backends.choose("gather_attention", GPU, torch.float32, attention=size).functions
    assert [backend.name for backend in fast._backends] == ["triton"]
    with pytest.MonkeyPatch.context() as without_cuda:
        without_cuda.setattr(native, "WHY_NO_CUDA", "it isn't there")
        names = [backends.choose(op, GPU, torch.float32).name for op in backends.OPS]
    assert names == ["tuned" if op == "gather_attention" else "triton" for op in backends.OPS]


def planted(calls: list[str]) -> backends.Backend:
    """The fastest of two kinds of the reference, which note their calls."""

    def of(name: str) -> backends.Backend:
        def noted(*arguments: Any) -> Any:
            calls.append(name)
            return reference.adam_clamp_(*arguments)

        functions = SimpleNamespace(adam_clamp_=noted)
        return backends.Backend(name, functions, lambda *_: None)

    return backends._tuned((of("slow"), of("fast")), GPU)


def test_an_op_changes_its_arguments_once_however_often_it_is_timed(
    gpu: Tuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def timer(way: Callable[[], Any]) -> float:
        for _ in range(5):
            way()
        return {"slow": 2.0, "fast": 1.0}[calls[-1]]

    monkeypatch.setattr(gpu, "_timer", timer)
    images, grad, *moments = torch.rand(4, 1, 3, 4, 4)
    low, high = -torch.ones(3), torch.ones(3)
    numbers = (torch.tensor(1), torch.tensor(0.1, dtype=torch.float64), 0.5, 0.9, 0.0, low, high)
    expected = [images.clone(), grad, *(moment.clone() for moment in moments)]
    reference.adam_clamp_(*expected, *numbers, None, 1)
    tuned = planted(calls).functions
    tuned.adam_clamp_(images, grad, *moments, *numbers, None, 1)
    assert calls == ["slow"] * 5 + ["fast"] * 6
    for ours, theirs in zip((images, *moments), (expected[0], *expected[2:]), strict=True):
        assert torch.equal(ours, theirs)
    tuned.adam_clamp_(images, grad, *moments, *numbers, None, 1)
    assert calls[11:] == ["fast"]
    (key,) = gpu.choices
    assert key.startswith("adam_clamp_ float32[1,3,4,4] float32[1,3,4,4]")


def test_attention_of_pytorch_is_a_candidate(gpu: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("smi_fast.kernels")
    asked: list[dict[str, Any]] = []

    def fastest(device: torch.device, key: str, ways: dict[str, Any]) -> str:
        asked.append(ways)
        return "sdpa"

    monkeypatch.setattr(tuning, "fastest", fastest)
    size = AttentionSize(9, 16, True)
    tuned = backends.choose("gather_attention", GPU, torch.float32, attention=size).functions
    qkv, grad = torch.randn(2, 9, 3, 2, 16), torch.randn(2, 9, 32)
    out, _ = tuned.gather_attention(qkv, None, None, False)
    gradient = tuned.gather_attention_backward(grad, qkv, None, None)
    torch.testing.assert_close(out, reference.gather_attention(qkv, None, None, False)[0])
    exact = reference.gather_attention_backward(grad, qkv, None, None)
    torch.testing.assert_close(gradient, exact)
    assert [set(ways) for ways in asked] == [{"cuda", "triton", "sdpa"}] * 2
    tuned = backends.choose("total_variation", GPU, torch.float32).functions
    monkeypatch.setattr(tuning, "fastest", lambda device, key, ways: asked.append(ways) or "none")
    with pytest.raises(KeyError):
        tuned.total_variation(torch.rand(1, 3, 4, 4), None, 1)
    assert set(asked[-1]) == {"cuda", "triton"}


@pytest.mark.parametrize("best", ["fused", "fused, tiles of 64", "fused, tiles of 128", "separate"])
def test_products_of_the_engine_are_tuned(monkeypatch: pytest.MonkeyPatch, best: str) -> None:
    keys: list[str] = []
    calls: list[tuple[str, Any]] = []

    def fastest(device: torch.device, key: str, ways: dict[str, Any]) -> str:
        keys.append(key)
        assert list(ways) == ["fused", "fused, tiles of 64", "fused, tiles of 128", "separate"]
        return best

    class Kernels:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, side=0: calls.append((name, side))

    monkeypatch.setattr(tuning, "fastest", fastest)
    steps = gpu_steps.Steps("bfloat16")
    monkeypatch.setattr(steps, "functions", Kernels())
    weights = {"fc1": torch.randn(8, 4), "fc1_bias": torch.randn(8), "fc2": torch.randn(4, 8)}
    block: Any = SimpleNamespace(**weights, approximate="none", gated=False)
    x, derivative, hidden = torch.randn(3, 4), torch.randn(3, 8), torch.randn(3, 8)
    steps.activate(block, x, derivative, hidden)
    steps.activate_backward(block, x, derivative, None, hidden, None)
    side = int(best.rpartition(" ")[2]) if "tiles" in best else 0
    separate = [("gelu_", 0), ("multiply_", 0)]
    fused = [("linear_gelu_", side), ("multiplied_product_", side)]
    assert calls == (separate if best == "separate" else fused)
    assert keys == [
        "linear_gelu_ bfloat16 float32[3,4] float32[8,4]",
        "multiplied_product_ bfloat16 float32[3,4] float32[4,8]",
    ]
    if best == "separate":
        torch.testing.assert_close(hidden, x @ block.fc2)


def test_command_prints_the_choices(
    path: Path,
    timer: Timer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def smi_fast_tune() -> str:
        monkeypatch.setattr(sys, "argv", ["smi-fast", "tune"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        return capsys.readouterr().out

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert smi_fast_tune() == "nothing is tuned: no CUDA device is visible\n"
    table = Tuning(path, MACHINE, timer)
    table.fastest("op int64[2]", ways(a=2.0, b=0.5))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(tuning, "table_of", lambda _: table)
    assert smi_fast_tune().splitlines() == [
        f"H100: 1 choices in {path}",
        "  op int64[2]: b (b 0.5 ms, a 2 ms)",
    ]
