"""Inverted images as the batches that quantisers calibrate a network with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from smi_fast.inversion.inputs import image_space
from smi_fast.inversion.result import InversionResult
from smi_fast.pool.batch import read_pixels
from smi_fast.pool.files import PoolError
from smi_fast.pool.pool import Pool
from smi_fast.teacher import SparseViT
from smi_fast.teacher.space import ImageSpace
from smi_fast.zoo import fingerprint


class _Images(Dataset[Tensor]):
    """Whole images, normalised for the teacher, [C, H, W] each."""

    def __init__(self, read: Callable[[int], Tensor], count: int, space: ImageSpace) -> None:
        self.read, self.count, self.space = read, count, space

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.space.normalize(self.read(index)[None])[0]


def calibration(
    source: str | Path | InversionResult, teacher: nn.Module, batch_size: int = 32
) -> DataLoader[Tensor]:
    """Inverted images as normalised batches, in the order in which they were made.

    Quantisers take it as it is, or batch by batch: torchao's PT2E calls the prepared model with
    each batch, NNCF wraps it in ``nncf.Dataset``, and ONNX Runtime asks a
    ``CalibrationDataReader`` for ``batch.numpy()``.

    >>> result = invert(teacher, [3, 7], iterations=10, progress=False)
    >>> [batch.shape for batch in calibration(result, teacher, batch_size=1)]
    [torch.Size([1, 3, 64, 64]), torch.Size([1, 3, 64, 64])]

    Args:
        source: folder of a pool, or the result of an inversion.
        teacher: that the images were made from. It may be on any device; batches are on the CPU.
        batch_size: images of a batch; the last one may be smaller.

    Returns:
        a loader of whole images float32 [B, C, H, W].

    Raises:
        PoolError: the folder holds no pool, no images, or one that is damaged.
        ValueError: the images were made from another teacher or have another size, or a batch size
            below 1.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size 1 or above, got {batch_size}")
    sparse = SparseViT(teacher)
    if isinstance(source, InversionResult):
        images = source.images.cpu().float()
        if images.shape[1:] != (sparse.channels, *sparse.image_size):
            raise ValueError(
                f"expected images of {[sparse.channels, *sparse.image_size]}, the teacher's, got "
                f"{list(images.shape[1:])}"
            )
        space = _on_cpu(image_space(sparse, None, None))
        return DataLoader(_Images(images.__getitem__, len(images), space), batch_size)
    path, pool = Path(source), Pool(source)
    settings, records = pool.settings, pool.records
    if not records:
        raise PoolError(f"expected a pool of images, got an empty one in {path}")
    if settings["teacher_sha256"] != fingerprint(sparse.vit):
        raise ValueError(f"the pool in {path} was made from another teacher, whose weights differ")
    space = _on_cpu(image_space(sparse, settings["mean"], settings["std"]))
    files = [path / record["file_name"] for record in records]
    read = partial(_read, files, (sparse.channels, *sparse.image_size))
    return DataLoader(_Images(read, len(files), space), batch_size)


def _on_cpu(space: ImageSpace) -> ImageSpace:
    mean, std = (tensor.detach().cpu().float() for tensor in (space.mean, space.std))
    return ImageSpace(space.channels, space.height, space.width, mean, std)


def _read(files: list[Path], shape: tuple[int, ...], index: int) -> Tensor:
    """An image [C, H, W] in [0, 1]."""
    path = files[index]
    pixels = torch.from_numpy(read_pixels(path)).permute(2, 0, 1).float() / 255
    if pixels.shape != shape:
        raise PoolError(f"expected {path} of {list(shape)}, got {list(pixels.shape)}")
    return pixels
