"""SMI: the published class, with its constructor, methods and attributes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from smi_fast.compat.batches import WORKERS, DataIter
from smi_fast.compat.pool import ImagePool, Images, to_tensor
from smi_fast.compat.prior import StatisticsHook, hooks_of, load_prior
from smi_fast.compat.stops import PublishedStops
from smi_fast.inversion import InversionResult, SparseInverter
from smi_fast.jitter import JITTER_SHARE
from smi_fast.objectives import (
    AdversarialJS,
    BatchNormMatching,
    CrossEntropy,
    L2Norm,
    Objective,
    TotalVariation,
)
from smi_fast.parametrizations import Pixels
from smi_fast.teacher import SparseViT

# Arguments that only the constructor of Eff-DFQT and SMI-V2 has.
TOKEN_MERGING = frozenset({"ldr", "ratio", "start"})


class Normalizer(Protocol):
    """An object with the mean and std of each channel."""

    mean: Sequence[float]
    std: Sequence[float]


class SMI:
    """A replacement for the published ``SMI`` (Egg-Hu/SMI), with its methods and attributes.

    It draws from the same global generators in the same order, follows the published loop
    (background "regularized", final mask "reranked") and returns the same images. Each argument is
    an attribute of its name (``img_shape`` is ``img_size``), and a change of the attribute counts
    from the next ``synthesize`` on.

    Args:
        teacher: a timm ``VisionTransformer``, also one that the published ``build_model`` has
            patched. Keep that function where a script calls the teacher with token indices.
        teacher_name: ignored, as in the published class.
        student: network for :class:`AdversarialJS`. ``synthesize`` leaves it in training mode, as
            published.
        num_classes: number of classes; must be the teacher's.
        img_shape: (channels, height, width); must be the teacher's.
        patch_size: side of a patch in pixels; must be the teacher's.
        iterations: iterations of the optimiser.
        lr_g: learning rate.
        synthesis_batch_size: number of images that a call of ``synthesize`` inverts.
        sample_batch_size: largest number of images that a call of ``sample`` returns.
        adv: weight of :class:`AdversarialJS`, with ``bounded=False``; used above 0.
        bn: weight of :class:`BatchNormMatching`.
        oh: weight of :class:`CrossEntropy`.
        tv1: weight of :class:`TotalVariation` with norm "l1".
        tv2: weight of :class:`TotalVariation` with norm "l2".
        l2: weight of :class:`L2Norm`.
        save_dir: folder for the inverted images, made when missing.
        transform: called with each image, an RGB image from PIL, that ``sample`` reads; by default
            it returns a tensor [3, H, W] in [0, 1].
        normalizer: object with the ``mean`` and ``std`` of each channel.
        device: device to run on; must be the teacher's.
        bnsource: "resnet50v1" or "resnet50v2" of torchvision, as published, or a CNN; ignored
            while ``bn`` is 0.
        init_dataset: folder with further images for ``sample``.

    Attributes:
        data_pool: the saved images; ``data_pool.get_dataset(transform)`` is a dataset of them.
        data_iter: the shuffled batches that ``sample`` reads; None before ``synthesize``.
        prior: the CNN of ``bnsource``; None while ``bn`` is 0.
        bn_hooks: a hook with ``r_feature`` on each BatchNorm of ``prior``.

    Raises:
        ValueError: ``adv`` without a student, an unknown ``bnsource`` or one whose weights can't be
            loaded, no normalizer, or a device or sizes that aren't the teacher's.
        TypeError: an argument that the published class doesn't have.
        UnsupportedTeacher: the teacher can't be computed exactly on kept patches.
    """

    def __init__(
        self,
        teacher: nn.Module,
        teacher_name: str,
        student: nn.Module | None,
        num_classes: int,
        img_shape: tuple[int, int, int] = (3, 224, 224),
        patch_size: int = 16,
        iterations: int = 2000,
        lr_g: float = 0.25,
        synthesis_batch_size: int = 128,
        sample_batch_size: int = 128,
        adv: float = 0.0,
        bn: float = 0,
        oh: float = 1,
        tv1: float = 0.0,
        tv2: float = 1e-5,
        l2: float = 0.0,
        save_dir: str | Path = "",
        transform: Callable[[Image.Image], Any] | None = None,
        normalizer: Normalizer | None = None,
        device: str | torch.device = "cpu",
        bnsource: str | nn.Module = "resnet50v2",
        init_dataset: str | Path | None = None,
        **others: object,
    ) -> None:
        _refuse(others)
        self.student, self.num_classes = student, num_classes
        self.img_size, self.patch_size = img_shape, patch_size
        self.iterations, self.lr_g = iterations, lr_g
        self.synthesis_batch_size, self.sample_batch_size = synthesis_batch_size, sample_batch_size
        self.adv, self.bn, self.oh = adv, bn, oh
        self.tv1, self.tv2, self.l2 = tv1, tv2, l2
        self.normalizer, self.device, self.transform = normalizer, device, transform
        self.save_dir, self.init_dataset = save_dir, init_dataset
        self.teacher = teacher
        self.prior: nn.Module | None = load_prior(bnsource, device) if bn else None
        self._check()
        self.bn_hooks: list[StatisticsHook] = [] if self.prior is None else hooks_of(self.prior)
        self.data_pool = ImagePool(save_dir)
        self.data_iter: DataIter | None = None

    @property
    def teacher(self) -> nn.Module:
        """The teacher, as it was given."""
        return self._teacher

    @teacher.setter
    def teacher(self, teacher: nn.Module) -> None:
        self._sparse = SparseViT(teacher)
        self._teacher = teacher

    def synthesize(
        self,
        targets: Tensor | None = None,
        num_patches: int = 197,
        prune_it: Sequence[int] = (-1,),
        prune_ratio: Sequence[float] = (0,),
        use_soft_label: bool = False,
        soft_label_alpha: float = 0.9,
    ) -> dict[str, Any]:
        """Invert one batch and save it in ``save_dir``: masked, or whole with ``prune_ratio=[0]``.

        The last two arguments are those of TBD_MI's ``SMI``.

        Args:
            targets: int64 [synthesis_batch_size], or probabilities [synthesis_batch_size, classes];
                by default random classes, sorted.
            num_patches: number of tokens of a whole image, class token included.
            prune_it: iterations of the stops; [-1] for a dense run. As published, a stop is skipped
                when the next iteration is in ``prune_it`` too, or when it is past the end.
            prune_ratio: fraction of the kept patches that each stop drops; [0] for a dense run. The
                final mask counts all of them, also those of stops that aren't taken.
            use_soft_label: whether classes become probabilities: ``soft_label_alpha`` for the
                target, and the rest in equal parts for the other classes.
            soft_label_alpha: in [0, 1].

        Returns:
            "synthetic", images [B, 3, H, W] in [0, 1]; "masked_synthetic", the same images with
            black in place of dropped patches; and "targets", a NumPy array of the targets used.

        Raises:
            ValueError: ``num_patches`` isn't the teacher's, a stop at 0, a stop that drops all
                patches or has no ratio, or ``soft_label_alpha`` out of range.
            KeyboardInterrupt: Ctrl-C; nothing of this batch is saved.
        """
        self._check()
        stops = PublishedStops.read(prune_it, prune_ratio, self.iterations)
        tokens = self._sparse.num_patches + self._sparse.num_prefix_tokens
        if num_patches != tokens:
            raise ValueError(f"expected num_patches={tokens} for this teacher, got {num_patches}")
        if self.student is not None:
            self.student.eval()
        self.teacher.eval()
        init = torch.randn((self.synthesis_batch_size, *self.img_size), device=self._sparse.device)
        if targets is None:
            drawn = torch.randint(0, self.num_classes, (self.synthesis_batch_size,))
            targets = drawn.sort().values
        if use_soft_label and targets.dim() == 1:
            targets = _soft(targets, self.num_classes, soft_label_alpha)
        targets = targets.to(self._sparse.device)
        result = self._invert(targets, init, stops)
        if self.student is not None:
            self.student.train()
        whole = len(prune_ratio) == 1 and prune_ratio[0] == 0
        masked = result.over("black")
        self.data_pool.add(result.images if whole else masked)
        self.data_iter = DataIter(self._loader())
        return {
            "synthetic": result.images,
            "masked_synthetic": masked,
            "targets": targets.cpu().numpy(),
        }

    def sample(self) -> Any:
        """The next batch of the shuffled images in ``save_dir`` and ``init_dataset``.

        After the last batch the images are shuffled again.

        Raises:
            RuntimeError: before the first call of ``synthesize``.
        """
        if self.data_iter is None:
            raise RuntimeError("call synthesize() before sample(): there are no images yet")
        return self.data_iter.next()

    def _check(self) -> None:
        """Refuse what can't be inverted, also after a change of an attribute."""
        sparse = self._sparse
        if self.adv > 0 and self.student is None:
            raise ValueError(f"expected a student with adv={self.adv}, got None")
        if self.bn and self.prior is None:
            raise ValueError(f"expected bn={self.bn} in the constructor, or a CNN as prior")
        if self.normalizer is None:
            raise ValueError("expected a normalizer with mean and std, got None")
        if not same_device(sparse.device, torch.device(self.device)):
            raise ValueError(f"expected the teacher on {self.device}, it is on {sparse.device}")
        shape = (sparse.channels, *sparse.image_size)
        if tuple(self.img_size) != shape or self.patch_size != sparse.patch_size:
            raise ValueError(
                f"expected the teacher's img_shape {shape} and patch_size "
                f"{sparse.patch_size}, got {tuple(self.img_size)} and {self.patch_size}"
            )
        if self.num_classes != sparse.num_classes:
            raise ValueError(
                f"the teacher has {sparse.num_classes} classes, got {self.num_classes}"
            )

    def _invert(self, targets: Tensor, init: Tensor, stops: PublishedStops) -> InversionResult:
        assert self.normalizer is not None
        inverter = SparseInverter(
            self._sparse,
            objectives=self._objectives(),
            schedule=stops,
            parametrization=Pixels(),
            mean=self.normalizer.mean,
            std=self.normalizer.std,
            iterations=self.iterations,
            lr=self.lr_g,
            background="regularized",
            final_mask="reranked",
        )
        jitter = self._published_jitter(stops.still)
        result = inverter.invert(targets, init=init, jitter=jitter, progress=True)
        if result.interrupted:
            raise KeyboardInterrupt
        return result

    def _objectives(self) -> list[Objective]:
        """The objectives whose weight isn't 0; the first is there even so."""
        objectives: list[Objective] = [CrossEntropy(self.oh)]
        pixels: list[Objective] = [
            *(
                TotalVariation(weight, norm, per_image=False)
                for weight, norm in ((self.tv1, "l1"), (self.tv2, "l2"))
            ),
            L2Norm(self.l2, per_image=False),
        ]
        objectives += [objective for objective in pixels if objective.weight]
        if self.bn and self.prior is not None:
            objectives.append(BatchNormMatching(self.prior, weight=self.bn))
        if self.adv > 0 and self.student is not None:
            objectives.append(AdversarialJS(self.student, self.adv, bounded=False))
        return objectives

    def _published_jitter(self, still: frozenset[int]) -> tuple[Tensor, Tensor]:
        """Jitter as the published loop draws it: shift int64 [T, 2] and flip bool [T].

        That loop draws only in the iterations that it jitters.
        """
        limits = [side // JITTER_SHARE for side in self._sparse.image_size]
        shifts, flips = [], []
        for iteration in range(self.iterations):
            drawn = iteration not in still
            shifts.append([random.randint(-m, m) if drawn else 0 for m in limits])
            flips.append(drawn and random.random() > 0.5)
        return torch.tensor(shifts), torch.tensor(flips)

    def _loader(self) -> DataLoader[Any]:
        transform = to_tensor if self.transform is None else self.transform
        dataset: Dataset[Any] = self.data_pool.get_dataset(transform)
        if self.init_dataset is not None:
            dataset = ConcatDataset([dataset, Images(self.init_dataset, transform)])
        return DataLoader(
            dataset,
            batch_size=self.sample_batch_size,
            shuffle=True,
            num_workers=WORKERS,
            pin_memory=self._sparse.device.type == "cuda",
        )


def _refuse(others: dict[str, object]) -> None:
    """Refuse arguments that the published class doesn't have."""
    if TOKEN_MERGING & others.keys():
        raise TypeError(
            f"{', '.join(sorted(TOKEN_MERGING & others.keys()))} of Eff-DFQT and SMI-V2 can't be "
            "followed: their token merging and detached attention give other logits and gradients"
        )
    if others:
        raise TypeError(f"SMI has no argument {', '.join(others)}")


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are the same one; "cuda" without an index is the current device."""
    return one.type == other.type and _index(one) == _index(other)


def _index(device: torch.device) -> int:
    if device.index is None and device.type == "cuda":
        return torch.cuda.current_device()
    return device.index or 0


def _soft(targets: Tensor, classes: int, alpha: float) -> Tensor:
    """Classes [B] as probabilities [B, classes], with ``alpha`` for the target."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"expected soft_label_alpha in [0, 1], got {alpha}")
    others = torch.full((len(targets), classes), (1 - alpha) / (classes - 1))
    return others.scatter(1, targets.cpu().to(torch.int64)[:, None], alpha)
