"""The benchmarks: their yardstick computes what ours does, and their arithmetic is right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import figures as plot
from benchmarks.harness import memory as resident
from benchmarks.harness.flops import forward_flops, needed_flops
from benchmarks.speed import end_to_end, ops, roofline
from benchmarks.speed import objectives as statistics
from benchmarks.speed import step_profile as profile
from benchmarks.speed.loops import (
    VARIANTS,
    Callback,
    Case,
    Cost,
    Loop,
    Variant,
    costs,
    our_loop,
    published_loop,
)
from smi_fast import Dense, SparseViT, StopSchedule
from smi_fast.schedules import Schedule

STOPS = StopSchedule((3, 6), (0.5, 0.5))


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(1)
    vit = VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
    )
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Case(vit.eval(), torch.tensor([1, 4]), torch.randn(2, 3, 32, 48))


@pytest.fixture(scope="module")
def exact(case: Case) -> Case:
    """The same in float64."""
    vit = VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
    )
    vit.load_state_dict(case.vit.state_dict())
    return Case(vit.double().eval(), case.targets, case.init.double())


@pytest.mark.parametrize("schedule", [Dense(), STOPS], ids=["dense", "sparse"])
def test_published_style_loop_computes_what_ours_does(exact: Case, schedule: Schedule) -> None:
    frames = []
    for run in (published_loop(exact), our_loop(exact, background="regularized")):
        pixels = []
        run(schedule, 10, lambda t, images, kept, to=pixels: to.append((images.clone(), kept)))
        frames.append(pixels)
    for (theirs, their_kept), (ours, our_kept) in zip(*frames, strict=True):
        assert torch.equal(their_kept, our_kept)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    assert not torch.equal(frames[0][0][0], frames[0][-1][0])


def test_published_style_loop_spends_gradients_on_the_weights(exact: Case) -> None:
    published_loop(exact)(Dense(), 1, lambda *_: None)
    assert all(parameter.grad is not None for parameter in exact.vit.parameters())


def test_dense_images_that_differ_are_no_agreement() -> None:
    images = torch.rand(2, 3, 32, 48)
    assert end_to_end.agreement(images, images) == 1
    with pytest.raises(AssertionError, match="expected the same images of both dense loops"):
        end_to_end.agreement(images, images.flip(3))


@pytest.mark.skipif(
    not resident.CLEAR_REFS.exists(), reason="the kernel can't set the peak of a process back"
)
def test_peak_memory_is_what_a_loop_takes_at_most(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(_: Case) -> Loop:
        def run(*_: object) -> None:
            for _ in range(3):
                torch.ones(2**24).sum()

        return run

    monkeypatch.setattr(end_to_end, "deit", lambda _: case)
    monkeypatch.setitem(VARIANTS, "hungry", Variant(hungry, sparse=False))
    # One of the three, 67 MB, is held at a time.
    peak = end_to_end.peak_memory("deit_tiny", "hungry")
    assert peak == pytest.approx(2**26, rel=0.25)


@pytest.mark.parametrize(
    ("name", "batch", "gflop"),
    [("deit_tiny", 8, 8.0), ("deit_small", 8, 30.8), ("deit_base", 4, 60.5)],
)
def test_needed_work_at_46_patches(name: str, batch: int, gflop: float) -> None:
    with torch.device("meta"):
        vit = timm.create_model(f"{name}_patch16_224")
    assert needed_flops(vit, batch, 46) / 1e9 == pytest.approx(gflop, abs=0.1)


@pytest.mark.parametrize("kept", [6, 24])
def test_needed_work_is_what_pytorch_counts(case: Case, kept: int) -> None:
    images, patches = case.init.clone().requires_grad_(), torch.arange(kept).expand(2, -1)
    with FlopCounterMode(display=False) as counter:
        logits = SparseViT(case.vit, backend="reference")(images, patches).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    linear, attention = forward_flops(case.vit, kept)
    assert forward == 2 * (linear + attention)
    # The gradient of attention has twice its products, and in two blocks computes scores again.
    again = 2 * 2 * (kept + 1) ** 2 * 32
    assert counter.get_total_flops() == 2 * (2 * linear + 3 * attention + again)
    assert needed_flops(case.vit, 2, kept) == 2 * (2 * linear + 2 * attention)


def test_costs_tell_early_and_typical_steps_of_each_phase(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [9.0, 1.0, 1.0, 8.0, 2.0, 2.0, 7.0, 3.0, 4.0, 50.0]
    clock = iter([0.0] + [edge for s in seconds for edge in (s, 0.0)])
    monkeypatch.setattr("benchmarks.speed.loops.time.perf_counter", lambda: next(clock))

    def run(schedule: Schedule, iterations: int, callback: Callback) -> None:
        for t, kept in enumerate([24] * 3 + [12] * 3 + [6] * 4):
            callback(t, case.init, torch.zeros(2, kept))

    assert costs(run, STOPS, 10, early=3)[12] == Cost((8.0, 2.0, 2.0), 2.0)
    clock = iter([0.0] + [edge for s in seconds for edge in (s, 0.0)])
    expected = {24: Cost((9.0,), 1.0), 12: Cost((8.0,), 2.0), 6: Cost((7.0,), 4.0)}
    assert costs(run, STOPS, 10) == expected
    phases = end_to_end.schedule_phases(STOPS, 10, 24)
    assert phases == [(24, 3), (12, 3), (6, 4)]
    assert end_to_end.whole_seconds(phases, expected) == 9 + 2 * 1 + 8 + 2 * 2 + 7 + 3 * 4


def test_end_to_end_is_measured_and_drawn(case: Case) -> None:
    measured = end_to_end.measure(case, 400, rounds=1)
    phases = [(24, 5), (16, 5), (11, 10), (7, 10), (4, 370)]
    for name, variant in measured["variants"].items():
        steps = variant["steps"]
        expected = phases if VARIANTS[name].sparse else [(24, 400)]
        assert [(step["patches"], step["iterations"]) for step in steps] == expected
        composed = sum(
            step["early_seconds"]["median"]
            + (step["iterations"] - step["early_steps"]) * step["seconds"]["median"]
            for step in steps
        )
        assert variant["whole_seconds"]["median"] == pytest.approx(composed, rel=1e-3)
    whole = {k: v["whole_seconds"]["median"] for k, v in measured["variants"].items()}
    ratios = measured["ratios_to_our_sparse"]["whole_schedule"]
    times = {name: ratio["median"] for name, ratio in ratios.items()}
    for name, ratio in times.items():
        assert ratio == pytest.approx(whole[name] / whole["our_sparse"], rel=1e-3)

    machine = {"threads": 1, "cpu": "a CPU"}
    results = {"models": {"deit_tiny": measured}, "iterations": 400, "environment": machine}
    (axes,) = plot.draw(results).axes
    names = ["published_dense", *(name for name, _, _ in plot.TECHNIQUES)]
    factors = [times["published_dense"] / times[name] for name in names]
    for bar, (start, end) in zip(axes.patches, pairwise(factors), strict=True):
        assert (bar.get_x(), bar.get_width()) == pytest.approx((start, end - start))


def test_profile_shares_are_of_the_whole_step(case: Case) -> None:
    measured = profile.measure(case, StopSchedule((1, 2), (0.5, 0.5)), steps=2)
    shares = measured["shares"]
    assert measured["patches"] == 6
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert min(shares[name] for name in ("gemm", "attention", "norm_and_gelu", "pixels")) > 0


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::addmm", [[8], [9, 8]], "gemm"),
        ("aten::sum", [[2, 3, 32, 48]], "pixels"),
        ("smi_fast::gather_patches_backward", [[2, 6, 192]], "pixels"),
        ("smi_fast::gather_attention_backward", [[2, 7, 32]], "attention"),
        ("aten::gelu_backward", [[2, 7, 128]], "norm_and_gelu"),
        ("aten::add", [[2, 7, 32]], "other_tensor_ops"),
    ],
)
def test_profile_tells_what_an_op_is_for(name: str, shapes: list, kind: str) -> None:
    assert profile.kind(name, shapes, [2, 3, 32, 48]) == kind


def test_a_wrong_op_is_not_timed() -> None:
    right, wrong = torch.ones(3), torch.ones(3) + 1e-4
    ops.check({"reference": lambda: (right,), "cpp": lambda: (right + 1e-6,)})
    with pytest.raises(AssertionError, match="cpp is 1"):
        ops.check({"reference": lambda: (right,), "cpp": lambda: (wrong,)})


def test_roofline_counts_the_needed_work_and_every_pixel() -> None:
    vit = timm.create_model("deit_small_patch16_224")
    for kept in (196, 46):
        parts = {part.name: part for part in roofline.parts(vit, 4, kept, "bfloat16")}
        # Of attention's backward, needed_flops counts half.
        attention = parts["gather_attention, forward"].flops
        total = sum(part.flops for part in parts.values())
        assert total == needed_flops(vit, 4, kept) + attention
        assert parts["adam_clamp_"].bytes == 7 * 4 * 4 * 3 * kept * 16**2
        qkv = 4 * (kept + 1) * 3 * 384 * 2
        assert parts["gather_attention, forward"].bytes == 11 * qkv * 4 / 3


def test_roofline_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    gpu = roofline.GPU({"bfloat16": 100.0}, 10.0, "made up")
    parts = [roofline.Part("a", 500.0, 10.0), roofline.Part("b", 0.0, 20.0)]
    found = roofline.floor(parts, gpu, "bfloat16")
    assert found["predicted_floor_ms"] == 7000 and found["bound_by_arithmetic_ms"] == 5000
    assert found["binds"] == "arithmetic"
    assert roofline.floor(parts[1:], gpu, "bfloat16")["binds"] == "memory"


def test_hooks_compute_what_the_op_does() -> None:
    ours, hooked = statistics.layers(2, 64), statistics.layers(2, 64)
    assert len(ours) == 49 and ours[0].x.shape == (2, 32, 32, 32)
    theirs = statistics.hooked(hooked)
    for _ in range(2):
        got, expected = statistics.fused(ours), theirs()
        assert len(got) == 50 and max(statistics._errors(got, expected)) < 1e-5


@pytest.mark.parametrize("similarities", [statistics.by_broadcast, statistics.by_product])
def test_published_entropy_is_what_ours_is(similarities: Callable) -> None:
    features = [torch.randn(2, 9, 5, dtype=torch.float64) + 0.5 for _ in range(2)]
    plain = partial(statistics.published_entropy, similarities=similarities)
    expected = statistics._with_gradients(plain, features)
    got = statistics._with_gradients(statistics.similarity_entropy, features)
    assert max(statistics._errors(got, expected)) < 1e-9
