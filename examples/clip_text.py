"""What does CLIP see in a text? Images whose embedding is that of the text.

    python examples/clip_text.py "a red bus" "a black dog" --model ViT-B-32 --pretrained openai

Needs open_clip: pip install 'smi-fast[open-clip]'. Without --pretrained the weights are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

import smi_fast


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("texts", nargs="+", help="a text for each image")
    parser.add_argument("--model", default="ViT-B-32", help="a CLIP of open_clip with a ViT")
    parser.add_argument("--pretrained", help="its weights: a tag such as openai, or a file")
    parser.add_argument("--distance", default="spherical", choices=["cosine", "spherical"])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("clip"))
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    clip = open_clip.create_model(options.model, pretrained=options.pretrained).eval()
    tokens = open_clip.get_tokenizer(options.model)(options.texts)
    with torch.no_grad():
        wanted = clip.encode_text(tokens).to(device)
    teacher = smi_fast.from_open_clip(clip.visual).to(device)

    recipe = smi_fast.recipes.clear().options(
        iterations=options.iterations,
        objectives=[
            smi_fast.EmbeddingTarget(wanted, options.distance),
            smi_fast.TotalVariation(1e-3),
        ],
        schedule=smi_fast.StopSchedule.once(options.iterations, keep=0.7, at=0.25),
        importance="gradient",  # CLIP's class token also attends to empty background
        augment=smi_fast.augmentations.GaussianNoise(),
        copies=2,
    )
    result = smi_fast.SparseInverter(teacher, **recipe).invert(batch=len(wanted))

    options.out.mkdir(parents=True, exist_ok=True)
    # The embedding of the kept patches alone, against every text.
    alike = F.normalize(result.logits, dim=1) @ F.normalize(wanted, dim=1).T
    for index, text in enumerate(options.texts):
        path = options.out / f"text_{index}.png"
        save_image([result.images[index], result.over("mean")[index]], path)
        print(f"{path}, {text!r}: cosine {alike[index, index]:.3f}, nearest text "
              f"{options.texts[int(alike[index].argmax())]!r}")  # fmt: skip


if __name__ == "__main__":
    main()
