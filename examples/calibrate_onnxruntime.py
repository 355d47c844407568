"""Quantise a ViT to 8 bits with ONNX Runtime: images of a pool calibrate it.

pip install 'smi-fast[onnxruntime]', and fill a pool first:
smi-fast invert --teacher fashion-canvas --classes 0-9 --per-class 8 --out pool
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

import smi_fast


class Batches(CalibrationDataReader):
    """Batches as ONNX Runtime asks for them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}


def quantised(teacher: nn.Module, batches: Iterable[Tensor], path: Path) -> Path:
    """The ONNX file of the teacher with 8 bits; beside it, that of the teacher as it is."""
    whole = path.with_suffix(".float.onnx")
    count = torch.export.Dim("count")
    example = (next(iter(batches))[:2],)
    torch.onnx.export(
        teacher, example, whole, input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: count},), dynamo=True,
    )  # fmt: skip
    quant_pre_process(whole, whole)
    products = ["Conv", "Gemm", "MatMul"]
    quantize_static(whole, path, Batches(batches), per_channel=True, op_types_to_quantize=products)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", help="made from the same teacher")
    parser.add_argument("--teacher", default="fashion-canvas")
    parser.add_argument("--out", type=Path, default="quantised.onnx")
    options = parser.parse_args(argv)

    teacher = smi_fast.load_teacher(options.teacher)
    batches = smi_fast.calibration(options.pool, teacher, batch_size=8)
    session = onnxruntime.InferenceSession(quantised(teacher, batches, options.out))
    images = torch.cat([*batches])
    with torch.no_grad():
        before = teacher(images)
    after = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    same = (before.argmax(1) == after.argmax(1)).float().mean().item()
    error = ((after - before).norm() / before.norm()).item()
    print(f"the same class as before for {same:.0%} of {len(images)} images")
    print(f"logits differ by {error:.1%}; wrote {options.out}")


if __name__ == "__main__":
    main()
