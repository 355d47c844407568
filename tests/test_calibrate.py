"""Calibration batches are the images that were inverted, normalised as the teacher reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast import StopSchedule, calibration, recipes
from smi_fast.fill import fill
from smi_fast.pool import Pool, PoolError
from smi_fast.provenance import describe
from tests.helpers.inversions import SPACE, make
from tests.helpers.pools import read
from tests.helpers.teachers import tiny_vit

NAMES = ["a", "b", "c", "d", "e"]


@pytest.fixture
def teacher() -> VisionTransformer:
    """A tiny ViT of the test's own, which has a mean and a standard deviation."""
    vit = tiny_vit().double()
    vit.pretrained_cfg = dict(SPACE)
    return vit


@pytest.fixture
def pool(teacher: VisionTransformer, tmp_path: Path) -> Path:
    inverter = make(teacher, iterations=4, schedule=StopSchedule((2,), (0.5,)))
    with Pool.create(tmp_path / "pool", describe(inverter), NAMES) as made:
        fill(made, inverter, [3, 0, 3], recipe=recipes.smi(), batch_size=2, progress=False)
    return tmp_path / "pool"


def test_a_result_comes_as_the_teacher_reads_it(teacher: VisionTransformer) -> None:
    inverter = make(teacher)
    result = inverter.invert([1, 4, 2], progress=False)
    batches = [*calibration(result, teacher, batch_size=2)]
    assert [batch.shape for batch in batches] == [(2, 3, 32, 48), (1, 3, 32, 48)]
    found = torch.cat(batches)
    assert found.dtype == torch.float32
    expected = inverter.settings.space.normalize(result.images)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)


def test_a_pool_comes_in_its_order_with_its_own_mean(
    teacher: VisionTransformer, pool: Path
) -> None:
    teacher.pretrained_cfg = {"mean": (0.1,) * 3, "std": (0.9,) * 3}
    found = torch.cat([*calibration(pool, teacher, batch_size=2)])
    mean, std = (torch.tensor(SPACE[name])[:, None, None] for name in ("mean", "std"))
    for image, record in zip(found, Pool(pool).records, strict=True):
        pixels = torch.from_numpy(read(pool / record["file_name"]).copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(image * std + mean, pixels, rtol=0, atol=1e-6)
    assert not torch.equal(found[0], found[2])


def test_a_loader_of_worker_processes_gives_the_same(
    teacher: VisionTransformer, pool: Path
) -> None:
    loader = calibration(pool, teacher)
    spread = torch.utils.data.DataLoader(loader.dataset, batch_size=3, num_workers=1)
    assert torch.equal(next(iter(spread)), next(iter(loader)))


def test_bad_input(teacher: VisionTransformer, pool: Path, tmp_path: Path) -> None:
    other = tiny_vit().double()
    with pytest.raises(ValueError, match="made from another teacher, whose weights differ"):
        calibration(pool, other)
    result = make(teacher).invert([1], progress=False)
    larger: Any = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    larger.pretrained_cfg = SPACE
    with pytest.raises(
        ValueError, match=r"images of \[3, 16, 16\], the teacher's, got \[3, 32, 48\]"
    ):
        calibration(result, larger)
    with pytest.raises(ValueError, match="batch_size 1 or above, got 0"):
        calibration(result, teacher, batch_size=0)
    with pytest.raises(PoolError, match="expected a pool in"):
        calibration(tmp_path / "nothing", teacher)
    Pool.create(tmp_path / "empty", {"teacher_sha256": ""}, NAMES).close()
    with pytest.raises(PoolError, match="a pool of images, got an empty one"):
        calibration(tmp_path / "empty", teacher)
    picture = pool / Pool(pool).records[1]["file_name"]
    picture.write_bytes(picture.read_bytes()[:40])
    with pytest.raises(PoolError, match=f"reading {picture} failed"):
        [*calibration(pool, teacher)]
