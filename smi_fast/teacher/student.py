"""SparseStudent: a timm Vision Transformer that is trained on kept patches alone."""

from __future__ import annotations

from typing import Any

from timm.layers import PatchDropout
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast.teacher.embedding import check_patches, patch_tokens
from smi_fast.teacher.support import UnsupportedTeacher, check_teacher, is_patched


class SparseStudent(nn.Module):
    """A timm ``VisionTransformer`` that trains on kept patches, and computes nothing for others.

    Where :class:`SparseViT` freezes a copy, this runs the model's own modules: its parameters get
    gradients, and its dropout, stochastic depth and gradient checkpointing are in force in training
    mode. The result is that of the whole image in which no token attends to another patch, and in
    which the head reads no other patch either.

    >>> student = SparseStudent(load_teacher("fashion-canvas"))
    >>> patches, kept = torch.randn(2, 4, 3 * 8 * 8), torch.tensor([[0, 3, 9, 27], [1, 2, 5, 63]])
    >>> student(patches, kept).shape
    torch.Size([2, 10])

    Args:
        model: a timm ``VisionTransformer`` with any prefix tokens and pooling that
            :class:`SparseViT` takes. It is ``student.model``, and can be used on whole images at
            any time.

    Raises:
        UnsupportedTeacher: it can't be computed exactly on kept patches, or drops patches itself.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        if not isinstance(model, VisionTransformer):
            raise UnsupportedTeacher(
                f"expected a timm VisionTransformer to train, got {type(model).__name__}"
            )
        check_teacher(model)
        if is_patched(model):
            raise UnsupportedTeacher("expected timm's own methods, got a model with patched ones")
        if isinstance(model.patch_drop, PatchDropout):
            raise UnsupportedTeacher(
                "expected a model that keeps all patches that it is given, got one with "
                "patch_drop_rate"
            )
        self.model = model

    def forward(self, patches: Tensor, kept: Tensor) -> Any:
        """The output of the model's head: logits [B, classes], unless the model gives others.

        Args:
            patches: [B, K, C·P·P], normalised as the model expects, channel by channel, row by row;
                those of a shard by :func:`smi_fast.pool.shards.normalized`.
            kept: int64 [B, K], the distinct places of the patches in the grid, from 0.

        Raises:
            ValueError: wrong shape, data type or device.
        """
        model = self.model
        rows, columns = model.patch_embed.grid_size
        check_patches(patches, kept, model.patch_embed.proj.weight, rows * columns)
        x = model.norm_pre(model.pos_drop(patch_tokens(model, patches, kept)))
        checkpointed = model.grad_checkpointing and self.training
        x = checkpoint_seq(model.blocks, x) if checkpointed else model.blocks(x)
        return model.forward_head(model.norm(x))
