"""Whether the teacher's importance finds the foreground.

On test canvases, whose foreground is known: the mean share of true foreground pixels in the most
important patches, against that of all patches, which is what chance would pick.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fashion_canvas.data import TEST_SEED, canvases, normalise
from benchmarks.harness.environment import record
from smi_fast import SparseViT, load_teacher

# What the published schedule leaves of 196 patches: 46.
SHARE = 46 / 196


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


def main() -> None:
    images, labels, foreground = canvases("t10k", seed=TEST_SEED)
    images = normalise(images)
    teacher = load_teacher("fashion-canvas")
    attended, chance = foreground_share(teacher, images, foreground)
    with torch.no_grad():
        predictions = torch.cat([teacher(part).argmax(1) for part in images.split(500)])
    record(
        "foreground",
        {
            "images": len(images),
            "test_accuracy": round((predictions == labels).double().mean().item(), 4),
            "foreground_in_important_patches": round(attended, 4),
            "foreground_in_all_patches": round(chance, 4),
        },
    )
