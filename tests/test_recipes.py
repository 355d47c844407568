"""Recipes print what was published, and every one of them inverts, sparsely."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import smi_fast
from smi_fast import Cosine, Dense, cli, recipes
from smi_fast.objectives import Objective
from smi_fast.pool import Pool
from smi_fast.zoo import load_cnn

PUBLISHED = {
    "smi": ({"cross_entropy": 1.0, "total_variation": 1e-4}, (4000, 0.25, (0.5, 0.99), "adam")),
    "deepinversion": (
        {"cross_entropy": 1.0, "total_variation": 1e-4, "l2_norm": 1e-5, "batch_norm": 0.05},
        (2000, Cosine(0.2, warm_up=0.05), (0.5, 0.9), "adam"),
    ),
    "psaq_vit": (
        {"patch_similarity": 1.0, "cross_entropy": 1.0, "variation_target": 0.05},
        (1000, Cosine(0.2, warm_up=0.2, restarts=1), (0.5, 0.9), "adam"),
    ),
    "gradvit": (
        {
            "cross_entropy": 1.0,
            "batch_norm": 0.05,
            "total_variation": 1e-4,
            "l2_norm": 1e-5,
            "patch_seams": 1e-4,
        },
        (2000, Cosine(0.2, warm_up=0.05), (0.5, 0.9), "adam"),
    ),
    "sardfq": (
        {"attention_prior": 1.0, "cross_entropy": 1.0, "total_variation": 0.05},
        (1000, Cosine(0.2, warm_up=0.2, restarts=1), (0.5, 0.9), "adam"),
    ),
    "mimiq": (
        {"head_similarity": 1.0, "cross_entropy": 1.0, "total_variation": 2.5e-5},
        (2000, Cosine(0.1, final=0.001), (0.9, 0.999), "adamw"),
    ),
}


# Largest shifts in pixels of 224, before and after half of the iterations.
SHIFTS = {
    "smi": (28, 28),
    "clear": (28, 28),
    "deepinversion": (30, 30),
    "psaq_vit": (15, 30),
    "gradvit": (30, 30),
    "sardfq": (15, 30),
    "mimiq": (8, 16),
}


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts(name: str) -> None:
    jitter = recipes.by_name(name, cnn_for(name)).options()["jitter"]
    for stops in ((), (3, 6)):
        shift, flip = jitter.draw(6000, (224, 224), stops=stops)
        halves = shift.abs().unflatten(0, (2, 3000)).flatten(1).amax(1)
        assert tuple(halves.tolist()) == SHIFTS[name] and flip.any()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variation_is_that_of_the_batch(name: str) -> None:
    terms = recipes.by_name(name, cnn_for(name)).objectives
    variations = [term for term in terms if isinstance(term, smi_fast.TotalVariation)]
    assert not any(term.per_image for term in variations)


def cnn_for(name: str) -> torch.nn.Module | None:
    return load_cnn("fashion-canvas") if name in recipes.WITH_CNN else None


@pytest.mark.parametrize("name", PUBLISHED)
def test_terms_and_weights(name: str) -> None:
    recipe = recipes.by_name(name, cnn_for(name))
    terms, settings = PUBLISHED[name]
    assert {term.name: term.weight for term in recipe.objectives} == terms
    assert (recipe.iterations, recipe.lr, recipe.betas, recipe.optimizer) == settings
    text = str(recipe)
    name = {"adam": "Adam", "adamw": "AdamW"}[recipe.optimizer]
    assert f"{name}, lr {recipe.lr}" in text and "arXiv" in text
    assert all(f"{weight}" in text for weight in terms.values())
    assert "object at 0x" not in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_inverts_on_kept_patches(name: str, tmp_path: Path, capsys: object) -> None:
    out = tmp_path / "pool"
    command = ["invert", "--out", str(out), "--recipe", name, "--iterations", "8"]
    command += ["--schedule", "smi-scaled", "--classes", "3,5", "--per-class", "1"]
    command += ["--cnn", "fashion-canvas"] if name in recipes.WITH_CNN else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_schedule", lambda *_: smi_fast.StopSchedule((3, 5), (0.5, 0.5)))
        patch.setattr(sys, "argv", ["smi-fast", *command])
        with pytest.raises(SystemExit) as done:
            cli.main()
    assert not done.value.code
    printed = capsys.readouterr().out
    assert recipes.by_name(name, cnn_for(name)).source in printed
    records = Pool(out).records
    assert [record["label"] for record in records] == [3, 5]
    for record in records:
        assert record["recipe"] == name and len(record["kept"]) == 16
        assert Image.open(out / record["file_name"]).size == (64, 64)


def test_student_makes_it_adaptive() -> None:
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
    recipe = recipes.deepinversion(load_cnn("fashion-canvas"), student)
    term = recipe.objectives[-1]
    assert isinstance(term, Objective) and (term.name, term.weight) == ("adversarial", 0.2)


def test_soft_targets_only_where_published() -> None:
    labels = torch.tensor([1, 0])
    assert torch.equal(recipes.smi().targets(labels, 4), labels)
    soft = recipes.sardfq().targets(labels, 4)
    assert soft.argmax(1).tolist() == [1, 0] and 0.9 < soft.max() < 1
    torch.testing.assert_close(soft.sum(1), torch.ones(2))


def test_what_is_no_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe among clear, smi, deepinversion, .* got 'dream'"):
        recipes.by_name("dream")
    with pytest.raises(ValueError, match="gradvit takes a CNN as prior"):
        recipes.by_name("gradvit")
    with pytest.raises(ValueError, match="mimiq takes no CNN as prior"):
        recipes.by_name("mimiq", load_cnn("fashion-canvas"))


def test_options_take_other_values_in_place() -> None:
    recipe = recipes.smi()
    changed = recipe.options(iterations=7, schedule=Dense())
    assert changed["iterations"] == 7 and changed["lr"] == recipe.lr
    assert isinstance(changed["schedule"], Dense) and recipe.options()["iterations"] == 4000


def test_clear_moves_a_fourier_series_and_converges_in_few_iterations() -> None:
    recipe = recipes.clear()
    assert "Fourier(decay=1.5" in str(recipe)
    inverter = smi_fast.SparseInverter(
        smi_fast.load_teacher("fashion-canvas"), **recipe.options(iterations=30)
    )
    generator = torch.Generator().manual_seed(0)
    result = inverter.invert([0, 1, 5, 9], generator=generator, progress=False)
    assert (result.logits.argmax(1) == result.targets).all()
    assert result.kept.shape == (4, 30)


def test_clear_is_what_an_inverter_does_by_default() -> None:
    teacher = smi_fast.load_teacher("fashion-canvas")
    plain = smi_fast.SparseInverter(teacher)
    clear = smi_fast.SparseInverter(teacher, **recipes.clear().options())
    assert plain.schedule == clear.schedule
    for name in ("objectives", "parametrization"):
        assert repr(getattr(plain.settings, name)) == repr(getattr(clear.settings, name))
    for name in ("iterations", "betas", "weight_decay", "jitter"):
        assert getattr(plain.settings, name) == getattr(clear.settings, name)
    assert torch.equal(plain.settings.lr, clear.settings.lr)


def test_other_iterations_move_the_stops_of_a_recipe() -> None:
    assert recipes.clear().options(iterations=400)["schedule"].at == (40,)
    assert recipes.smi().options(iterations=2000)["schedule"].at == (50, 100, 200, 300)
    with pytest.raises(ValueError, match="iterations after the stop at 1, got 1"):
        recipes.clear().options(iterations=1)
