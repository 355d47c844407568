"""Mutants of images that are finished early."""

from tests.mutants.mutant import Mutant, of_file

TURNOVER = "tests/inversion/test_turnover.py"
AT_ITS_AGE = f"{TURNOVER}::test_a_finished_image_is_that_of_a_plain_run_at_its_age"
NEVER = f"{TURNOVER}::test_images_that_never_finish_are_those_of_a_plain_run"

MUTANTS = (
    *of_file(
        "smi_fast/inversion/turnover.py",
        TURNOVER,
        Mutant(
            "turnover-in-a-row",
            "torch.where(sure, self._sure + 1, 0)",
            "self._sure + sure.long()",
            "An image is finished after some iterations that don't follow each other.",
            AT_ITS_AGE,
        ),
        Mutant(
            "turnover-sure",
            "self._sure = self._sure[stay]",
            "self._sure = self._sure[: len(stay)]",
            "When an image leaves, others inherit how sure the teacher is of it.",
            AT_ITS_AGE,
        ),
        Mutant(
            "turnover-places",
            "index, self._waiting = self._waiting[: self._free], self._waiting[self._free :]",
            "index, self._waiting = self._waiting, []",
            "More images are at work than there are places.",
            f"{TURNOVER}::test_places_are_taken_in_order",
        ),
        Mutant(
            "turnover-enough",
            "max(1, round(FREE * self._places))",
            "self._places",
            "New images begin only when all places are free.",
            f"{TURNOVER}::test_images_begin_when_half_of_the_places_are_free",
        ),
        Mutant(
            "turnover-too-early",
            "max(1, round(FREE * self._places))",
            "1",
            "New images begin as soon as a place is free.",
            f"{TURNOVER}::test_images_begin_when_half_of_the_places_are_free",
        ),
        Mutant(
            "turnover-young",
            "for state in (self._young, self._work):",
            "for state in (self._work,):",
            "Ctrl-C loses the images that have just begun.",
            f"{TURNOVER}::test_an_image_that_begins_can_be_interrupted",
        ),
        Mutant(
            "turnover-lengths",
            "return kept, None if alike else torch.tensor(counts, device=kept.device)",
            "return kept, None",
            "Padding counts as kept in images of an interrupted batch.",
            f"{TURNOVER}::test_an_interrupted_batch_has_all_images",
        ),
        Mutant(
            "turnover-non-finite",
            "last = int(state.iteration[-1])",
            "last = 0",
            "A value that isn't finite is only noticed in the first iteration.",
            f"{TURNOVER}::test_a_value_that_is_not_finite_keeps_the_images",
        ),
    ),
    *of_file(
        "smi_fast/inversion/groups.py",
        TURNOVER,
        Mutant(
            "groups-iteration",
            "found.iteration = state.iteration[left].clone()",
            "found.iteration = state.iteration[: len(left)].clone()",
            "A group goes on at the iteration of another one.",
            AT_ITS_AGE,
        ),
        Mutant(
            "groups-jitter",
            "found.flip = torch.cat([first.flip, second.flip], dim=-1)",
            "found.flip = torch.cat([second.flip, first.flip], dim=-1)",
            "Images that join are mirrored when others should be.",
            AT_ITS_AGE,
        ),
    ),
    *of_file(
        "smi_fast/ops/grid.py",
        "tests/ops/test_grid.py",
        Mutant(
            "grid-widened",
            "others[:, : width - kept.shape[1]]",
            "kept[:, : width - kept.shape[1]]",
            "Padding repeats kept patches.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/state.py",
        TURNOVER,
        Mutant(
            "state-groups-rate",
            "lr=lr[group],",
            "lr=lr[0],",
            "All images at work have the learning rate of the oldest.",
            AT_ITS_AGE,
        ),
        Mutant(
            "state-groups-step",
            "step=step[group],",
            "step=step[0],",
            "Adam corrects the moments of all images at work as those of the oldest.",
            AT_ITS_AGE,
        ),
        Mutant(
            "state-groups-jitter",
            "at = self.iteration.repeat_interleave(size)",
            "at = self.iteration[:1].expand(len(image))",
            "All images at work have the jitter of the oldest one's iteration.",
            AT_ITS_AGE,
        ),
    ),
    *of_file(
        "smi_fast/inversion/views.py",
        TURNOVER,
        Mutant(
            "views-at-work",
            "return weight if share == 1 else weight * share",
            "return weight",
            "The gradient of an image depends on how many others are at work.",
            NEVER,
        ),
    ),
)
