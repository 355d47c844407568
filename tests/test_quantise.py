"""The quantisers of the benchmark, and what it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast import SparseInverter, load_teacher, recipes
from smi_fast.background import over
from tests.helpers.libraries import library

library("torchao")
library("brevitas")

from torchao.quantization.pt2e.observer import MinMaxObserver  # noqa: E402
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # noqa: E402

from benchmarks import quantise  # noqa: E402
from benchmarks.quantise import study  # noqa: E402
from benchmarks.quantise.gptq import Gptq  # noqa: E402
from benchmarks.quantise.quantiser import (  # noqa: E402
    LeastSquares,
    ProductQuantizer,
    Rounding,
    Simulated,
    Widths,
    exported,
)
from benchmarks.quantise.study import Shown, Study, Trial, trials  # noqa: E402
from benchmarks.transfer.sources import Pictures  # noqa: E402


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(depth=2, **sizes).eval().requires_grad_(False)


def images(count: int, seed: int = 0, side: int = 16) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("widths", [Widths(8, 8), Widths(3, 4), Widths(4, 3, "least squares")])
def test_what_is_simulated_is_what_torchao_converts(vit: VisionTransformer, widths: Widths) -> None:
    simulated = Simulated(vit, widths).calibrate(images(8))
    prepared = prepare_pt2e(exported(vit), ProductQuantizer(widths))
    for module in prepared.modules():
        if isinstance(module, Rounding):
            module.disable_fake_quant()
    prepared(images(8))
    other = images(6, seed=1)
    found, expected = simulated(other), convert_pt2e(prepared)(other)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - vit(other)).abs().max() > 1e-3


def test_every_factor_of_every_product_is_rounded(vit: VisionTransformer) -> None:
    """Two factors for each of six products of a block, the patches' and the head's."""
    simulated = Simulated(vit, Widths(3, 2)).calibrate(images(8))
    numbers = []
    for module in simulated.modules():
        if isinstance(module, Rounding):
            module.register_forward_hook(lambda m, _, out: numbers.append((m, out)))
    simulated(images(8))
    assert len(numbers) == 2 * (2 * 6 + 2)
    for module, out in numbers:
        if module.is_per_channel:
            assert max(len(row.unique()) for row in out) <= 2**3
        else:
            assert len(out.unique()) <= 2**2


def test_a_new_calibration_forgets_the_last_one(vit: VisionTransformer) -> None:
    simulated = Simulated(vit, Widths(4, 4))
    simulated.calibrate(100 * images(8))
    again = simulated.calibrate(images(8))(images(4, seed=1))
    fresh = Simulated(vit, Widths(4, 4)).calibrate(images(8))(images(4, seed=1))
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("bits", [3, 4])
def test_least_squares_cuts_off_what_is_far_out(bits: int) -> None:
    values = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    values[0] = 20.0
    options = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 2**bits - 1}
    errors = []
    for observer in (LeastSquares, MinMaxObserver):
        rounding = Rounding(observer=observer, **options)
        rounding.disable_fake_quant()
        rounding(values)
        rounding.disable_observer()
        errors.append((rounding(values) - values).square().mean().item())
    assert errors[0] < 0.3 * errors[1]


def test_gptq_keeps_the_output_on_its_images(vit: VisionTransformer) -> None:
    """Nearest weights, and those of other images, change the output on these images more."""
    given = images(64)
    given[:, :, :, 4:] = given[:, :, :, :1]  # channels that vary together leave it a choice
    found = Gptq(2).rounded(vit, given)
    for name, layer in found.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            before, after = vit.get_submodule(name).weight, layer.weight
            assert max(len(row.unique()) for row in after) <= 4, name
            assert not torch.equal(before, after)
    error = distance(found, vit, given)
    assert error < 0.8 * distance(Gptq(2).rounded(vit, images(64, seed=1)), vit, given)
    torch.testing.assert_close(Gptq(2).network(vit, given)(given), found(given))


def distance(found: nn.Module, vit: nn.Module, given: Tensor) -> float:
    return (found(given) - vit(given)).square().mean().item()


def test_trials_differ_and_are_not_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUALITY_IMAGES", str(tmp_path))
    for quick in (False, True):
        every = [*trials(quick)]
        assert len({trial.path for trial in every}) == len(every)
    runs: list[Trial] = []

    def run(self: object, trial: Trial) -> dict[str, Any]:
        runs.append(trial)
        return {"accuracy": 0.5, "commit": ""}

    monkeypatch.setattr(Study, "_run", run)
    monkeypatch.setattr(Study, "__init__", lambda self: None)
    trial, made = next(trials()), Study()
    assert made.found(trial) == made.found(trial) and runs == [trial]
    assert json.loads(trial.path.read_text())["accuracy"] == 0.5


@pytest.fixture
def without_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real images are inverted ones, whose labels are what the teacher says."""
    teacher = load_teacher("fashion-canvas")
    inverter = SparseInverter(teacher, **recipes.clear().options(iterations=12))
    result = inverter.invert([i % 10 for i in range(40)], progress=False)
    with torch.no_grad():
        labels = teacher(study.normalise(result.images)).argmax(1)
    assert len(labels.unique()) > 5
    pictures = Pictures(result.images, result.masks)
    monkeypatch.setitem(study.SOURCES, "real", lambda vit, count, seed: pictures.first(count))
    monkeypatch.setattr(study, "canvases", lambda *_, **__: (result.images, labels, None))


@pytest.mark.usefixtures("without_a_data_set")
def test_a_quantiser_sees_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.rand(4, 3, 64, 64)
    made = Pictures(pixels, torch.rand(4, 8, 8) < 0.5)
    monkeypatch.setitem(study.SOURCES, "default", lambda vit, count, seed: made)
    found = Study()
    for background in (None, "mean", "black"):
        shown = found.calibration(Trial(Widths(8, 8), Shown("default", background), 4, 0))
        expected = over(pixels, made.masks, background) if background else pixels
        torch.testing.assert_close(shown, study.normalise(expected))


@pytest.mark.usefixtures("without_a_data_set")
def test_a_quick_run_tests_every_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At 8 bits the teacher says what it said before, at fewer bits less often so."""
    monkeypatch.setenv("QUALITY_IMAGES", str(tmp_path))
    monkeypatch.setattr(study, "QUICK_SOURCES", ("real",))
    measured = study.measure(quick=True)
    assert [*measured["quantised"]] == ["W8A8, min-max", "W3A3, least squares", "W2, GPTQ"]
    eight, *fewer = (found["real"]["mean"] for found in measured["quantised"].values())
    assert measured["teacher"] == 1 and eight >= 0.95
    assert min(fewer) > 0.2 and max(fewer) < eight, fewer


def test_without_its_libraries_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "find_spec", lambda name: None if name == "brevitas" else 1)
    with pytest.raises(SystemExit, match=r"pip install 'smi-fast\[quantise,brevitas\]'"):
        quantise.main(quick=True)


def test_the_teacher_stays_as_it_is() -> None:
    teacher = load_teacher("fashion-canvas")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    Gptq(2).rounded(teacher, images(2, side=64))
    Simulated(teacher, Widths(2, 2))
    assert all(torch.equal(before[name], now) for name, now in teacher.state_dict().items())
    assert teacher.blocks[0].attn.fused_attn
