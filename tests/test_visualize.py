"""``smi-fast visualize``: a pool of neurons, whole and sparse, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smi_fast import SparseViT, load_teacher
from smi_fast.importance import Attention, Gradient
from smi_fast.inversion.loop import Loop
from smi_fast.pool import CONTACT_SHEET, Pool
from smi_fast.visualize import inverters
from tests.helpers.pools import files, read
from tests.helpers.smi import Smi

QUICK = ("--block", 2, "--iterations", 20)


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Smi:
    return Smi(monkeypatch, capsys)


def activations(pool: Path, where: str) -> torch.Tensor:
    """[images, neurons] of the pool's kept patches, from its files and the taps of the teacher."""
    teacher, found = SparseViT(load_teacher("fashion-canvas")), []
    mean, std = (
        torch.tensor(teacher.vit.pretrained_cfg[key])[:, None, None] for key in ("mean", "std")
    )
    tap = {"mlp_hidden": "mlp.2.hidden"}.get(where, "block.2.tokens")
    for record in Pool(pool).records:
        pixels = torch.from_numpy(read(pool / record["file_name"]).copy()).permute(2, 0, 1) / 255
        image, kept = ((pixels - mean) / std)[None], torch.tensor([record["kept"]])
        tokens = teacher(image, kept, taps=[tap], until=3).taps[tap][0]
        found.append(tokens[0] if where == "class_token" else tokens[1:].mean(0))
    return torch.stack(found)


@pytest.mark.parametrize("where", ["mlp_hidden", "tokens", "class_token"])
def test_a_pool_has_a_whole_and_a_sparse_image_of_each_neuron(
    smi: Smi, tmp_path: Path, where: str
) -> None:
    pool, channels = tmp_path / "pool", [1, 3, 4]
    given = ("--channels", "1,3-4", "--where", where, "--out", pool)
    code, out, _ = smi("visualize", *QUICK, *given)
    assert code == 0 and out.splitlines()[-1] == f"look at {pool / CONTACT_SHEET}"
    records = Pool(pool).records
    names = [f"block 2 {where} channel {channel}" for channel in channels]
    assert [record["class_name"] for record in records] == 2 * names
    assert [(record["kind"], len(record["kept"])) for record in records] == [
        *3 * [("dense", 64)],
        *3 * [("sparse", 30)],
    ]
    found = activations(pool, where)[:, channels]
    recorded = torch.tensor([record["activation"] for record in records])
    own = found[range(6), 2 * [0, 1, 2]]
    torch.testing.assert_close(recorded, own, rtol=0.05, atol=0.02)  # files have 8 bits
    # Among the images of one kind, its own one excites a neuron most.
    for rows in (found[:3], found[3:]):
        assert rows.argmax(0).tolist() == [0, 1, 2]


def test_patches_stay_on_which_the_neuron_depends() -> None:
    """Their tokens are those in front of the block; in front of the first block there are none."""
    teacher = SparseViT(load_teacher("fashion-canvas"))
    for block, before in ((2, 1), (-1, 4)):
        inverter = inverters(teacher, block, kinds=["sparse"], iterations=20)["sparse"]
        assert inverter.settings.importance == Gradient(before)
        result = inverter.invert([3], progress=False, generator=torch.Generator().manual_seed(0))
        assert result.kept.shape == (1, 30)
    first = inverters(teacher, 0, iterations=20)["sparse"]
    assert first.settings.importance == Attention()


def test_directions_are_read_from_a_file(smi: Smi, tmp_path: Path) -> None:
    """A direction of one channel is that channel."""
    file, given = tmp_path / "two.npy", ("--where", "tokens", "--kind", "dense", "--quiet")
    np.save(file, 3 * np.eye(128)[[5, 9]])
    assert smi("visualize", *QUICK, *given, "--directions", file, "--out", tmp_path / "a")[0] == 0
    assert smi("visualize", *QUICK, *given, "--channels", "5,9", "--out", tmp_path / "b")[0] == 0
    pools = [Pool(tmp_path / name).records for name in "ab"]
    assert [record["class_name"] for record in pools[0]][1] == "block 2 tokens direction 1"
    for one, other in zip(*pools, strict=True):
        assert one["activation"] == pytest.approx(other["activation"], rel=1e-3)


def test_resume_gives_what_an_uninterrupted_run_gives(
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("visualize", *QUICK, "--channels", "0-2", "--batch-size", 2, "--quiet", "--out")
    assert smi(*given, tmp_path / "whole")[0] == 0
    assert [record["label"] for record in Pool(tmp_path / "whole").records] == 2 * [0, 1, 2]
    calls: list[int] = []
    step = Loop._checked_step

    def interrupted(self: Any, number: int) -> Any:
        calls.append(number)
        if len(calls) == 50:  # in the first sparse batch
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_checked_step", interrupted)
        code, _, err = smi(*given, tmp_path / "parts")
    assert code == 130 and "interrupted after 9 iterations" in err
    assert len(Pool(tmp_path / "parts").records) == 3
    assert smi(*given, tmp_path / "parts", "--resume")[0] == 0
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def saved(array: Any) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        np.save(folder / "directions.npy", array)
        return folder / "directions.npy"

    return save


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--block", 9), r"blocks in -6..5, got \(9,\)"),
        (("--channels", "0-512"), "targets in 0..511, got 512"),
        (("--channels", "a"), "classes such as 0-9"),
        (("--where", "mlp"), "where tokens, mlp_hidden, class_token, got 'mlp'"),
        (("--kind", "ragged"), "--kind dense, sparse or both, got 'ragged'"),
        (("--iterations", 1), "expected iterations after the stop at 1, got 1"),
        (("--resume", "--overwrite"), "--resume or --overwrite, got both"),
        (("--directions", saved(np.ones((2, 3)))), "targets of width 512, got 3"),
        (("--directions", saved(np.ones(512))), r"\[n, width\] .* got float64 \[512\]"),
        (("--directions", saved(np.zeros((1, 512)))), "of a length above 0"),
        (("--directions", lambda folder: folder / "none.npy"), "none.npy as a file of numpy.save"),
        (("--channels", "1", "--directions", "x"), "--channels or --directions, got both"),
    ],
)
def test_mistakes_are_told_in_one_line(
    smi: Smi, tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    given = [value(tmp_path) if callable(value) else value for value in arguments]
    code, _, err = smi("visualize", *QUICK, *given, "--out", tmp_path / "pool")
    assert code == 2 and err.startswith("smi-fast: ") and err.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)
    assert not (tmp_path / "pool").exists()
