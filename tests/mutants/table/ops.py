"""Mutants of smi_fast/ops/ and smi_fast/jitter.py."""

from tests.mutants.mutant import Mutant, of_file

ADAM = "tests/ops/test_adam_clamp.py::test_adam_clamp_is_a_step_of_torch_and_a_clamp"
ACTIVE = "tests/ops/test_adam_clamp.py::test_adam_clamp_touches_active_patches_only"
WINDOWS = "tests/ops/test_gather_patches.py::test_patch_sizes_and_rectangles"
LENGTHS = "tests/ops/test_gather_attention.py::test_lengths_equal_shorter_sequences"
ATTENTION_GRADIENT = "tests/ops/test_gather_attention.py::test_gradient"
VARIATION = "tests/ops/test_total_variation.py"
NORM = "tests/ops/test_batch_norm_matching.py"
BACKENDS = "tests/ops/test_backends.py"

MUTANTS = (
    *of_file(
        "smi_fast/ops/reference.py",
        ADAM,
        Mutant(
            "reference-adam-eps",
            "(1 - beta2**taken) ** 0.5).add_(ADAM_EPS)",
            "(1 - beta2**taken) ** 0.5)",
            "A pixel without gradient becomes NaN.",
        ),
        Mutant(
            "reference-adam-correction",
            "(-lr / (1 - beta1**taken))",
            "(-lr / (1 - beta2**taken))",
            "The bias correction of the mean uses the other beta.",
        ),
        Mutant(
            "reference-adam-decay",
            "pixels.mul_(1 - lr * weight_decay)",
            "pixels.mul_(1 - weight_decay)",
            "Pixels decay at the same rate whatever the learning rate is.",
        ),
        Mutant(
            "reference-adam-columns",
            "active % columns,",
            "active // columns,",
            "Other patches than the active ones move.",
            ACTIVE,
        ),
        Mutant(
            "reference-attention-rows",
            "masked_fill(~(valid & valid.transpose(-2, -1)), 0.0)",
            "masked_fill(~valid, 0.0)",
            "Rows after the length of an image aren't zero.",
            LENGTHS,
        ),
        Mutant(
            "reference-importance",
            "return out, probabilities[:, :, :1].mean(dim=(1, 2))",
            "return out, probabilities[:, :1].mean(dim=(1, 2))",
            "Importance is averaged over the queries of the first head.",
            "tests/ops/test_gather_attention.py::"
            "test_importance_is_the_first_row_averaged_over_heads",
        ),
        Mutant(
            "reference-attention-gradient",
            "(weighted - probabilities * weighted.sum(-1, keepdim=True))",
            "weighted",
            "The softmax has the gradient of a plain product.",
            ATTENTION_GRADIENT,
        ),
        Mutant(
            "reference-variation-mask",
            "return here | there",
            "return here & there",
            "Differences across the border of an active patch don't count.",
            f"{VARIATION}::test_total_variation_of_kept_patches_counts_pairs_one_by_one",
        ),
        Mutant(
            "reference-variation-norm",
            "torch.where(norm > 0, grad_l2 / norm, 0.0)",
            "grad_l2 / norm",
            "A constant image has a NaN as its gradient.",
            f"{VARIATION}::test_total_variation_of_a_constant_has_gradient_zero",
        ),
        Mutant(
            "reference-norm-correction",
            "correction=0",
            "correction=1",
            "The variance is the unbiased one.",
            NORM,
        ),
        Mutant(
            "reference-norm-slope",
            "(grad * scale + offset + slope * x)",
            "(grad * scale + offset)",
            "The loss of the variance has no gradient.",
            NORM,
        ),
    ),
    *of_file(
        "smi_fast/ops/grid.py",
        WINDOWS,
        Mutant(
            "grid-rounding",
            "torch.div(2 * shift + patch_size, 2 * patch_size",
            "torch.div(2 * shift + patch_size - 1, 2 * patch_size",
            "Halves are rounded down, where the kernels round them up.",
            "tests/ops/test_gather_patches.py::"
            "test_window_gather_is_roll_flip_unfold_gather_for_every_shift",
        ),
        Mutant(
            "grid-landing-cell",
            "torch.where(mirrored, columns - 1 - column, column)",
            "column",
            "A mirrored patch keeps the position that it had before.",
        ),
        Mutant(
            "grid-mirror",
            "torch.where(mirrored, patch_size - 1 - inside, inside)",
            "inside",
            "A mirrored patch is read from left to right.",
        ),
        Mutant(
            "grid-pixel-mask",
            "patch_mask(kept, height // patch_size, width // patch_size)",
            "patch_mask(kept, width // patch_size, height // patch_size)",
            "The mask of an image that isn't square has its sides swapped.",
            "tests/teacher/test_sparse_vit.py::test_pixel_mask_is_of_the_kept_patches",
        ),
    ),
    *of_file(
        "smi_fast/ops/backends.py",
        BACKENDS,
        Mutant(
            "backends-preference",
            "for backend in _ORDER[op]:",
            "for backend in BACKENDS:",
            "The table of preferences on a GPU is not read.",
        ),
        Mutant(
            "backends-size",
            "if reason is None and attention is not None:",
            "if reason is not None and attention is not None:",
            "A backend is chosen that can't hold the call.",
        ),
        Mutant(
            "backends-old-gpus",
            "if major < 8:",
            "if major < 7:",
            "The CUDA kernels are chosen on GPUs that they are not built for.",
        ),
        Mutant(
            "backends-environment",
            "return check_name(DEFAULT if name == AUTO else name)",
            "return check_name(name)",
            "SMI_FAST_BACKEND is not read.",
            "tests/ops/test_registration.py::test_backend_of_the_environment_is_used",
        ),
        Mutant(
            "backends-named",
            "if wanted in (AUTO, backend.name):",
            "if wanted:",
            "A backend that was asked for by name is silently replaced.",
        ),
        Mutant(
            "backends-float64",
            'and (op, dtype) != ("gather_patches", torch.float64)',
            "and dtype != torch.float64",
            "float64 is sent to CUDA kernels that don't take it.",
        ),
    ),
    *of_file(
        "smi_fast/ops/limits.py",
        BACKENDS,
        Mutant(
            "limits-gradient",
            "4 * row + 8 if gradient",
            "4 * row if gradient",
            "The two floats of each token in backward are not counted.",
        ),
        Mutant(
            "limits-most",
            "if size.tokens <= most:",
            "if size.tokens < most:",
            "The largest call that fits is sent elsewhere.",
        ),
    ),
    *of_file(
        "smi_fast/ops/adam_clamp.py",
        "tests/engine/test_autograd.py::test_backward_refuses_images_that_adam_has_changed",
        Mutant(
            "adam-version",
            "increment_version([images, *moments])",
            "increment_version([*moments])",
            "Autograd differentiates through images that have changed.",
        ),
    ),
    *of_file(
        "smi_fast/ops/batch_norm_matching.py",
        NORM,
        Mutant(
            "norm-of-the-mean",
            "to_mean - 2 * to_var * mean",
            "to_mean",
            "The gradient of the variance is taken around zero.",
        ),
        Mutant(
            "norm-of-zero",
            "torch.where(norm > 0, difference / norm, 0.0)",
            "difference / norm",
            "Statistics that match exactly have a NaN as their gradient.",
        ),
    ),
    *of_file(
        "smi_fast/ops/gather_attention.py",
        BACKENDS,
        Mutant(
            "attention-size-of-gradient",
            "gradient = qkv.requires_grad and torch.is_grad_enabled()",
            "gradient = False",
            "A backend is chosen that can't hold the gradient.",
            f"{BACKENDS}::test_the_choice_knows_the_size_of_attention",
        ),
    ),
    *of_file(
        "smi_fast/ops/_checks.py",
        "tests/ops/test_gather_patches.py::test_bad_input_is_refused",
        Mutant(
            "checks-width",
            "height % patch_size or width % patch_size",
            "height % patch_size",
            "Images whose width isn't a multiple of the patch size are taken.",
        ),
        Mutant(
            "checks-index",
            "len(index) == len(like) and index.dtype == torch.int64",
            "len(index) == len(like)",
            "Indices of other types reach the kernels.",
        ),
    ),
    *of_file(
        "smi_fast/jitter.py",
        "tests/test_jitter.py",
        Mutant(
            "jitter-direction",
            "device=images.device) - right) % width",
            "device=images.device) + right) % width",
            "Columns move the other way.",
        ),
        Mutant(
            "jitter-gradient",
            "(order.argsort() for order in ctx.saved_tensors)",
            "(order for order in ctx.saved_tensors)",
            "The gradient is jittered once more instead of back.",
        ),
        Mutant(
            "jitter-range",
            "torch.randint(-m, m + 1,",
            "torch.randint(-m, m,",
            "The largest shift is never drawn.",
        ),
        Mutant(
            "jitter-half",
            "return shift, chance < 0.5",
            "return shift, chance < 0.75",
            "Three quarters of the iterations are mirrored.",
        ),
        Mutant(
            "jitter-same-phases",
            "inner = stops if self.starts is None else",
            "inner = stops if self.starts is not None else",
            "The shares of phases and the starts of one's own are confused.",
        ),
    ),
    *of_file(
        "smi_fast/ops/tuning.py",
        "tests/ops/test_tuning.py",
        Mutant(
            "tuning-slowest",
            "best = min(times, key=",
            "best = max(times, key=",
            "The slowest way is taken.",
        ),
        Mutant(
            "tuning-machine",
            'choices = found["choices"] if found["machine"] == self.machine else None',
            'choices = found["choices"]',
            "The times of another GPU decide.",
        ),
        Mutant(
            "tuning-others",
            "kept = {**self.choices, **self._read(says=False)}",
            "kept = self.choices",
            "A process forgets what another one has found.",
        ),
        Mutant(
            "tuning-whole",
            'own = self.path.with_name(f"{self.path.name}.{os.getpid()}")',
            "own = self.path",
            "A process that is killed while it writes leaves half a file.",
        ),
        Mutant(
            "tuning-capture",
            "torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()",
            "False",
            "A capture is broken by one inside of it.",
        ),
        Mutant(
            "tuning-off",
            'return SETTING == "1"',
            "return True",
            "SMI_FAST_TUNE=0 has no effect.",
        ),
        Mutant(
            "tuning-sizes",
            """return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]\"""",
            """return str(value.dtype).removeprefix("torch.")""",
            "What is fastest for one size is taken for all.",
        ),
    ),
    *of_file(
        "smi_fast/ops/backends.py",
        "tests/ops/test_tuning.py",
        Mutant(
            "tuned-in-place",
            "a.clone() if i in changed else a for i, a",
            "a for i, a",
            "Adam takes as many steps as its kernels are timed.",
        ),
        Mutant(
            "tuned-names",
            "if wanted == AUTO and ways > 1 and tuning",
            "if ways > 0 and tuning",
            "A backend that was asked for by name isn't the one that runs.",
        ),
    ),
    *of_file(
        "smi_fast/engine/gpu_steps.py",
        "tests/ops/test_tuning.py",
        Mutant(
            "tuned-products",
            "ways[tuning.fastest(factors[0].device, key, ways)]()",
            "tuning.fastest(factors[0].device, key, ways); function()",
            "The products of the engine are timed, and the shipped way runs.",
        ),
        Mutant(
            "tuned-precision",
            'key = f"{fused} {self.precision} {tuning',
            'key = f"{fused} {tuning',
            "What is fastest in TF32 is taken for float32.",
        ),
    ),
    *of_file(
        "smi_fast/ops/collected.py",
        "tests/ops/test_collected.py",
        Mutant(
            "collected-open",
            "        if not self._open:\n            return False\n",
            "",
            "A gradient that an objective asks for lacks what was collected.",
        ),
        Mutant(
            "collected-sets",
            "            and _are_same(windows.kept, variation.active)\n",
            "",
            "Windows of other patches have no gradient.",
        ),
        Mutant(
            "collected-second",
            "            if self._windows is not None:\n                return False\n",
            "",
            "Of two sets of gathered patches only one has a gradient.",
        ),
        Mutant(
            "collected-rest",
            "(*self._of_parts(), rest)",
            "(*self._of_parts(),)",
            "Objectives other than the collected ones have no gradient.",
        ),
    ),
)
