"""Whether the teacher's importance finds the foreground: ``python -m benchmarks.foreground``.

On test canvases, whose foreground is known: the mean share of true foreground pixels in the most
important patches, against that of all patches, which is what chance would pick.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.environment import describe
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
    from benchmarks.train_teacher import canvases, normalise

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/foreground.json"))
    options = parser.parse_args()
    images, labels, foreground = canvases("t10k", seed=3)
    images = normalise(images)
    teacher = load_teacher("fashion-canvas")
    attended, chance = foreground_share(teacher, images, foreground)
    with torch.no_grad():
        predictions = torch.cat([teacher(part).argmax(1) for part in images.split(500)])
    result = {
        "images": len(images),
        "test_accuracy": round((predictions == labels).double().mean().item(), 4),
        "foreground_in_important_patches": round(attended, 4),
        "foreground_in_all_patches": round(chance, 4),
        "environment": describe(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
