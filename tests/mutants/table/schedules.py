"""Mutants of schedules/, and of what keeps, grows and ranks patches for them."""

from tests.mutants.mutant import Mutant, of_file

CHECK = "tests/schedules/test_check.py"
STOPS = "tests/schedules/test_stops.py"
RESOLUTION = "tests/schedules/test_resolution.py"
MASS = "tests/schedules/test_mass.py"
RAGGED = "tests/inversion/test_ragged_loop.py"
LOOP = "tests/inversion/test_resolution_loop.py"
REBIRTH = "tests/schedules/test_rebirth.py"
COMPACT = "tests/schedules/test_compact.py"
INVERTER = "tests/inversion/test_inverter.py"
IMPORTANCE = "tests/inversion/test_importance.py"

MUTANTS = (
    *of_file(
        "smi_fast/ops/grid.py",
        COMPACT,
        Mutant(
            "grid-neighbours",
            "on_grid.view(-1, 1, *grid)",
            "on_grid.view(-1, 1, *grid[::-1])",
            "Neighbours on a grid that isn't square are those of another grid.",
        ),
    ),
    *of_file(
        "smi_fast/importance.py",
        IMPORTANCE,
        Mutant(
            "importance-rollout-order",
            "for name in reversed(self.taps(teacher.depth)):",
            "for name in self.taps(teacher.depth):",
            "The attention of the blocks is multiplied in the wrong order.",
        ),
        Mutant(
            "importance-residual",
            "row = (row + (row[:, None] @ maps)[:, 0]) / 2",
            "row = (row[:, None] @ maps)[:, 0]",
            "Attention rollout leaves the residual connections out.",
        ),
        Mutant(
            "importance-random-part",
            "self._drawn[inputs.rows].gather",
            "self._drawn[: len(inputs.kept)].gather",
            "Every part of a batch has the random order of the first.",
        ),
        Mutant(
            "importance-gradient-sign",
            ":].sum(-1).abs()",
            ":].sum(-1)",
            "A token that holds the loss down is the least important.",
        ),
        Mutant(
            "importance-device",
            "or scores.is_complex() or scores.device != kept.device:",
            "or scores.is_complex():",
            "Scores on another device reach the schedule.",
        ),
    ),
    *of_file(
        "smi_fast/schedules/mass.py",
        MASS,
        Mutant(
            "mass-one-more",
            "before.sum(dim=1) + 1",
            "before.sum(dim=1) + 2",
            "One patch more than needed stays.",
        ),
        Mutant(
            "mass-padding",
            "torch.where(there, stop.importance.double().clamp(min=0), -1)",
            "stop.importance.double().clamp(min=0)",
            "Padding of an earlier stop is kept again.",
        ),
        Mutant(
            "mass-order",
            "(patches + behind).argsort(dim=1)",
            "patches.argsort(dim=1)",
            "Padding stands among the patches that stay.",
        ),
    ),
    *of_file(
        "smi_fast/schedules/base.py",
        MASS,
        Mutant(
            "mass-unsaid",
            "        if not ragged:",
            "        if False:",
            "A schedule that didn't say that it is ragged is checked too late.",
        ),
        Mutant(
            "mass-check-back",
            "patch_mask(stop.kept, *stop.grid, stop.lengths)",
            "patch_mask(stop.kept, *stop.grid)",
            "Patches that were dropped may come back.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/ragged.py",
        MASS,
        Mutant(
            "mass-taps",
            "tapped = [o.name for o in settings.objectives if o.taps(teacher.depth)]",
            "tapped: list[str] = []",
            "A run with taps fails only after the stop.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/state.py",
        f"{RAGGED}::test_only_the_patches_that_count_move",
        Mutant(
            "ragged-frozen",
            "*settings.teacher.grid, selection.lengths)",
            "*settings.teacher.grid)",
            "Padding moves with a Fourier series.",
        ),
        Mutant(
            "ragged-adam",
            "yield own, self.kept[own, : self._numbers[index]]",
            "yield own, self.kept[own]",
            "Adam moves padding by its momentum.",
        ),
        Mutant(
            "ragged-logits",
            "own = None if lengths is None else lengths[row]",
            "own = None",
            "The logits of a result are those of padding too.",
            f"{RAGGED}::test_each_image_is_as_if_it_were_alone",
        ),
    ),
    *of_file(
        "smi_fast/objectives/pixels.py",
        f"{RAGGED}::test_each_image_is_as_if_it_were_alone",
        Mutant(
            "ragged-norm",
            "inputs.active if inputs.lengths is None else inputs.kept",
            "inputs.active",
            "The gradient of the L2 norm is lost where a patch repeats.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/views.py",
        f"{RAGGED}::test_an_iteration_without_logits",
        Mutant(
            "ragged-until",
            "lengths=lengths if until is None else None",
            "lengths=lengths",
            "An iteration that reads no logits fails after the stop.",
        ),
    ),
    *of_file(
        "smi_fast/schedules/resolution.py",
        RESOLUTION,
        Mutant(
            "resolution-ties",
            "importance.argsort(dim=1, descending=True, stable=True)",
            "total - 1 - importance.flip(1).argsort(dim=1, descending=True, stable=True)",
            "Of the parts of one patch the last ones stay.",
        ),
        Mutant(
            "resolution-part",
            "* before // after",
            "% before",
            "A patch takes the importance of another one than the one that it is a part of.",
        ),
        Mutant(
            "resolution-proportion",
            "height * size / max(image_size), width * size",
            "size, width * size",
            "Small images of a rectangle are squares.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/sizes.py",
        f"{LOOP}::test_shifts_are_scaled_to_the_nearest_pixel",
        Mutant(
            "resolution-shift",
            "if size != image_size:",
            "if False:",
            "Small images are shifted as far as large ones.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/state.py",
        f"{LOOP}::test_equals_one_inversion_after_another",
        Mutant(
            "resolution-adam",
            "self._begun = self.iteration.clone()",
            "self._begun = None",
            "Adam's correction counts the iterations of small images, whose moments are gone.",
        ),
        Mutant(
            "resolution-moments",
            "        self._begin()\n        self.background = self.frozen = None",
            "        self.exp_avg = torch.zeros_like(self.parameters)\n"
            "        self.exp_avg_sq = torch.ones_like(self.parameters)\n"
            "        self.background = self.frozen = None",
            "The squares of Adam don't begin at 0 when images grow.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/inverter.py",
        LOOP,
        Mutant(
            "resolution-begin",
            "begin(larger, len(state.kept), generator)",
            "None",
            "Objectives go on with what they drew for the smaller grid.",
            f"{LOOP}::test_objectives_begin_anew_for_the_larger_grid",
        ),
        Mutant(
            "resolution-interrupted",
            "state.enlarge(self.settings, self.teacher.every_patch(len(state.kept)))",
            "pass",
            "A run that is interrupted early gives small images.",
            f"{LOOP}::test_an_interrupted_run_gives_whole_images",
        ),
    ),
    *of_file(
        "smi_fast/teacher/sparse_vit.py",
        f"{LOOP}::test_replaced_weights_are_those_of_the_small_teacher_too",
        Mutant(
            "resolution-weights",
            "        self._weights.follow()\n        resized = freeze(self.vit)",
            "        resized = freeze(self.vit)",
            "A teacher of another size has the weights from before they were replaced.",
        ),
    ),
    *of_file(
        "smi_fast/schedules/base.py",
        CHECK,
        Mutant(
            "resolution-range",
            "if bool(((patches < 0) | (patches >= total)).any()):",
            "if bool((patches < 0).any()):",
            "Patches past the larger grid are taken.",
            RESOLUTION,
        ),
        Mutant(
            "still-stop",
            "for t in schedule.at for before in (0, 1))",
            "for t in schedule.at for before in (1,))",
            "The iteration of a stop is jittered.",
            f"{INVERTER}::test_no_jitter_around_stops",
        ),
        Mutant(
            "still-before",
            "for t in schedule.at for before in (0, 1))",
            "for t in schedule.at for before in (0,))",
            "Importance is scored on jittered images.",
            f"{INVERTER}::test_no_jitter_around_stops",
        ),
        Mutant(
            "stops-first",
            "min(stops, default=1) >= 1",
            "min(stops, default=1) >= 0",
            "A stop before the first iteration is taken, which nothing has scored.",
            STOPS,
        ),
        Mutant(
            "check-repeats",
            "if bool((patches.diff(dim=1) <= 0).any()):",
            "if bool((patches.diff(dim=1) < 0).any()):",
            "A patch may be kept twice.",
        ),
        Mutant(
            "check-negative",
            "torch.where((patches >= 0) & (patches < total), patches, total)",
            "torch.where(patches < total, patches, total)",
            "A negative patch is an error of torch.",
        ),
        Mutant(
            "check-finished",
            "if bool((together.diff(dim=1) == 0).any()):",
            "if False:",
            "A patch may both stay and leave.",
        ),
        Mutant(
            "check-count",
            "if not fits or (count is not None and patches.shape[1] != count):",
            "if not fits:",
            "A schedule keeps another number of patches than it promised.",
        ),
    ),
    *of_file(
        "smi_fast/schedules/stops.py",
        STOPS,
        Mutant(
            "stops-rounding",
            "return int(patches * (1.0 - share))",
            "return round(patches * (1.0 - share))",
            "Counts are not the published ones.",
        ),
        Mutant(
            "stops-largest",
            "importance.topk(count, dim=1).indices",
            "importance.topk(count, dim=1, largest=False).indices",
            "The least important patches stay.",
        ),
        Mutant(
            "stops-order",
            "stop.kept.gather(1, top).sort(dim=1).values",
            "stop.kept.gather(1, top)",
            "Kept patches are in the order of their importance.",
        ),
        Mutant(
            "stops-compact-unused",
            "        if self.compact:",
            "        if False:",
            "compact is not read.",
            COMPACT,
        ),
    ),
    *of_file(
        "smi_fast/schedules/rebirth.py",
        REBIRTH,
        Mutant(
            "rebirth-least",
            "argsort(dim=1, descending=True, stable=True)",
            "argsort(dim=1, descending=False, stable=True)",
            "The least important patches leave first.",
        ),
        Mutant(
            "rebirth-stops",
            "k * (iterations // self.v) for k",
            "k * iterations // self.v for k",
            "Stops are not the published ones where v doesn't divide T.",
        ),
        Mutant(
            "rebirth-remainder",
            "order[:, size : groups * size]",
            "order[:, -(groups - 1) * size :]",
            "Patches of the middle of the order are dropped instead of the last.",
        ),
        Mutant(
            "rebirth-generator",
            "torch.rand(stop.kept.shape, generator=stop.generator, dtype",
            "torch.rand(stop.kept.shape, dtype",
            "The same seed gives another random order.",
        ),
    ),
)
