"""Each example runs, at a small size, and does what it shows."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from smi_fast import SparseInverter, StopSchedule, load_cnn, load_teacher, recipes
from smi_fast.fill import fill
from smi_fast.jitter import Jitter
from smi_fast.ops.grid import pixel_mask
from smi_fast.pool import Pool
from smi_fast.pool.shards import write_shards
from smi_fast.provenance import describe
from smi_fast.zoo import UnknownTeacher
from tests.helpers.inversions import PUBLISHED
from tests.helpers.libraries import library

EXAMPLES = Path(__file__).parents[1] / "examples"
# The fewest iterations at which StopSchedule.scaled keeps the published stops apart.
FEWEST = 60


def example(name: str) -> dict[str, Any]:
    """The names that an example defines."""
    return runpy.run_path(str(EXAMPLES / name))


def test_invert_imagenet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With random weights of a small timm model: any checkpoint will do to run it."""
    checkpoint = tmp_path / "random.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), checkpoint)
    options = ["--checkpoint", str(checkpoint), "--iterations", str(FEWEST), "--out"]
    example("invert_imagenet.py")["main"](["test_vit", *options, str(tmp_path)])
    images = [f"class_{label}.png" for label in (207, 281, 817)]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == images
    assert "class 817: the teacher is " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["deit_tiny"], "expected fashion-canvas or a timm model, got 'deit_tiny'"),
        (["deit_tiny_patch16_224", "--checkpoint", "missing.pth"], "expected a checkpoint file"),
    ],
)
def test_invert_imagenet_without_weights(arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        example("invert_imagenet.py")["main"](arguments)


def test_own_objective(capsys: pytest.CaptureFixture[str]) -> None:
    example("own_objective.py")["main"](["--iterations", str(FEWEST)])
    lines = capsys.readouterr().out.splitlines()
    names = ["cross_entropy", "total_variation", "attention_entropy", "redness"]
    assert [line.split()[0] for line in lines] == names
    first, last = (float(word) for word in lines[3].split()[1::2])
    assert last < first - 0.05


def test_deepinversion_prior(capsys: pytest.CaptureFixture[str]) -> None:
    example("deepinversion_prior.py")["main"](["--iterations", "4"])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("distance"))
    first, _, last = line.split()[-3:]
    assert float(last) < float(first)


def test_clip_inversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With random weights of a small ViT, whose output stands in for an embedding."""
    checkpoint, photograph = tmp_path / "random.safetensors", tmp_path / "noise.png"
    save_file(timm.create_model("test_vit").state_dict(), checkpoint)
    pixels = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
    to_pil_image(pixels).save(photograph)
    main = example("clip_inversion.py")["main"]
    options = ["--tower", "test_vit", "--checkpoint", str(checkpoint), "--out", str(tmp_path)]
    main([str(photograph), *options, "--iterations", "30", "--no-judge"])
    lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines, ("dense", "sparse"), strict=True):
        assert line.startswith(f"noise, {name}: cosine ") and float(line.split()[-1]) > 0.5
        assert (tmp_path / f"noise_{name}.png").exists()


def test_clip_inversion_has_a_judge(tmp_path: Path) -> None:
    module = example("clip_inversion.py")
    try:
        judge = load_cnn("efficientnet-lite0")
    except UnknownTeacher as error:
        pytest.skip(str(error))
    known = ImageNetInfo()
    words = module["words"](judge, torch.rand(3, 224, 224))
    assert words in {known.index_to_description(index) for index in range(1000)}


def test_clip_inversion_without_weights() -> None:
    with pytest.raises(SystemExit, match="expected a checkpoint file"):
        example("clip_inversion.py")["main"](["a.jpg", "--checkpoint", "missing.pth"])


def test_clip_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a small CLIP of random weights, whose texts are told apart."""
    open_clip = library("open_clip")
    config = tmp_path / "tiny-clip.json"
    sizes = {"width": 32, "layers": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8, "head_width": 16}
    text = {**sizes, "heads": 2, "context_length": 77, "vocab_size": 49408}
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(config)
    texts = ["a red bus", "two dogs in the snow"]
    options = ["--model", "tiny-clip", "--iterations", "200", "--out", str(tmp_path)]
    example("clip_text.py")["main"]([*texts, *options])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("nearest text ")[2] for line in lines] == list(map(repr, texts))
    assert all(float(re.search(r"cosine (\S+),", line)[1]) > 0.3 for line in lines)
    assert (tmp_path / "text_1.png").stat().st_size > 0


def test_encoder_neurons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each image excites its own neuron most, also of an encoder with random weights."""
    checkpoint, sheet = tmp_path / "random.safetensors", tmp_path / "neurons.png"
    save_file(timm.create_model("test_vit").state_dict(), checkpoint)
    options = ["--checkpoint", str(checkpoint), "--block", "2", "--channels", "5", "9", "30"]
    iterations = ["--iterations", str(FEWEST), "--out", str(sheet)]
    example("encoder_neurons.py")["main"](["test_vit", *options, *iterations])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("channel")]
    activations = torch.tensor([[float(x) for x in line.split(":")[1].split()] for line in lines])
    assert activations.argmax(1).tolist() == [0, 1, 2] and sheet.stat().st_size > 0


def test_linear_gradient_matching(capsys: pytest.CaptureFixture[str]) -> None:
    example("linear_gradient_matching.py")["main"](["--iterations", "30"])
    lines = capsys.readouterr().out.splitlines()
    first, _, last = lines[0].split()[-3:]
    assert float(last) < 0.3 < float(first)
    assert int(lines[1].split()[-1].rstrip("%")) > 60


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four images of each class of the embedded teacher."""
    path = tmp_path_factory.mktemp("example") / "pool"
    inverter = SparseInverter(
        load_teacher("fashion-canvas"), **recipes.clear().options(iterations=12)
    )
    names, labels = [str(i) for i in range(10)], [i // 4 for i in range(40)]
    with Pool.create(path, describe(inverter), names) as made:
        fill(made, inverter, labels, recipe=recipes.clear(), progress=False)
    return str(path)


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("quantise_from_pool.py", "torchao"),
        ("calibrate_nncf.py", "nncf"),
        ("calibrate_onnxruntime.py", "onnxruntime"),
        ("calibrate_mct.py", "model_compression_toolkit"),
    ],
)
def test_quantisers(
    name: str,
    needed: str,
    pool: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """8 bits change the logits a little: not at all would be no quantisation."""
    library(needed)
    monkeypatch.chdir(tmp_path)
    example(name)["main"]([pool])
    said = capsys.readouterr().out
    assert int(re.search(r"(\d+)% of 40 images", said)[1]) >= 95
    assert 0.1 < float(re.search(r"logits differ by ([\d.]+)%", said)[1]) < 8


def test_train_student_on_pool(pool: str, capsys: pytest.CaptureFixture[str]) -> None:
    """After some epochs the student agrees with its teacher far above chance."""
    example("train_student_on_pool.py")["main"]([pool, "--epochs", "30"])
    said = capsys.readouterr().out
    assert int(re.search(r"(\d+)% of 8 images", said)[1]) >= 38


def test_train_on_kept_patches(
    pool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = example("train_on_kept_patches.py")["main"]
    write_shards(pool, tmp_path / "shards", load_teacher("fashion-canvas"))
    train([str(tmp_path / "shards"), "--epochs", "40"])
    assert int(re.search(r"(\d+)% of 8 images", capsys.readouterr().out)[1]) >= 38
    write_shards(pool, tmp_path / "bare")
    with pytest.raises(SystemExit, match="expected shards with logits: export them with --teacher"):
        train([str(tmp_path / "bare")])


def test_the_gradient_of_a_linear_head_is_that_of_autograd() -> None:
    features, labels = torch.randn(6, 5), torch.tensor([0, 2, 1, 1, 0, 2])
    head = torch.randn(3, 5, requires_grad=True)
    loss = F.cross_entropy(features @ head.T, labels)
    (expected,) = torch.autograd.grad(loss, head)
    closed = example("linear_gradient_matching.py")["head_gradient"](features, labels, head)
    torch.testing.assert_close(closed, expected)


def own_loop(teacher: nn.Module, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and kept patches after each iteration of the example."""
    for _, images, kept in example("own_loop.py")["inversion"](teacher, targets, FEWEST):
        yield images.clone(), kept


def test_own_loop_never_changes_a_stopped_pixel() -> None:
    counts = []
    steps = own_loop(load_teacher("fashion-canvas"), torch.arange(2))
    for (before, _), (images, kept) in pairwise(steps):
        moves = pixel_mask(kept, 8, 64, 64).expand_as(images)
        assert torch.equal(images[~moves], before[~moves])
        assert not torch.equal(images[moves], before[moves])
        counts.append(kept.shape[1])
    assert sorted(set(counts), reverse=True) == [44, 30, 21, 14]


def test_own_loop_makes_the_images_of_sparse_inverter() -> None:
    teacher, targets = load_teacher("fashion-canvas"), torch.arange(2)
    torch.manual_seed(0)
    own = list(own_loop(teacher, targets))
    schedule = StopSchedule.scaled(FEWEST)
    ours: list[tuple[Tensor, Tensor]] = []
    torch.manual_seed(0)
    published = {"schedule": schedule, "iterations": FEWEST, "jitter": Jitter(), **PUBLISHED}
    SparseInverter(teacher, **published).invert(
        targets,
        progress=False,
        callback=lambda _, images, kept: ours.append((images.clone(), kept)),
    )
    for (images, kept), (expected, expected_kept) in zip(own, ours, strict=True):
        assert torch.equal(kept, expected_kept)
        # The loops round differently, and Adam amplifies it from iteration to iteration.
        torch.testing.assert_close(images, expected, atol=0.01, rtol=0)
