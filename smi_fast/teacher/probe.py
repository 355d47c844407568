"""The probe: one image through the teacher's own forward and through SparseViT.

Both the logits and the pixel gradient are compared, because a patched function can leave the logits
alone and still cut the gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast.ops.backends import BackendUnavailable
from smi_fast.teacher.support import UnsupportedTeacher, copy_of, is_patched

if TYPE_CHECKING:
    from smi_fast.teacher.sparse_vit import SparseViT

# Largest difference over the largest number, in float32; float64 decides when it is exceeded.
TOLERANCE = 1e-3
TOLERANCE_FLOAT64 = 1e-6

Forward = Callable[[Tensor], Tensor]


def probe(teacher: VisionTransformer, sparse: SparseViT) -> None:
    """Compare a teacher with its SparseViT on one random image.

    It costs a forward and a backward pass of each.

    Raises:
        UnsupportedTeacher: logits or pixel gradients differ; the message names the first module
            whose output does.
    """
    theirs = copy_of(teacher)
    if sparse.dtype not in (torch.float32, torch.float64):
        theirs, sparse = theirs.float(), copy.deepcopy(sparse).float()
    what = _difference(theirs, sparse, TOLERANCE)
    if what is None:
        return
    if sparse.dtype != torch.float64:
        # Rounding of large weights may exceed the tolerance too: float64 tells that from a fault.
        theirs, sparse = theirs.double(), copy.deepcopy(sparse).double()
        what = _difference(theirs, sparse, TOLERANCE_FLOAT64)
    if what is not None:
        raise UnsupportedTeacher(
            f"{_first_different(theirs, sparse)} computes something else than timm's: {what}"
        )


def _difference(theirs: VisionTransformer, sparse: SparseViT, tolerance: float) -> str | None:
    """What differs by more than a tolerance, in words, or None."""
    with torch.inference_mode(False), torch.enable_grad():
        image = _image(sparse)
        expected = _logits_and_gradient(_own_forward(theirs, sparse), image)
        try:
            found = _logits_and_gradient(lambda x: sparse(x).logits, image)
        except (BackendUnavailable, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the teacher's own forward could do it
            raise UnsupportedTeacher(
                f"SparseViT can't compute this teacher ({type(error).__name__}: {error})"
            ) from error
    for name, ours, own in zip(("logits", "pixel gradients"), found, expected, strict=True):
        if ours.shape != own.shape:
            return f"expected {name} {list(own.shape)}, SparseViT gives {list(ours.shape)}"
        apart, largest = float((ours - own).abs().max()), float(own.abs().max())
        if not apart <= tolerance * largest:  # not finite counts as different
            return f"the {name} of one image differ by {apart / largest if largest else apart:.2g}"
    return None


def _image(sparse: SparseViT) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (1, sparse.channels, *sparse.image_size)
    return torch.randn(shape, generator=generator).to(sparse.device, sparse.dtype)


def _own_forward(theirs: VisionTransformer, sparse: SparseViT) -> Forward:
    """The teacher's own forward. As patched by the published code it takes the kept tokens twice,
    and returns the attention maps too.
    """
    count = sparse.num_patches + sparse.num_prefix_tokens
    every_token = torch.arange(count, device=sparse.device)[None]

    def forward(images: Tensor) -> Tensor:
        try:
            if is_patched(theirs):
                logits: Tensor = theirs(images, every_token, every_token)[0]
            else:
                logits = theirs(images)
        except Exception as error:  # whatever the code of somebody else raises
            raise UnsupportedTeacher(
                f"the teacher's own forward fails on one image ({type(error).__name__}: {error})"
            ) from error
        return logits

    return forward


def _logits_and_gradient(forward: Forward, image: Tensor) -> tuple[Tensor, Tensor]:
    image = image.clone().requires_grad_()
    logits = forward(image)
    if not logits.requires_grad:
        return logits, torch.zeros_like(image)
    # A random direction: the sum of all logits may have next to no gradient.
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(logits.shape, generator=generator).to(logits)
    (gradient,) = torch.autograd.grad((logits * direction).sum(), image, allow_unused=True)
    return logits.detach(), torch.zeros_like(image) if gradient is None else gradient


@torch.no_grad()
def _first_different(theirs: VisionTransformer, sparse: SparseViT) -> str:
    """The first block whose output differs in a forward pass, or what comes before or after."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[object, object, object], None]:
        def hook(module: object, inputs: object, output: object) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            if isinstance(tokens, Tensor):
                outputs[name] = tokens

        return hook

    names = [f"block.{index}.tokens" for index in range(sparse.depth)]
    for name, block in zip(names, theirs.blocks, strict=True):
        block.register_forward_hook(record(name))
    image = _image(sparse)
    _own_forward(theirs, sparse)(image)
    found = sparse(image, taps=names).taps
    for index, name in enumerate(names):
        own = outputs.get(name)
        if own is None or own.shape != found[name].shape:
            return f"blocks.{index}"
        if not float((own - found[name]).abs().max()) <= TOLERANCE * float(own.abs().max()):
            return f"blocks.{index}" if index else "patch_embed or blocks.0"
    return "the teacher's forward, after or around its blocks,"
