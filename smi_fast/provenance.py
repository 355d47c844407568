"""What images were made with, as JSON values."""

from __future__ import annotations

import hashlib
import re
from dataclasses import fields
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from smi_fast.engine.precision import described
from smi_fast.inversion import SparseInverter
from smi_fast.ops import backends
from smi_fast.zoo import fingerprint

PACKAGES = ("timm", "triton", "numpy")
# They are described in another way, or have no influence on the images.
_LEFT_OUT = ("teacher", "space", "backend", "graph")


def describe(inverter: SparseInverter) -> dict[str, Any]:
    """What decides the images of an inverter, apart from their targets and seeds.

    Every option of the inverter is in it, new ones too.

    >>> described = smi_fast.provenance.describe(SparseInverter(teacher, lr=0.1))
    >>> described["lr"], described["parametrization"]
    (0.1, 'Fourier(decay=1.5, start=0.02, colour=None, flat_below=0.015625)')
    """
    settings, teacher = inverter.settings, inverter.teacher
    names = [field.name for field in fields(settings) if field.name not in _LEFT_OUT]
    chosen = [
        backends.choose(op, teacher.device, teacher.dtype, settings.backend).name
        for op in backends.OPS
    ]
    return {
        "teacher_sha256": fingerprint(teacher.vit),
        "schedule": repr(inverter.schedule),
        **{name: _plain(getattr(settings, name)) for name in names},
        "final_mask": inverter.final_mask,
        "mean": settings.space.mean.tolist(),
        "std": settings.space.std.tolist(),
        "backend": ", ".join(dict.fromkeys(chosen)),
        "device": teacher.device.type,
        "precision": described(teacher.precision, teacher.dtype),
    }


def versions() -> dict[str, str]:
    """The versions of the packages that compute."""
    # torch.__version__ also names the build, such as 2.14.1+cu130; the metadata only has 2.14.1.
    found: dict[str, str] = {"torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _plain(value: object) -> Any:
    """A value of JSON that is the same in every process for equal options."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor):
        different = value.unique()
        if len(different) == 1:
            return different.item()
        content = value.detach().cpu().contiguous().numpy().tobytes()
        return f"{value.numel()} numbers, sha256 {hashlib.sha256(content).hexdigest()}"
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))
