"""Teachers by name: the embedded one, or any timm Vision Transformer with weights of its own."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

EMBEDDED = "fashion-canvas"


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
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5]) or "see timm.list_models()"
        raise UnknownTeacher(f"expected {EMBEDDED} or a timm model, got {name!r}; {near}")
    if checkpoint is None:
        return _pretrained(name)
    weights = _read(Path(checkpoint))
    head = weights.get("head.weight")
    options = {} if head is None else {"num_classes": len(head)}
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
