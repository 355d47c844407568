"""The measurements of pools are of real pools, and the arithmetic of 64 GPUs is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pools import on_paper, processes, records, shards
from smi_fast.pool import METADATA, Pool
from smi_fast.pool.check import find_faults

COSTS = {
    "gpus": 64,
    "batch": 10,
    "writer_ms": 10.0,
    "store_ms": 0.0,
    "store_batches_a_second": 1e9,
    "gather_ms": 0.0,
}


def test_records_are_those_of_a_pool(tmp_path: Path) -> None:
    found = records.many_images(tmp_path, 60, [10, 20])
    assert list(found["uses"]["batches of 10"]) == ["open", "resume", "report"]
    assert list(found["uses"]["batches of 20"]) == ["resume"]
    assert all(use["seconds"] > 0 for use in found["uses"]["batches of 10"].values())
    assert len(Pool(tmp_path / "many").records) == 60
    assert {record["batch_size"] for record in Pool(tmp_path / "many").records} == {20}
    made, real = (Pool(tmp_path / name).records[0] for name in ("many", "model"))
    assert made.keys() == real.keys()


def test_batches_are_added_as_they_come(tmp_path: Path) -> None:
    found = records.added_batches(tmp_path, [1, 3], 10)
    assert found["3 batches"]["seconds"] > 0
    assert (tmp_path / "3" / METADATA).read_bytes().count(b"\n") == 30


def test_shards_and_pngs_have_the_same_patches(tmp_path: Path) -> None:
    found = shards.reading(tmp_path, images=3, iterations=10, rounds=1)
    assert list(find_faults(tmp_path / "pool")) == []
    size = found["bytes_of_an_image"]
    assert found["kept"] * 192 < size["shard"] < 64 * 192
    assert size["whole PNG"] < size["kept patches of PNGs"]


def test_the_store_gives_each_turn_once_and_the_writer_writes(tmp_path: Path) -> None:
    found = processes.store([1, 2], calls=5)
    assert list(found["clients"]) == ["1", "2"]
    assert all(each["batches_a_second"] > 0 for each in found["clients"].values())
    assert processes.writer(tmp_path / "pool", 2, 32, 8)["encode_ms_of_an_image"] > 0
    assert list(find_faults(tmp_path / "pool")) == []


@pytest.mark.parametrize(
    ("speed", "changed", "an_hour"),
    [
        (20.0, {}, 64 * 20 * 3600),
        (500.0, {}, 64 * 100 * 3600),  # the writer gives 100 images a second
        (20.0, {"store_ms": 500.0}, 64 * 10 * 3600),  # a batch takes 0.5 s, and as long to get
        (20.0, {"store_batches_a_second": 64.0}, 640 * 3600),
        (20.0, {"gather_ms": 1000 / 1280}, 640 * 3600),
    ],
)
def test_what_many_gpus_make(speed: float, changed: dict[str, float], an_hour: float) -> None:
    found = on_paper.together(speed, **{**COSTS, **changed})
    assert found["images_an_hour"] == pytest.approx(an_hour, rel=1e-3)
    share = an_hour / 3600 / (64 * speed)
    assert found["share_of_gpus_alone"] == pytest.approx(share, rel=5e-3)


def test_a_prediction_says_that_it_is_one() -> None:
    measured = {
        "writer": {"encode_ms_of_an_image": 6.0, "write_ms_of_an_image": 4.0},
        "store": {"clients": {str(n): {"ms_of_a_batch": n, "batches_a_second": n} for n in (1, 8)}},
        "many_images": {"images": 10, "uses": {"a": {"resume": {"seconds": 2.0}}}},
    }
    found = on_paper.predict(measured, gpus=64, batch=32)
    assert found["what"].startswith("prediction from ")
    for run, iterations in on_paper.RUNS.items():
        assert sum(iterations.values()) == int(run.split()[0])
        assert found[run]["images_an_hour"] < 3600 * 8 * 32  # the store serves 8 batches a second
