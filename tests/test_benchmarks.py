"""The benchmarks: their yardstick makes the images that ours makes, and the arithmetic is right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import figures
from benchmarks.__main__ import MEASUREMENTS
from benchmarks.baselines import published_losses
from benchmarks.harness import environment, memory
from benchmarks.harness.flops import forward_flops, needed_flops
from benchmarks.speed import (
    end_to_end,
    objectives,
    ops,
    parametrizations,
    roofline,
    scaling,
    step_profile,
)
from benchmarks.speed.loops import (
    NO_STOPS,
    VARIANTS,
    Callback,
    Loop,
    PhaseSeconds,
    Variant,
    Workload,
    our_loop,
    published_loop,
    time_phases,
)
from smi_fast import SparseViT, StopSchedule

STOPS = StopSchedule((3, 6), (0.5, 0.5))


@pytest.fixture(scope="module")
def workload() -> Workload:
    torch.manual_seed(1)
    vit = VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
    )
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Workload(vit.eval(), torch.tensor([1, 4]), torch.randn(2, 3, 32, 48))


@pytest.fixture(scope="module")
def exact(workload: Workload) -> Workload:
    """The same workload in float64."""
    vit = VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
    )
    vit.load_state_dict(workload.vit.state_dict())
    return Workload(vit.double().eval(), workload.targets, workload.init.double())


@pytest.mark.parametrize("stops", [NO_STOPS, STOPS], ids=["dense", "sparse"])
def test_published_style_loop_computes_what_ours_does(exact: Workload, stops: StopSchedule) -> None:
    frames = []
    for run in (published_loop(exact), our_loop(exact, background="regularized")):
        pixels = []
        run(stops, 10, lambda t, images, kept, to=pixels: to.append((images.clone(), kept)))
        frames.append(pixels)
    for (theirs, their_kept), (ours, our_kept) in zip(*frames, strict=True):
        assert torch.equal(their_kept, our_kept)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    assert not torch.equal(frames[0][0][0], frames[0][-1][0])


def test_published_style_loop_spends_gradients_on_the_weights(exact: Workload) -> None:
    published_loop(exact)(NO_STOPS, 1, lambda *_: None)
    assert all(parameter.grad is not None for parameter in exact.vit.parameters())


def test_the_yardstick_imports_nothing_from_smi_fast() -> None:
    code = "import sys, benchmarks.baselines.published_loop; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not [name for name in done.stdout.split() if name.startswith("smi_fast")]


def test_no_benchmark_shadows_the_standard_library() -> None:
    names = {path.stem for path in Path(figures.__file__).parent.rglob("*.py")}
    assert {"figures", "step_profile"} <= names
    assert not (names - {"__init__", "__main__"}) & sys.stdlib_module_names


def test_the_readme_has_every_command_and_every_result() -> None:
    text = Path(figures.__file__).with_name("README.md").read_text()
    results = {path.name for path in environment.RESULTS.iterdir() if "-quick" not in path.name}
    assert [name for name in (*MEASUREMENTS, *results) if f"`{name}`" not in text] == []


def test_a_quick_run_leaves_recorded_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "RESULTS", tmp_path)
    environment.record("made_up", {"seconds": 1.0})
    environment.record("made_up", {"seconds": 2.0}, quick=True)
    found = {path.name: json.loads(path.read_text())["seconds"] for path in tmp_path.iterdir()}
    assert found == {"made_up.json": 1.0, "made_up-quick.json": 2.0}


def test_a_picture_without_results_says_which_command_records_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="run python -m benchmarks end-to-end --quick first"):
        figures.main(quick=True)


def test_dense_images_that_differ_are_no_agreement() -> None:
    images = torch.rand(2, 3, 32, 48)
    assert end_to_end.agreement(images, images) == 1
    with pytest.raises(AssertionError, match="expected the same images from the two dense loops"):
        end_to_end.agreement(images, images.flip(3))


def hungry_peak() -> int:
    """What :func:`end_to_end.peak_memory` finds of a loop of three tensors, one after the other."""

    def hungry(_: Workload) -> Loop:
        def run(*_: object) -> None:
            for _ in range(3):
                torch.ones(2**24).sum()

        return run

    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    end_to_end.deit = lambda *_: Workload(vit, torch.tensor([0]), torch.randn(1, 3, 32, 32))
    VARIANTS["hungry"] = Variant(hungry, sparse=False)
    return end_to_end.peak_memory("deit_tiny", 1, "hungry")


@pytest.mark.skipif(
    not memory.CLEAR_REFS.exists(), reason="the kernel can't set the peak of a process back"
)
def test_peak_memory_is_what_a_loop_takes_at_most() -> None:
    # Each of the three tensors has 67 MB and is freed before the next one. A new process has no
    # freed memory that they could reuse, and what is replaced there stays there.
    assert memory.in_new_process(hungry_peak) == pytest.approx(2**26, rel=0.25)


@pytest.mark.parametrize(
    ("name", "batch", "gflop"),
    [("deit_tiny", 8, 8.0), ("deit_small", 8, 30.8), ("deit_base", 4, 60.5)],
)
def test_needed_work_at_46_patches(name: str, batch: int, gflop: float) -> None:
    with torch.device("meta"):
        vit = timm.create_model(f"{name}_patch16_224")
    assert needed_flops(vit, batch, 46) / 1e9 == pytest.approx(gflop, abs=0.1)


@pytest.mark.parametrize("kept", [6, 24])
def test_needed_work_is_what_pytorch_counts(workload: Workload, kept: int) -> None:
    images, patches = workload.init.clone().requires_grad_(), torch.arange(kept).expand(2, -1)
    sparse = SparseViT(workload.vit, backend="reference")
    with FlopCounterMode(display=False) as counter:
        logits = sparse(images, patches).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    linear, attention = forward_flops(workload.vit, kept)
    assert forward == 2 * (linear + attention)
    # The backward pass of attention has twice its GEMMs, and two blocks compute the scores again.
    again = 2 * 2 * (kept + 1) ** 2 * 32
    assert counter.get_total_flops() == 2 * (2 * linear + 3 * attention + again)
    assert needed_flops(workload.vit, 2, kept) == 2 * (2 * linear + 2 * attention)


def test_each_phase_has_early_and_typical_iterations(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [9.0, 1.0, 1.0, 8.0, 2.0, 2.0, 7.0, 3.0, 4.0, 50.0]
    clock = iter([0.0] + [edge for s in seconds for edge in (s, 0.0)])
    monkeypatch.setattr("benchmarks.speed.loops.time.perf_counter", lambda: next(clock))

    def run(stops: StopSchedule, iterations: int, callback: Callback) -> None:
        for t, kept in enumerate([24] * 3 + [12] * 3 + [6] * 4):
            callback(t, workload.init, torch.zeros(2, kept))

    assert time_phases(run, STOPS, 10, early=3)[12] == PhaseSeconds((8.0, 2.0, 2.0), 2.0)
    clock = iter([0.0] + [edge for s in seconds for edge in (s, 0.0)])
    expected = {
        24: PhaseSeconds((9.0,), 1.0),
        12: PhaseSeconds((8.0,), 2.0),
        6: PhaseSeconds((7.0,), 4.0),
    }
    assert time_phases(run, STOPS, 10) == expected
    phases = end_to_end.schedule_phases(STOPS, 10, 24)
    assert phases == [(24, 3), (12, 3), (6, 4)]
    assert end_to_end.whole_seconds(phases, expected) == 9 + 2 * 1 + 8 + 2 * 2 + 7 + 3 * 4


def test_end_to_end_is_measured_and_drawn(workload: Workload) -> None:
    measured = end_to_end.measure(workload, 400, rounds=1)
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
    (axes,) = figures.draw(results).axes
    names = ["published_dense", *(name for name, _, _ in figures.TECHNIQUES)]
    factors = [times["published_dense"] / times[name] for name in names]
    for bar, (start, end) in zip(axes.patches, pairwise(factors), strict=True):
        assert (bar.get_x(), bar.get_width()) == pytest.approx((start, end - start))


def test_profile_shares_are_of_the_whole_step(workload: Workload) -> None:
    measured = step_profile.measure(workload, StopSchedule((1, 2), (0.5, 0.5)), iterations=2)
    shares = measured["shares"]
    assert measured["patches"] == 6
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert min(shares[name] for name in ("gemm", "attention", "norm_and_gelu", "pixels")) > 0


def test_cost_of_a_parametrization_is_beside_pixels(workload: Workload) -> None:
    measured = parametrizations.measure(workload, iterations=3, rounds=1)
    assert set(measured["cost"]) == set(measured["seconds"]) - {"pixels"}
    pixels, pyramid = (measured["seconds"][name]["median"] for name in ("pixels", "pyramid"))
    assert measured["cost"]["pyramid"]["median"] == pytest.approx(pyramid / pixels - 1, abs=2e-3)


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
    assert step_profile.kind(name, shapes, [2, 3, 32, 48]) == kind


def test_a_wrong_op_is_not_timed() -> None:
    right, wrong = torch.ones(3), torch.ones(3) + 1e-4
    ops.check({"reference": lambda: (right,), "cpp": lambda: (right + 1e-6,)})
    with pytest.raises(AssertionError, match="cpp is 1"):
        ops.check({"reference": lambda: (right,), "cpp": lambda: (wrong,)})


def test_roofline_counts_the_needed_work_and_every_pixel() -> None:
    vit = timm.create_model("deit_small_patch16_224")
    for kept in (196, 46):
        parts = {part.name: part for part in roofline.parts(vit, 4, kept, "bfloat16")}
        # needed_flops counts half of the backward pass of attention.
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
    ours, hooked = objectives.make_layers(2, 64), objectives.make_layers(2, 64)
    assert len(ours) == 49 and ours[0].x.shape == (2, 32, 32, 32)
    theirs = objectives.hooked(hooked)
    for _ in range(2):
        got, expected = objectives.fused(ours), theirs()
        assert len(got) == 50 and max(objectives._errors(got, expected)) < 1e-5


@pytest.mark.parametrize(
    "similarities", [published_losses.cosines_by_broadcast, published_losses.cosines_by_matmul]
)
def test_published_entropy_is_what_ours_is(similarities: Callable) -> None:
    features = [torch.randn(2, 9, 5, dtype=torch.float64) + 0.5 for _ in range(2)]
    plain = partial(published_losses.similarity_entropy, similarities=similarities)
    expected = objectives._with_gradients(plain, features)
    got = objectives._with_gradients(objectives.similarity_entropy, features)
    assert max(objectives._errors(got, expected)) < 1e-9


def test_a_commit_is_dirty_by_files_other_than_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        subprocess.run(command, check=True, capture_output=True)

    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(environment, "RESULTS", results)
    for file in (results / "speed.json", tmp_path / "loop.py"):
        file.write_text("0")
    git("init")
    git("add", "-A")
    git("commit", "-m", "first")
    (results / "speed.json").write_text("1")
    assert len(environment.commit()) >= 7 and not environment.commit().endswith("-dirty")
    (tmp_path / "loop.py").write_text("1")
    assert environment.commit().endswith("-dirty")


def test_scaling_is_measured_with_as_many_threads_as_it_says(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, used = torch.get_num_threads(), []

    def measure(*_: object) -> dict[str, object]:
        threads = torch.get_num_threads()
        used.append(threads)
        return {"seconds_per_step": 4 / threads, "shares": {"gemm": 0.75, "pixels": 0.25}}

    monkeypatch.setattr(scaling, "measure", measure)
    found = scaling.scaling(workload, (1, 2), 5, rounds=2, precision="float32")
    assert sorted(used) == [1, 1, 2, 2] and torch.get_num_threads() == before
    assert found["seconds"] == {"1": 4.0, "2": 2.0}
    assert found["speedup"]["2"]["gemm"]["median"] == 2.0
    assert found["on_paper"] == {"4": 4.0, "8": 8.0, "16": 16.0}


def test_on_paper_a_part_that_does_not_scale_stays() -> None:
    one = {"whole": 4.0, "gemm": 3.0, "python_and_rest": 1.0}
    two = {"whole": 2.5, "gemm": 1.5, "python_and_rest": 1.0}
    assert scaling.on_paper(one, two, 2, 2) == pytest.approx(4 / 2.5)
    assert scaling.on_paper(one, two, 2, 16) == pytest.approx(4 / (3 / 16 + 1))
