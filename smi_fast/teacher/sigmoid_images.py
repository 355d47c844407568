"""Images that are computed where they are read, from a field whose sigmoid is their pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smi_fast.ops.grid import spread
from smi_fast.teacher.space import ImageSpace


@dataclass(frozen=True, kw_only=True, eq=False)
class SigmoidImages:
    """Images whose pixels are the sigmoid of a field.

    :class:`smi_fast.SparseViT` takes them in place of images. It reads the kept patches
    out of the field (:func:`smi_fast.ops.gather_sigmoid_patches`), so that the other pixels are
    never computed. :meth:`tensor` makes the images.

    >>> from smi_fast.teacher import SigmoidImages
    >>> from smi_fast.teacher.space import ImageSpace
    >>> space = ImageSpace(3, 64, 64, torch.full((3,), 0.5), torch.full((3,), 0.2))
    >>> images = SigmoidImages(field=torch.randn(2, 3, 64, 64), space=space)
    >>> SparseViT(teacher)(images, torch.tensor([[3, 9], [0, 1]])).logits.shape
    torch.Size([2, 10])

    Attributes:
        field: [B, C, H, W].
        space: normalises the pixels.
        background: images [B, C, H, W] in normalised space that frozen patches show.
        frozen: bool [B, rows, columns], true at frozen patches; None, with ``background``, where
            no patch is frozen.
    """

    field: Tensor
    space: ImageSpace
    background: Tensor | None = None
    frozen: Tensor | None = None

    def __len__(self) -> int:
        return len(self.field)

    def tensor(self) -> Tensor:
        """The images [B, C, H, W] in normalised space; differentiable."""
        images = self.space.normalize(torch.sigmoid(self.field)).to(self.space.mean.dtype)
        if self.frozen is None or self.background is None:
            return images
        patch_size = self.space.height // self.frozen.shape[1]
        return torch.where(spread(self.frozen, patch_size), self.background, images)

    def over(self, background: Tensor, frozen: Tensor) -> SigmoidImages:
        """The images whose frozen patches show a background."""
        return replace(self, background=background, frozen=frozen)

    def part(self, rows: slice, field: Tensor) -> SigmoidImages:
        """Some of the images, with their field [b, C, H, W] in place of this one."""
        background = None if self.background is None else self.background[rows]
        frozen = None if self.frozen is None else self.frozen[rows]
        return replace(self, field=field, background=background, frozen=frozen)
