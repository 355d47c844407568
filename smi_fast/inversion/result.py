"""What an inversion gives back, and how it fails."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from smi_fast.background import Background, over
from smi_fast.inversion.sparse_images import SparseImages, collect, confidence, to_patches


class NonFiniteLoss(ArithmeticError):
    """An objective, or the gradient, became infinite or not a number.

    Attributes:
        iteration: at which one, from 0.
        objective: name of the first such objective, or "gradient".
        result: what was done until then; its images are the last finite ones.
    """

    def __init__(self, iteration: int, objective: str, result: InversionResult) -> None:
        super().__init__(f"{objective} is not finite at iteration {iteration}; a lower lr may help")
        self.iteration, self.objective, self.result = iteration, objective, result


@dataclass(frozen=True)
class Phase:
    """The iterations between two stops.

    Attributes:
        patches: kept patches of an image; the most of one where a schedule is ragged.
        iterations: how many.
        seconds: how long they took.
    """

    patches: int
    iterations: int
    seconds: float


@dataclass(frozen=True, eq=False)
class FinishedGroup:
    """Patches that a schedule took out at a stop as a finished sparse image.

    Attributes:
        iteration: iterations that the patches received.
        patches: int64 [B, F], ascending.
        pixels: [B, F, C·P·P] in [0, 1], in the order of :func:`smi_fast.ops.gather_patches`.
        logits: [B, classes], the logits of the teacher for these patches alone, without jitter.
    """

    iteration: int
    patches: Tensor
    pixels: Tensor
    logits: Tensor


@dataclass(frozen=True, eq=False)
class InversionResult:
    """What an inversion gives back.

    It can be pickled, so ``torch.save(result, path)`` writes it and
    ``torch.load(path, weights_only=False)`` reads it.

    Attributes:
        images: [B, 3, H, W] in [0, 1], background included.
        kept: int64 [B, K], the patches that were inverted to the end.
        masks: bool [B, rows, columns], the patches that :meth:`over` shows: ``kept``, or those of
            the published re-ranked mask.
        targets: as they were given, [B, ...] or None.
        logits: [B, classes], the logits of the teacher for ``kept`` alone, without jitter.
        history: for each objective its un-weighted value in each iteration; with ``finish`` the
            mean over the images that were at work when the last ones were at this iteration.
        timing: the phases between stops; with ``finish`` over all images, with one iteration for
            each pass of the teacher.
        iterations: iterations done; with ``finish`` those of the image that received most.
        ages: int64 [B], iterations that each image received.
        interrupted: whether Ctrl-C ended the run early.
        finished: groups of patches that the schedule took out, in the order of their stops.
        lengths: int64 [B], of a ragged schedule how many of ``kept`` count in each image, the first
            ones; None where all do.
        precision: data type of the teacher's matrix products, such as "float32".
    """

    images: Tensor
    kept: Tensor
    masks: Tensor
    targets: Tensor | None
    logits: Tensor
    history: dict[str, list[float]]
    timing: tuple[Phase, ...]
    iterations: int
    ages: Tensor
    interrupted: bool = False
    finished: tuple[FinishedGroup, ...] = ()
    lengths: Tensor | None = None
    precision: str = "float32"

    def over(self, background: Background = "mean") -> Tensor:
        """The patches of ``masks`` over a background.

        >>> result = invert(teacher, [7], iterations=10, progress=False)
        >>> result.over("mean").shape
        torch.Size([1, 3, 64, 64])

        Args:
            background: "mean", the mean colour of each image's own kept patches; "blurred", these
                patches blurred over a patch's side; "black"; or a colour (r, g, b) in [0, 1].

        Returns:
            pixels [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: no background.
        """
        return over(self.images, self.masks, background)

    def sparse_images(self) -> SparseImages:
        """All sparse images: the groups that left at stops, and the patches kept to the end.

        >>> result = invert(teacher, [7], iterations=8, schedule=PatchRebirth(v=4), progress=False)
        >>> found = result.sparse_images()
        >>> found.pixels.shape, found.trajectory.tolist(), found.age.tolist()
        (torch.Size([4, 16, 192]), [0, 0, 0, 0], [2, 4, 6, 8])

        Raises:
            ValueError: the groups have different numbers of patches, as those of a run that was
                interrupted before its last stop; or the images have, after a ragged schedule.
        """
        if self.lengths is not None:
            raise ValueError(
                f"expected as many patches in each image, got {self.lengths.tolist()}: read "
                "images and masks instead"
            )
        grid = (self.masks.shape[1], self.masks.shape[2])
        cells = to_patches(self.images, grid)
        pixels = cells.gather(1, self.kept[..., None].expand(-1, -1, cells.shape[2]))
        last = FinishedGroup(self.iterations, self.kept, pixels, self.logits)
        return collect((*self.finished, last), self.images, grid, self.targets, self.ages)

    @property
    def confidence(self) -> Tensor:
        """[B], probability that the teacher gives to the (most probable) target.

        Raises:
            ValueError: the targets are neither classes [B] nor probabilities [B, classes].
        """
        return confidence(self.logits, self.targets)

    @property
    def seconds(self) -> float:
        """Time spent in the loop."""
        return sum(phase.seconds for phase in self.timing)
