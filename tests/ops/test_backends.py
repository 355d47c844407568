"""Which backend runs a call on a GPU, decided on a machine without one: nothing is launched."""

from __future__ import annotations

import sys

import pytest
import torch

from smi_fast import ops
from smi_fast.ops import backends, native, tuning
from smi_fast.ops.backends import BackendUnavailable
from smi_fast.ops.limits import AttentionSize

GPU = torch.device("cuda", 0)
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
# Compute capability and shared memory of a block: A100 and H100.
A100, H100 = (8, 0, 163 * 1024), (9, 0, 227 * 1024)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An H100 with every backend installed and nothing tuned; a test takes away what it wants to
    miss.
    """
    monkeypatch.setattr(tuning, "SETTING", "0")
    monkeypatch.setattr(native, "WHY_NO_CUDA", None)
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    monkeypatch.setattr(backends, "DEFAULT", backends.AUTO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_gpu", lambda _: H100)
    return monkeypatch


def chosen(
    dtype: torch.dtype = F32, name: str = backends.AUTO, attention: AttentionSize | None = None
) -> dict[str, str]:
    return {op: backends.choose(op, GPU, dtype, name, attention).name for op in backends.OPS}


def test_auto_takes_what_the_table_has_for_an_op(gpu: pytest.MonkeyPatch) -> None:
    assert chosen() == chosen(BF16) == {op: name for op, (name, _) in backends.ON_GPU.items()}
    assert set(chosen().values()) == {"cuda", "triton"}


def test_either_can_be_named(gpu: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "triton"):
        assert set(chosen(name=name).values()) == {name}
        gpu.setattr(backends, "DEFAULT", name)
        assert set(chosen().values()) == {name}


def test_where_one_is_missing_the_other_runs_every_op(gpu: pytest.MonkeyPatch) -> None:
    with gpu.context() as without_triton:
        without_triton.setattr(backends, "_HAS_TRITON", False)
        assert set(chosen().values()) == {"cuda"}
        with pytest.raises(BackendUnavailable, match=r": triton: triton isn't installed$"):
            chosen(name="triton")
    gpu.setattr(native, "WHY_NO_CUDA", "torch 2.14.1+cpu is built without CUDA")
    assert set(chosen().values()) == {"triton"}
    with pytest.raises(BackendUnavailable, match=r": cuda: torch .* is built without CUDA$"):
        chosen(name="cuda")
    gpu.setattr(backends, "_HAS_TRITON", False)
    assert set(chosen().values()) == {"reference"}


def test_old_gpus_are_left_to_others(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(backends, "_gpu", lambda _: (7, 5, 64 * 1024))
    assert set(chosen().values()) == {"triton"}
    with pytest.raises(BackendUnavailable, match=r"compute capability 8\.0, cuda:0 has 7\.5$"):
        chosen(name="cuda")


def test_float64_is_only_copied(gpu: pytest.MonkeyPatch) -> None:
    assert chosen(F64) == dict.fromkeys(backends.OPS, "reference") | {"gather_patches": "cuda"}
    for op in backends.OPS[1:]:
        with pytest.raises(BackendUnavailable, match=rf"of {op} takes .*, got torch\.float64$"):
            backends.choose(op, GPU, F64, "cuda")


@pytest.mark.parametrize(
    ("machine", "dtype", "width", "gradient", "most"),
    [
        (H100, F32, 64, True, 208),
        (A100, F32, 64, True, 144),
        (H100, F32, 64, False, 272),
        (A100, F32, 64, False, 192),
        (H100, F32, 80, True, 160),
        (H100, BF16, 64, True, 384),
        (A100, BF16, 64, True, 272),
        (H100, BF16, 128, True, 208),
    ],
)
def test_attention_that_does_not_fit_goes_to_triton(
    gpu: pytest.MonkeyPatch,
    machine: tuple[int, int, int],
    dtype: torch.dtype,
    width: int,
    gradient: bool,
    most: int,
) -> None:
    gpu.setattr(backends, "_gpu", lambda _: machine)
    for tokens, expected in ((most, "cuda"), (most + 1, "triton")):
        size = AttentionSize(tokens, width, gradient)
        assert backends.choose("gather_attention", GPU, dtype, attention=size).name == expected
    memory = f"in {machine[2]} bytes of shared memory"
    sentence = rf"holds {most} tokens of width {width} in {dtype}.* {memory}, got {most + 1}$"
    with pytest.raises(BackendUnavailable, match=sentence) as refused:
        backends.choose("gather_attention", GPU, dtype, "cuda", size)
    assert ("for the gradient" in str(refused.value)) == gradient


@pytest.mark.parametrize("width", [12, 136])
def test_heads_of_other_widths_go_to_triton(gpu: pytest.MonkeyPatch, width: int) -> None:
    size = AttentionSize(46, width, True)
    assert backends.choose("gather_attention", GPU, F32, attention=size).name == "triton"
    with pytest.raises(
        BackendUnavailable, match=rf"wide as a multiple of 8 up to 128, got {width}$"
    ):
        backends.choose("gather_attention", GPU, F32, "cuda", size)


def test_the_choice_knows_the_size_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def choose(*arguments: object) -> backends.Backend:
        sizes.append(arguments[-1])
        return backends.choose(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sys.modules["smi_fast.ops.gather_attention"], "choose", choose)
    qkv, kept = torch.randn(2, 9, 3, 2, 16, requires_grad=True), torch.zeros(2, 1, dtype=torch.long)
    ops.gather_attention(qkv)
    ops.gather_attention(qkv, kept)
    ops.gather_attention(qkv.detach(), kept)
    with torch.no_grad():
        ops.gather_attention(qkv, kept)
    assert sizes == [
        AttentionSize(9, 16, True),
        AttentionSize(1, 16, True),
        AttentionSize(1, 16, False),
        AttentionSize(1, 16, False),
    ]


def test_every_choice_on_a_gpu_has_its_reason() -> None:
    assert tuple(backends.ON_GPU) == backends.OPS
    assert all(name in ("cuda", "triton") and why for name, why in backends.ON_GPU.values())
