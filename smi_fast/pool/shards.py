"""Shards: files of sparse images, which hold kept patches only.

A shard is a safetensors file. N is the sum of the lengths of its S images::

    patches  uint8 [N, P, P, 3]
    kept     int32 [N]              place of each patch in the grid
    lengths  int32 [S]              number of patches of each image
    labels   int64 [S]
    logits   float16 [S, classes]   of the kept patches, where a teacher was given

Its header says which shard of how many it is, and the size of the grid.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import Dataset

from smi_fast.background import Background, check_background, over
from smi_fast.inversion.inputs import image_space
from smi_fast.pool.batch import read_pixels
from smi_fast.pool.export import empty_folder
from smi_fast.pool.files import PoolError, explained, write_content
from smi_fast.pool.metadata import Record
from smi_fast.pool.pool import Pool
from smi_fast.teacher import SparseViT
from smi_fast.teacher.space import ImageSpace

FORMAT = "smi_fast shard 1"
MOST_BYTES = 256 * 2**20
_FORMATS = FORMAT.removesuffix("1")
_BATCH = 64
_FILES = ("file_name", "mask_file_name")


def write_shards(
    pool: str | Path,
    out: str | Path,
    teacher: nn.Module | None = None,
    *,
    most_bytes: int = MOST_BYTES,
) -> int:
    """Write the kept patches of a pool into shards ``out/00000.safetensors`` and so on.

    Args:
        pool: folder of the pool.
        out: a missing or empty folder.
        teacher: gives the logits of the kept patches; None to store none.
        most_bytes: of a shard, in which one image at least has to fit.

    Returns:
        the number of shards.

    Raises:
        PoolError: the pool has no images or one that is damaged, an image doesn't fit into a shard,
            or the folder isn't empty or can't be written.
        ValueError: the teacher takes images of another size.
    """
    path, records = Path(pool), Pool(pool).records
    if not records:
        raise PoolError(f"expected a pool of images, got an empty one in {path}")
    folder = empty_folder(out)
    image, mask = (read_pixels(path / records[0][key]) for key in _FILES)
    size = image.shape[0] // mask.shape[0]
    sparse = None if teacher is None else SparseViT(teacher)
    if sparse is not None and (sparse.grid, sparse.patch_size) != (mask.shape, size):
        raise ValueError(
            f"expected a teacher of {list(mask.shape)} patches of {size} pixels, got one of "
            f"{list(sparse.grid)} of {sparse.patch_size}"
        )
    classes = 0 if sparse is None else sparse.output_width
    groups = _groups(records, 3 * size * size + 4, 12 + 2 * classes, most_bytes)
    for number, group in enumerate(groups):
        tensors = _tensors(path, group)
        if sparse is not None:
            tensors["logits"] = _logits(sparse, image_space(sparse, None, None), tensors)
        header = {"format": FORMAT, "shard": str(number), "shards": str(len(groups))}
        header |= {"rows": str(mask.shape[0]), "columns": str(mask.shape[1])}
        content = save(tensors, header)
        name = folder / f"{number:05}.safetensors"
        write_content(name, content)
    return len(groups)


def _groups(records: Sequence[Record], patch: int, image: int, most: int) -> list[list[Record]]:
    """The records of each shard, where a patch and an image take these numbers of bytes."""
    most -= 1024  # for the header
    groups: list[list[Record]] = []
    room = 0
    for record in records:
        needed = patch * len(record["kept"]) + image
        if needed > most:
            raise PoolError(
                f"expected shards of {needed + 1024} bytes or more for image {record['index']}, "
                f"got {most + 1024}"
            )
        if needed > room:
            groups.append([])
            room = most
        groups[-1].append(record)
        room -= needed
    return groups


def _tensors(path: Path, records: Sequence[Record]) -> dict[str, Tensor]:
    patches = []
    for record in records:
        image, mask = (read_pixels(path / record[key]) for key in _FILES)
        rows, columns = mask.shape
        grid = image.reshape(rows, image.shape[0] // rows, columns, image.shape[1] // columns, 3)
        patches.append(grid.swapaxes(1, 2)[mask > 0])
    kept = [index for record in records for index in record["kept"]]
    return {
        "patches": torch.from_numpy(np.concatenate(patches)),
        "kept": torch.tensor(kept, dtype=torch.int32),
        "lengths": torch.tensor([len(each) for each in patches], dtype=torch.int32),
        "labels": torch.tensor([record["label"] for record in records]),
    }


@torch.no_grad()
def _logits(teacher: SparseViT, space: ImageSpace, tensors: dict[str, Tensor]) -> Tensor:
    lengths = tensors["lengths"].tolist()
    ends = np.cumsum(lengths).tolist()
    found = []
    for length, group in groupby(range(len(lengths)), key=lengths.__getitem__):
        images = list(group)
        for first in range(0, len(images), _BATCH):
            chosen = images[first : first + _BATCH]
            rows = slice(ends[chosen[0]] - length, ends[chosen[-1]])
            kept = tensors["kept"][rows].long().view(len(chosen), length)
            patches = tensors["patches"][rows].unflatten(0, (len(chosen), length))
            given = normalized(patches.to(teacher.device), space).to(teacher.dtype)
            found.append(teacher.forward_patches(given, kept.to(teacher.device)).logits)
    return torch.cat([logits for logits in found if logits is not None]).half().cpu()


def normalized(patches: Tensor, space: ImageSpace) -> Tensor:
    """Patches uint8 [..., K, P, P, 3] as :meth:`SparseViT.forward_patches` takes them.

    Returns:
        [..., K, 3·P·P] in the data type of the space.
    """
    pixels = patches.movedim(-1, -3).to(space.mean.dtype) / 255
    return space.normalize(pixels).flatten(-3)


class SparseImageDataset(Dataset[Any]):
    """The images of a folder of shards, as kept patches or whole.

    >>> result = invert(teacher, [1], iterations=3, schedule=Dense(), progress=False)
    >>> pool = Pool.create(folder / "pool", {"seed": 0}, ["cat", "dog"])
    >>> pool.add(result.images, result.masks, [{"label": 1}])
    >>> smi_fast.pool.shards.write_shards(folder / "pool", folder / "shards")
    1
    >>> dataset = smi_fast.pool.shards.SparseImageDataset(folder / "shards")
    >>> patches, kept, label = dataset[0]
    >>> patches.shape, kept.shape, label
    (torch.Size([64, 8, 8, 3]), torch.Size([64]), 1)

    Args:
        folder: of the shards.
        background: None for ``(patches, kept, label)``: uint8 [K, P, P, 3], int64 [K], and a whole
            number. Otherwise ``(image, label)``: float32 [3, H, W] in [0, 1], whose other patches
            are "mean", "blurred", "black" or a colour, see :func:`smi_fast.background.over`.

    Raises:
        ValueError: no background.
        PoolError: the folder has no shards, one is missing or damaged, or of a newer version.
    """

    def __init__(self, folder: str | Path, background: Background | None = None) -> None:
        if background is not None:
            check_background(background)
        self.folder, self.background = Path(folder), background
        self._paths = sorted(self.folder.glob("[0-9]*.safetensors"))
        self._open: dict[int, Any] = {}
        self._starts = [0]
        self._ends: list[list[int]] = []
        self.labels: list[int] = []
        for number, path in enumerate(self._paths):
            with _explained(path), safe_open(path, "pt") as file:
                self.grid = _check_header(file.metadata() or {}, number, len(self._paths))
                ends = file.get_tensor("lengths").long().cumsum(0).tolist()
                self.labels += file.get_tensor("labels").tolist()
            self._ends.append(ends)
            self._starts.append(self._starts[-1] + len(ends))
        if not self._paths:
            raise PoolError(f"expected shards in {self.folder}, got none")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        # The workers of a DataLoader open the files themselves.
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        file, _, rows = self._place(index)
        patches = file.get_slice("patches")[rows]
        kept = file.get_slice("kept")[rows].long()
        if self.background is None:
            return patches, kept, self.labels[index]
        return self._whole(patches, kept), self.labels[index]

    def logits(self, index: int) -> Tensor | None:
        """The teacher's logits float16 [classes] of an image; None where the shards have none."""
        file, place, _ = self._place(index)
        return file.get_slice("logits")[place] if "logits" in file.keys() else None  # noqa: SIM118

    def _place(self, index: int) -> tuple[Any, int, slice]:
        """The file of an image, its number there, and the rows of its patches."""
        if not 0 <= index < len(self):
            raise IndexError(f"expected an image in 0..{len(self) - 1}, got {index}")
        number = bisect_right(self._starts, index) - 1
        if number not in self._open:
            with _explained(self._paths[number]):
                self._open[number] = safe_open(self._paths[number], "pt")
        place, ends = index - self._starts[number], self._ends[number]
        return self._open[number], place, slice(ends[place - 1] if place else 0, ends[place])

    def _whole(self, patches: Tensor, kept: Tensor) -> Tensor:
        rows, columns = self.grid
        side = patches.shape[1]
        cells = patches.new_zeros(rows * columns, side, side, 3)
        cells[kept] = patches
        mask = torch.zeros(rows * columns, dtype=torch.bool)
        mask[kept] = True
        image = cells.view(rows, columns, side, side, 3).permute(4, 0, 2, 1, 3)
        pixels = image.reshape(1, 3, rows * side, columns * side).float() / 255
        background: Background = self.background  # type: ignore[assignment]
        return over(pixels, mask.view(1, rows, columns), background)[0]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    with explained(f"reading {path}"):
        try:
            yield
        except SafetensorError as error:
            raise PoolError(f"reading {path} failed: {error}") from error


def _check_header(header: dict[str, str], number: int, count: int) -> tuple[int, int]:
    """The grid of a shard.

    Raises:
        PoolError: it is no shard, or another one than its name says.
    """
    version = header.get("format", "")
    if version != FORMAT:
        newer = "the newer version " if version.startswith(_FORMATS) else ""
        raise PoolError(f"expected a {FORMAT}, got {newer}{version!r}")
    if (header["shard"], header["shards"]) != (str(number), str(count)):
        raise PoolError(
            f"expected file {number} of {header['shards']}, got {count} files, of which this one "
            f"is number {header['shard']}"
        )
    return int(header["rows"]), int(header["columns"])
