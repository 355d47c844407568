"""What an inversion gives back, and how it fails."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class NonFiniteLoss(ArithmeticError):
    """A term, or the gradient, became infinite or not a number.

    Attributes:
        iteration: at which one, from 0.
        term: name of the first such term, or "gradient".
        result: what was done until then; its images are the last finite ones.
    """

    def __init__(self, iteration: int, term: str, result: InversionResult) -> None:
        super().__init__(f"{term} is not finite at iteration {iteration}; a lower lr may help")
        self.iteration, self.term, self.result = iteration, term, result


@dataclass(frozen=True)
class Phase:
    """The iterations between two stops: how many, how many patches were kept, and their seconds."""

    patches: int
    iterations: int
    seconds: float


@dataclass(frozen=True)
class InversionResult:
    """What an inversion gives back.

    Attributes:
        images: [B, 3, H, W] in [0, 1], background included.
        kept: int64 [B, K], the patches that were inverted to the end.
        masks: bool [B, rows, columns], the patches that ``masked_images`` shows.
        masked_images: ``images`` with every other patch black.
        targets: int64 [B] or probabilities [B, classes].
        logits: [B, classes], what the teacher says of ``kept`` alone, without jitter.
        history: for each term its un-weighted value before each step.
        timing: the phases between stops.
        iterations: steps done.
        interrupted: whether Ctrl-C ended the run early.
    """

    images: Tensor
    kept: Tensor
    masks: Tensor
    masked_images: Tensor
    targets: Tensor
    logits: Tensor
    history: dict[str, list[float]]
    timing: tuple[Phase, ...]
    iterations: int
    interrupted: bool = False

    @property
    def confidence(self) -> Tensor:
        """[B], probability that the teacher gives to the (most probable) target."""
        labels = self.targets if self.targets.dim() == 1 else self.targets.argmax(1)
        return self.logits.softmax(1).gather(1, labels[:, None])[:, 0]

    @property
    def seconds(self) -> float:
        """Time spent in the loop."""
        return sum(phase.seconds for phase in self.timing)
