"""Images whose embedding is a given one, such as that of a text or of another image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.objectives.base import LossInputs, Objective

if TYPE_CHECKING:
    from smi_fast.teacher import SparseViT

DISTANCES = ("cosine", "spherical", "l2", "infonce")
# The usual temperature of a contrastive loss, as in MoCo (arXiv 1911.05722).
TEMPERATURE = 0.07


class EmbeddingTarget(Objective):
    """Distance of the teacher's output from embeddings, the mean over images.

    The output is the embedding of a teacher without a head, and what the head gives otherwise, such
    as CLIP's projection. With embeddings ``z`` and targets ``e`` [B, D], and ``u`` and ``v`` the
    same at norm 1:

    - "cosine": ``1 - (u * v).sum(1)``;
    - "spherical": half the square of the angle between them, ``2 * asin(|u - v| / 2) ** 2``, whose
      gradient grows with the angle, where that of the cosine vanishes at opposite embeddings;
    - "l2": ``(z - e).square().sum(1)``, which reads norms, too;
    - "infonce": ``F.cross_entropy(u @ v.T / 0.07, arange(B))``, each image's target against those
      of the others. It couples the images of a batch.

    Sparse images of embeddings come out best with ``importance="gradient"`` and most of the patches
    kept, see the page on quality.

    >>> wanted = torch.randn(1, 10)
    >>> options = {"iterations": 3, "schedule": Dense(), "progress": False, "batch": 1}
    >>> list(invert(teacher, objectives=[EmbeddingTarget(wanted)], **options).history)
    ['embedding']

    Args:
        embedding: [D] for all images, or [B, D]; None for the targets of the inversion, [B, D].
        distance: "cosine", "spherical", "l2" or "infonce".
        weight: factor.

    Raises:
        ValueError: another distance, or what is no embedding; at the start of an inversion, an
            embedding of another width, number, device or data type than the teacher and the batch
            need.
    """

    name = "embedding"

    def __init__(
        self, embedding: Tensor | None = None, distance: str = "cosine", weight: float = 1.0
    ) -> None:
        if distance not in DISTANCES:
            raise ValueError(f"expected distance {', '.join(DISTANCES)}, got {distance!r}")
        if embedding is not None and not isinstance(embedding, Tensor):
            raise ValueError(f"expected embedding as a tensor, got {type(embedding).__name__}")
        self.embedding = None if embedding is None else embedding.detach()
        self.distance, self.weight = distance, weight
        self.separable = distance != "infonce"

    def __repr__(self) -> str:
        shape = None if self.embedding is None else list(self.embedding.shape)
        return f"EmbeddingTarget({shape}, {self.distance!r}, weight={self.weight})"

    def check_targets(self, targets: Tensor | None, teacher: SparseViT) -> None:
        if self.embedding is None:
            self._check(targets, "targets", teacher)

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        if self.embedding is not None:
            self._check(self.embedding, "embedding", teacher)
            if self.embedding.dim() == 2 and len(self.embedding) != batch:
                raise ValueError(
                    f"expected embedding as one, or one for each of {batch} images, "
                    f"got {list(self.embedding.shape)}"
                )
        one = self.embedding is not None and self.embedding.dim() == 1
        if self.distance == "infonce" and (batch < 2 or one):
            got = "one embedding for all" if one else f"a batch of {batch}"
            raise ValueError(
                f"expected two images or more, each with its embedding, for infonce, got {got}"
            )

    def _check(self, given: Tensor | None, name: str, teacher: SparseViT) -> None:
        width = teacher.output_width
        shape = f"[B, {width}]" if name == "targets" else f"[{width}] or [B, {width}]"
        expected = f"expected {name} as {teacher.dtype} {shape} on {teacher.device}"
        if given is None:
            raise ValueError(f"{expected}, got none")
        rows = (2,) if name == "targets" else (1, 2)
        if (
            given.dim() not in rows
            or given.shape[-1] != width
            or given.dtype != teacher.dtype
            or given.device != teacher.device
        ):
            raise ValueError(f"{expected}, got {given.dtype} {list(given.shape)} on {given.device}")
        if not bool(given.isfinite().all()):
            raise ValueError(f"expected finite {name}, got others")
        if self.distance != "l2" and not bool(given.any(dim=-1).all()):
            raise ValueError(f"expected {name} with a direction for {self.distance}, got zeros")

    def __call__(self, inputs: LossInputs) -> Tensor:
        found, wanted = inputs.logits, self.embedding
        if wanted is None:
            assert inputs.targets is not None
            wanted = inputs.targets
        elif wanted.dim() == 2:
            wanted = inputs.rows_of(wanted)
        return distance(found, wanted.expand_as(found), self.distance)


def distance(found: Tensor, wanted: Tensor, kind: str) -> Tensor:
    """One of the distances of :class:`EmbeddingTarget`, the mean over rows [B, D]."""
    if kind == "l2":
        return (found - wanted).square().sum(1).mean()
    u, v = F.normalize(found, dim=1), F.normalize(wanted, dim=1)
    if kind == "cosine":
        return 1 - (u * v).sum(1).mean()
    if kind == "infonce":
        return F.cross_entropy(u @ v.mT / TEMPERATURE, torch.arange(len(u), device=u.device))
    # Half the angle, as asin(|u - v| / 2), whose slope would be infinite at opposite embeddings.
    half = torch.atan2(*(torch.linalg.vector_norm(w, dim=1) for w in (u - v, u + v)))
    return (2 * half.square()).mean()
