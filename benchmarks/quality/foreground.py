"""Whether the teacher's importance finds the foreground.

The foreground of the test canvases is known. The figure is the mean share of foreground pixels in
the most important patches. Patches chosen at random would have the share of all patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fashion_canvas.data import TEST_SEED, canvases, normalise
from benchmarks.harness.environment import record
from benchmarks.quality.class_accuracy import share_reached
from smi_fast import SparseViT, load_teacher

# The published schedule leaves 46 of 196 patches.
SHARE = 46 / 196
QUICK_IMAGES = 500


@torch.no_grad()
def foreground_share(teacher: nn.Module, images: Tensor, foreground: Tensor) -> tuple[float, float]:
    """Mean share of foreground in the most important 23 % of patches, and in all patches.

    Args:
        teacher: a timm ``VisionTransformer``.
        images: [N, 3, H, W], normalised.
        foreground: bool [N, H, W].
    """
    sparse = SparseViT(teacher)
    in_patch = F.avg_pool2d(foreground[:, None].float(), sparse.patch_size).flatten(1)
    importance = torch.cat([sparse(part, importance=True).importance for part in images.split(500)])
    top = importance.topk(round(SHARE * sparse.num_patches), dim=1).indices
    return in_patch.gather(1, top).mean().item(), in_patch.mean().item()


def main(quick: bool = False) -> None:
    last = QUICK_IMAGES if quick else None
    images, labels, foreground = canvases("t10k", seed=TEST_SEED, last=last)
    images = normalise(images)
    teacher = load_teacher("fashion-canvas")
    important, everywhere = foreground_share(teacher, images, foreground)
    with torch.no_grad():
        logits = torch.cat([teacher(part) for part in images.split(500)])
    record(
        "foreground",
        {
            "images": len(images),
            "test_accuracy": share_reached(logits, labels),
            "foreground_in_important_patches": round(important, 4),
            "foreground_in_all_patches": round(everywhere, 4),
        },
        quick=quick,
    )
