"""A loop that costs what the published one does (arXiv 2510.27186): the yardstick of all speed.

It is written from the description of that loop and imports nothing from smi_fast. Like the
published loop it computes:

- gradients of the weights, although no iteration uses them;
- the attention maps of all blocks in every iteration;
- the embedding of all patches, before it drops some of them;
- jitter, total variation, Adam and clamp on whole images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor


def invert(
    vit: VisionTransformer,
    targets: Tensor,
    *,
    init: Tensor,
    jitter: tuple[Tensor, Tensor],
    stops: Sequence[int],
    drop: Sequence[float],
    iterations: int,
    mean: Sequence[float],
    std: Sequence[float],
    callback: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Invert one batch.

    Args:
        vit: a model whose only prefix token is the class token. Its weights receive gradients.
        targets: class indices [B].
        init: first images [B, 3, H, W], normalised.
        jitter: shift int64 [T, 2] in pixels and flip bool [T] of each iteration. The iteration of
            a stop and the one before it are not jittered.
        stops: iterations before which patches are dropped; none for the dense loop.
        drop: share of the kept patches that each stop drops.
        iterations: T.
        mean: of each channel, for normalised space.
        std: likewise.
        callback: called with (iteration, images, kept) after each iteration.
    """
    images = init.clone().requires_grad_()
    adam = torch.optim.Adam([images], lr=0.25, betas=(0.5, 0.99))
    kept = torch.arange(vit.patch_embed.num_patches, device=init.device).expand(len(targets), -1)
    drop_at = dict(zip(stops, drop, strict=True))
    without_jitter = {stop - before for stop in stops for before in (0, 1)}
    importance, best = None, float("inf")
    low, high = ([(edge - m) / s for m, s in zip(mean, std, strict=True)] for edge in (0, 1))
    for iteration in range(iterations):
        if iteration in drop_at:
            assert importance is not None
            kept = most_important(kept, importance, drop_at[iteration])
        shift, flip = (0, 0), False
        if iteration not in without_jitter:
            shift, flip = tuple(jitter[0][iteration].tolist()), bool(jitter[1][iteration])
        jittered = images.roll(shift, (2, 3))
        if flip:
            jittered = jittered.flip(3)
        logits, maps = forward(vit, jittered, jittered_positions(vit, kept, shift, flip))
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


def most_important(kept: Tensor, importance: Tensor, drop: float) -> Tensor:
    """The patches int64 [B, K'] that a stop leaves, ascending."""
    count = int(kept.shape[1] * (1.0 - drop))
    return kept.gather(1, importance.topk(count, dim=1).indices).sort(dim=1).values


def forward(vit: VisionTransformer, images: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Compute logits [B, classes] from patches int64 [B, K], and all maps [L, B, H, N, N].

    All patches are embedded first, and then the tokens of ``patches`` are taken, as published.
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


def jittered_positions(
    vit: VisionTransformer, kept: Tensor, shift: tuple[int, int], flip: bool
) -> Tensor:
    """The patches int64 [B, K] of the jittered image that ``kept`` move to."""
    (rows, columns), side = vit.patch_embed.grid_size, vit.patch_embed.patch_size[0]
    # A shift moves by the nearest number of whole patches, half a patch upwards.
    down, right = ((2 * pixels + side) // (2 * side) for pixels in shift)
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
