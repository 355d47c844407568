"""What excites the neurons of an encoder without a head, such as DINOv3? One image for each.

    python examples/encoder_neurons.py vit_small_patch16_dinov3.lvd1689m --block 6 --channels 0 1 2

Only the blocks up to this one run. Without a checkpoint timm downloads its pretrained weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.utils import save_image

import smi_fast
from smi_fast.objectives.neuron_target import PLACES


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("teacher", help="a ViT of timm")
    parser.add_argument("--checkpoint", type=Path, help="its weights, .safetensors or .pth")
    parser.add_argument("--block", type=int, default=6)
    parser.add_argument("--channels", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--where", default="mlp_hidden", choices=PLACES)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("neurons.png"))
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = smi_fast.SparseViT(smi_fast.load_teacher(options.teacher, options.checkpoint))
    neurons = smi_fast.NeuronTarget(options.block, options.channels, where=options.where)
    recipe = smi_fast.recipes.clear().options(
        iterations=options.iterations,
        objectives=[neurons, smi_fast.TotalVariation(1e-3)],
    )
    inverter = smi_fast.SparseInverter(teacher.to(device), **recipe)
    result = inverter.invert(
        batch=len(options.channels), generator=torch.Generator().manual_seed(0)
    )

    # The activation of each neuron in each image of kept patches: the diagonal should be highest.
    name = neurons.taps(teacher.depth)
    images = inverter.settings.space.normalize(result.images)
    with torch.no_grad():
        taps = teacher(images, result.kept, taps=name, until=teacher.depth).taps
    for channel in options.channels:
        wanted = torch.full((len(images),), channel, device=images.device)
        row = " ".join(f"{value:7.2f}" for value in neurons.activation(taps, wanted, teacher))
        print(f"channel {channel:5}: {row}")
    save_image([*result.images, *result.over("mean")], options.out, nrow=len(images))
    print(f"whole images, and kept patches below: {options.out}")


if __name__ == "__main__":
    main()
