"""A loop that costs what the published one does (arXiv 2510.27186): the yardstick of all speed.

Written from its description, with what it spends: gradients of the weights that nobody reads, the
attention maps of all blocks at every step, the embedding of all patches before some are taken, and
jitter, total variation, Adam and clamp on whole images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from smi_fast.ops.grid import nearest_cells
from smi_fast.schedules import Schedule, still_iterations


def invert(
    vit: VisionTransformer,
    targets: Tensor,
    *,
    init: Tensor,
    jitter: tuple[Tensor, Tensor],
    schedule: Schedule,
    iterations: int,
    mean: Sequence[float],
    std: Sequence[float],
    callback: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Inverts one batch; the arguments are those of :class:`smi_fast.SparseInverter`.

    Args:
        vit: a model whose one prefix token is the class token; gradients gather in its weights.
    """
    images = init.clone().requires_grad_()
    adam = torch.optim.Adam([images], lr=0.25, betas=(0.5, 0.99))
    counts = dict(zip(schedule.at, schedule.counts(vit.patch_embed.num_patches), strict=True))
    kept = torch.arange(vit.patch_embed.num_patches).expand(len(targets), -1)
    still, importance, best = still_iterations(schedule), None, float("inf")
    low, high = ([(edge - m) / s for m, s in zip(mean, std, strict=True)] for edge in (0, 1))
    for iteration in range(iterations):
        if iteration in counts:
            assert importance is not None
            kept = schedule.select(kept, importance, counts[iteration])
        shift, flip = (0, 0), False
        if iteration not in still:
            shift, flip = tuple(jitter[0][iteration].tolist()), bool(jitter[1][iteration])
        jittered = images.roll(shift, (2, 3))
        if flip:
            jittered = jittered.flip(3)
        logits, maps = forward(vit, jittered, follow(vit, kept, shift, flip))
        importance = maps[-1].detach()[:, :, 0, 1:].mean(dim=1)
        loss = F.cross_entropy(logits, targets) + 1e-4 * total_variation(images)
        best = min(best, loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for channel, (least, most) in enumerate(zip(low, high, strict=True)):
                images[:, channel].clamp_(least, most)
        callback(iteration, images.detach(), kept)


def forward(vit: VisionTransformer, images: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, classes] of some patches int64 [B, K], and the maps of all blocks [L, B, H, N, N].

    All patches are embedded first, as published, and then the ones to go on with are taken.
    """
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    if patches.shape[1] < vit.patch_embed.num_patches:
        rows = F.pad(patches + 1, (1, 0))
        x = x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))
    maps = []
    for block in vit.blocks:
        x, probabilities = _block(block, x)
        maps.append(probabilities)
    return vit.forward_head(vit.norm(x)), torch.stack(maps)


def _block(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    attention = block.attn
    qkv = attention.qkv(block.norm1(x)).unflatten(2, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    probabilities = (q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)
    x = x + attention.proj((probabilities @ v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x)), probabilities


def follow(vit: VisionTransformer, kept: Tensor, shift: tuple[int, int], flip: bool) -> Tensor:
    """The cells int64 [B, K] of the jittered grid that kept patches move to."""
    rows, columns = vit.patch_embed.grid_size
    down, right = nearest_cells(torch.tensor(shift), vit.patch_embed.patch_size[0]).tolist()
    row, column = (kept // columns + down) % rows, (kept % columns + right) % columns
    return row * columns + (columns - 1 - column if flip else column)


def total_variation(images: Tensor) -> Tensor:
    """Sum of the norms of the four differences of neighbours, over the whole batch."""
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    return torch.stack([torch.linalg.vector_norm(d) for d in differences]).sum()
