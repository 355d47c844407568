"""Mutants of inversion/."""

from tests.mutants.mutant import Mutant, of_file

GROUPS = "tests/schedules/test_finished_groups.py"
INVERTER = "tests/inversion/test_inverter.py"
RATE = "tests/test_learning_rate.py"
LOOP = "tests/inversion/test_loop.py"
VIEWS = "tests/inversion/test_views.py"
PARAMETRIZATIONS = "tests/parametrizations/test_parametrizations.py"
SIGMOID = "tests/parametrizations/test_sigmoid.py"

REBIRTH = "tests/inversion/test_rebirth_loop.py"

MUTANTS = (
    *of_file(
        "smi_fast/inversion/inputs.py",
        PARAMETRIZATIONS,
        Mutant(
            "inputs-start",
            "parameters.detach().clone(memory_format=torch.contiguous_format)",
            "parameters.detach().contiguous()",
            "The images of the caller change.",
            f"{PARAMETRIZATIONS}::test_pixels_start_from_a_copy",
        ),
        Mutant(
            "inputs-gradient",
            "if not images.requires_grad:",
            "if False:",
            "A parametrization without a gradient is found out in the loop.",
            f"{PARAMETRIZATIONS}::test_what_the_loop_cannot_optimise_is_refused",
        ),
    ),
    *of_file(
        "smi_fast/inversion/ending.py",
        INVERTER,
        Mutant(
            "ending-reranked",
            "count = min(int(tokens * remaining), teacher.num_patches)",
            "count = int(teacher.num_patches * remaining)",
            "The published mask has one patch less.",
            "tests/compat/test_smi.py::test_draws_and_returns_what_the_published_loop_does",
        ),
    ),
    *of_file(
        "smi_fast/inversion/sparse_images.py",
        REBIRTH,
        Mutant(
            "sparse-order",
            "return torch.stack(tensors, dim=1).flatten(0, 1)",
            "return torch.stack(tensors).flatten(0, 1)",
            "An image has the label of another trajectory.",
        ),
        Mutant(
            "sparse-canvas",
            "canvases=to_images(cells, images.shape[1], grid),",
            "canvases=images,",
            "Finished patches of a canvas drift after they left.",
            f"{REBIRTH}::test_works_with",
        ),
    ),
    *of_file(
        "smi_fast/inversion/state.py",
        REBIRTH,
        Mutant(
            "state-logits",
            "teacher(images[row], kept[row], lengths=own).logits",
            "teacher(images[row]).logits",
            "The logits are those of every patch.",
            f"{INVERTER}::test_result_shows_kept_patches_and_is_in_range",
        ),
        Mutant(
            "state-finished-logits",
            "return FinishedGroup(self.done(), patches, pixels, self.logits(images, patches))",
            "return FinishedGroup(self.done(), patches, pixels, self.logits(images, self.kept))",
            "The logits of a finished image are those of all patches that were left.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/state.py",
        LOOP,
        Mutant(
            "state-rate",
            "            return shift[0], flip[0]\n",
            "            self._lr = self.settings.lr[:1]\n            return shift[0], flip[0]\n",
            "Every iteration has the learning rate of the first.",
            f"{RATE}::test_an_inversion_is_torchs_optimizer_with_a_schedule",
        ),
        Mutant(
            "state-moving",
            "return self.parameters, self.exp_avg, self.exp_avg_sq, self.iteration",
            "return self.parameters, self.exp_avg, self.iteration",
            "Adam's second moment stays ahead when the loop goes back.",
        ),
        Mutant(
            "state-active",
            "return self.kept if self.settings.freeze_background and sparse else None",
            "return self.kept if sparse else None",
            "A regularized background doesn't move.",
            f"{INVERTER}::test_regularized_background_goes_on_changing",
        ),
        Mutant(
            "state-background",
            "self.background = self.images().clone()",
            "self.background = self.images()",
            "The background is memory of the parametrization.",
            f"{PARAMETRIZATIONS}::test_images_may_be_memory_of_the_parameters",
        ),
        Mutant(
            "state-frozen",
            "return images.over(self.background, self.frozen)",
            "return images",
            "Under jitter kept windows show stopped pixels as the parameters now have them.",
            f"{SIGMOID}::test_a_run_is_that_on_whole_images",
        ),
        Mutant(
            "state-background-kept",
            "return torch.where(mask, self.background, images)",
            "return images",
            "Stopped pixels go on changing.",
            f"{PARAMETRIZATIONS}::test_stopped_pixels_stay_as_they_were_at_their_stop",
        ),
        Mutant(
            "state-finished",
            "            settings.space.denormalize(images),",
            "            images,",
            "Finished patches are normalised.",
            GROUPS,
        ),
        Mutant(
            "state-step",
            "step = self.iteration if self._begun is None else self.iteration - self._begun",
            "step = self.iteration + 1",
            "Adam's bias correction is one iteration ahead.",
            f"{INVERTER}::test_dense_run_is_the_plain_loop",
        ),
        Mutant(
            "state-save",
            "copies = [tensor.clone() for tensor in self._moving]",
            "copies = list(self._moving)",
            "Going back goes nowhere.",
        ),
        Mutant(
            "state-non-finite",
            "row = torch.stack([*seen.augmented, *seen.values, gradient.sum()])",
            "row = torch.stack([*seen.augmented, *seen.values, gradient.sum() * 0])",
            "An infinite gradient is reported, but a huge one too.",
            LOOP,
            "a gradient times zero is NaN exactly where the gradient isn't finite",
        ),
        Mutant(
            "state-generator",
            "self.generator.set_state(saved[-1])",
            "pass",
            "A repeated iteration draws other numbers.",
            f"{VIEWS}::test_going_back_also_takes_back_what_was_drawn",
        ),
    ),
    *of_file(
        "smi_fast/inversion/settings.py",
        LOOP,
        Mutant(
            "settings-due",
            "number % objective.every == 0 for objective",
            "True for objective",
            "A graph serves iterations that evaluate other objectives.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/views.py",
        VIEWS,
        Mutant(
            "views-early-exit",
            "if not inputs.score and settings.finish is None and not _logits_are_read(pairs):",
            "if False:",
            "Every block runs, whatever the loss reads.",
            "tests/teacher/test_early_exit.py::test_a_loss_runs_the_blocks_that_it_reads",
        ),
        Mutant(
            "views-due-logits",
            "any(due and objective.reads_logits",
            "any(objective.reads_logits",
            "An objective that isn't due makes every block run.",
            "tests/teacher/test_early_exit.py",
        ),
        Mutant(
            "views-weight",
            "else constant(given, value)",
            "else constant(1, value)",
            "Weights are not read.",
            f"{INVERTER}::test_dense_run_is_the_plain_loop",
        ),
        Mutant(
            "views-share",
            "values = [value * (len(own) / batch) for value in values]",
            "pass",
            "The parts of a split batch weigh more than the whole.",
        ),
        Mutant(
            "views-first",
            "rows=own_rows,\n            iteration=",
            "rows=slice(0, len(own)),\n            iteration=",
            "Every part reads what was drawn for the first.",
        ),
        Mutant(
            "views-through",
            "gradient = through if gradient is None else gradient + through",
            "gradient = through",
            "With augment the pixel objectives have no gradient.",
        ),
        Mutant(
            "views-copy",
            "jitter = inputs.shift[index], inputs.flip[index]",
            "jitter = inputs.shift[0], inputs.flip[0]",
            "All copies have the jitter of the first.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/loop.py",
        LOOP,
        Mutant(
            "loop-saved",
            "first, saved = number, state.save()",
            "first = number",
            "After a NaN the loop goes back to the start of the phase, and repeats too few.",
        ),
        Mutant(
            "loop-restore",
            "self._state.restore(saved)",
            "pass",
            "After a NaN the loop repeats iterations from where it is.",
        ),
        Mutant(
            "loop-interrupt",
            "except KeyboardInterrupt:\n                self._settle(first, saved)",
            "except KeyboardInterrupt:\n                pass",
            "An interrupted run gives back images after a NaN.",
        ),
        Mutant(
            "loop-score",
            "score=number + 1 in self._stops, number=number)\n        name",
            "score=number in self._stops, number=number)\n        name",
            "The stop itself scores importance, after it was needed.",
            f"{INVERTER}::test_stops_keep_the_most_important_patches",
        ),
        Mutant(
            "loop-order",
            "        if name is not None:\n"
            "            raise NonFinite(name)\n"
            "        state.update(found.parameters)",
            "        state.update(found.parameters)\n"
            "        if name is not None:\n"
            "            raise NonFinite(name)",
            "The images of a failed run are NaN.",
            f"{INVERTER}::test_non_finite_loss_stops_with_the_last_finite_images",
        ),
        Mutant(
            "loop-last-check",
            "check = min(first + CHECK_EVERY, iterations.stop)",
            "check = first + CHECK_EVERY",
            "The last iterations of a phase are not checked.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/view_inputs.py",
        f"{INVERTER}::test_no_jitter_around_stops",
        Mutant(
            "inputs-flip",
            "shift[still], flip[still] = 0, False",
            "shift[still] = 0",
            "Images are mirrored around stops.",
        ),
        Mutant(
            "inputs-copy",
            "shift, flip = shift.to(teacher.device, copy=True), flip.to(teacher.device, copy=True)",
            "shift, flip = shift.to(teacher.device), flip.to(teacher.device)",
            "The jitter of the caller changes.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/inputs.py",
        f"{INVERTER}::test_no_jitter_around_stops",
        Mutant(
            "inputs-std",
            'if name == "std" and (values <= 0).any():',
            'if name == "std" and (values < 0).any():',
            "A std of zero is taken.",
            "tests/inversion/test_inputs.py::test_bad_options_are_refused",
        ),
    ),
    *of_file(
        "smi_fast/inversion/inverter.py",
        INVERTER,
        Mutant(
            "inverter-refresh",
            "        self.teacher.refresh()\n",
            "",
            "An inversion takes over what was folded from other weights.",
            "tests/teacher/test_weights.py::test_every_inversion_starts_with_a_refresh",
        ),
        Mutant(
            "inverter-check",
            "state.keep(check(selection, stop, count, ragged=ragged))",
            "state.keep(selection)",
            "The answer of a schedule is not checked.",
            f"{GROUPS}::test_a_broken_promise_ends_the_inversion",
        ),
        Mutant(
            "inverter-past-the-end",
            "if last >= iterations:",
            "if last > iterations:",
            "A stop after the last iteration is taken and never comes.",
            "tests/inversion/test_inputs.py::test_bad_options_are_refused",
        ),
    ),
    *of_file(
        "smi_fast/inversion/sparse_images.py",
        f"{INVERTER}::test_soft_targets",
        Mutant(
            "result-confidence",
            "targets if one_each else targets.argmax(1)",
            "targets if one_each else targets.argmin(1)",
            "Confidence with soft targets is that of another class.",
        ),
    ),
    *of_file(
        "smi_fast/background.py",
        "tests/test_background.py",
        Mutant(
            "background-mean",
            "return mean\n",
            "return mean.mean(0, keepdim=True)\n",
            "The mean colour is that of the batch.",
        ),
        Mutant(
            "background-blur",
            "shown = (pixels * inside)",
            "shown = (pixels * (inside | True))",
            "The background shows pixels of stopped patches.",
        ),
    ),
)
