"""Converters: ViTs of other libraries as timm modules that compute the same."""

from smi_fast.convert.huggingface import from_huggingface
from smi_fast.convert.open_clip import from_open_clip
from smi_fast.convert.torchvision import from_torchvision

__all__ = ["from_huggingface", "from_open_clip", "from_torchvision"]
