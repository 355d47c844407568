"""Mutants of smi_fast/objectives/."""

from tests.mutants.mutant import Mutant, of_file

OBJECTIVES = "tests/objectives"
PIXELS = f"{OBJECTIVES}/test_pixel_objectives.py"
BATCH_NORM = f"{OBJECTIVES}/test_batch_norm.py"
TARGETS = f"{OBJECTIVES}/test_targets.py"
VALUES = f"{OBJECTIVES}/test_every_objective.py"
STATISTICS = f"{OBJECTIVES}/test_token_statistics.py"

MUTANTS = (
    *of_file(
        "smi_fast/objectives/adversarial.py",
        f"{OBJECTIVES}/test_adversarial.py",
        Mutant(
            "adversarial-clamp",
            "middle = (0.5 * (p + q)).clamp(SMALLEST, LARGEST)",
            "middle = 0.5 * (p + q)",
            "The mean of the probabilities isn't clamped.",
        ),
        Mutant(
            "adversarial-jitter",
            "self.student(inputs.jittered)",
            "self.student(inputs.images)",
            "The student sees images without jitter.",
        ),
        Mutant(
            "adversarial-bounded",
            "return 1 - js.clamp(0, 1) if self.bounded else -js",
            "return 1 - js.clamp(0, 1)",
            "bounded=False is not read.",
        ),
    ),
    *of_file(
        "smi_fast/objectives/attention_prior.py",
        f"{OBJECTIVES}/test_attention_prior.py",
        Mutant(
            "prior-normalised",
            "target = target / target.sum(2, keepdim=True)",
            "target = target / 1",
            "The mixture at kept patches doesn't sum to one.",
        ),
        Mutant(
            "prior-depth",
            "(teacher.depth - len(names) + index + 1) / teacher.depth",
            "(index + 1) / teacher.depth",
            "Blocks count as if they were the first ones.",
        ),
        Mutant(
            "prior-count",
            "(torch.arange(components) < count)",
            "(torch.arange(components) <= count)",
            "Mixtures have one component more than was drawn.",
        ),
    ),
    *of_file(
        "smi_fast/objectives/embedding_target.py",
        f"{OBJECTIVES}/test_embedding_target.py",
        Mutant(
            "embedding-rows",
            "wanted = inputs.rows_of(wanted)",
            "wanted = wanted[: len(found)]",
            "Each part of a split batch takes the embeddings of the first.",
        ),
        Mutant(
            "embedding-angle",
            "return (2 * half.square()).mean()",
            "return half.square().mean()",
            "The spherical distance is half of itself.",
        ),
        Mutant(
            "embedding-coupled",
            'self.separable = distance != "infonce"',
            "self.separable = True",
            "A batch with infonce is split, so that other images are missing.",
        ),
        Mutant(
            "embedding-finite",
            "if not bool(given.isfinite().all()):",
            "if False:",
            "An embedding that is NaN is taken.",
        ),
    ),
    *of_file(
        "smi_fast/objectives/neuron_target.py",
        f"{OBJECTIVES}/test_neuron_target.py",
        Mutant(
            "neuron-prefix",
            "else slice(prefix, None)",
            "else slice(0, None)",
            "The class token counts as a patch.",
        ),
        Mutant(
            "neuron-rows",
            "inputs.rows_of(self._neurons)",
            "self._neurons[: len(inputs.kept)]",
            "Each part of a split batch takes the neurons of the first.",
        ),
        Mutant(
            "neuron-direction",
            "F.normalize(neurons, dim=1)",
            "neurons",
            "The length of a direction matters.",
        ),
        Mutant(
            "neuron-logits",
            "    reads_logits = False\n",
            "",
            "A loss of the first block runs all of them.",
            "tests/teacher/test_early_exit.py",
        ),
    ),
    *of_file(
        "smi_fast/objectives/batch_norm.py",
        BATCH_NORM,
        Mutant(
            "batch-norm-first",
            "factor = 1.0 if replaced else first_weight",
            "factor = 1.0",
            "The first layer has no weight of its own.",
        ),
        Mutant(
            "batch-norm-every",
            "torch.stack(self._record.distances).sum() * self.every",
            "torch.stack(self._record.distances).sum()",
            "An objective that is evaluated seldom counts less.",
        ),
        Mutant(
            "batch-norm-space",
            "scale, offset = space.std / self._std,",
            "scale, offset = self._std / space.std,",
            "The CNN sees another contrast.",
        ),
        Mutant(
            "batch-norm-act",
            "self.act = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()",
            "self.act = nn.Identity()",
            "The activation of timm's BatchNorm is left out.",
        ),
    ),
    *of_file(
        "smi_fast/objectives/classification.py",
        VALUES,
        Mutant(
            "binary-targets",
            "F.binary_cross_entropy_with_logits(inputs.logits, inputs.targets)",
            "F.binary_cross_entropy_with_logits(inputs.logits, 1 - inputs.targets)",
            "The wanted classes are avoided.",
            TARGETS,
        ),
        Mutant(
            "cross-entropy",
            "return cross_entropy(inputs.logits, inputs.targets, inputs.backend)",
            "return 2 * cross_entropy(inputs.logits, inputs.targets, inputs.backend)",
            "Cross-entropy is twice the mean.",
            "tests/inversion/test_inverter.py::test_dense_run_is_the_plain_loop",
        ),
        Mutant(
            "targets-range",
            "not 0 <= int(targets.min()) <= int(targets.max()) < classes:",
            "not 0 <= int(targets.min()) <= int(targets.max()) <= classes:",
            "The class after the last is taken.",
            "tests/inversion/test_inputs.py::test_bad_arguments_are_refused",
        ),
    ),
    *of_file(
        "smi_fast/objectives/gaussian_similarity.py",
        f"{OBJECTIVES}/test_gaussian_similarity.py",
        Mutant(
            "gaussian-turn",
            "turn = (turn + inputs.iteration_tensor * count) % kept",
            "turn = (turn + inputs.iteration_tensor) % kept",
            "An iteration takes the patches of the last one again.",
        ),
        Mutant(
            "gaussian-entropy",
            "math.log(2 * math.pi * math.e)",
            "math.log(2 * math.pi)",
            "The entropy lacks a constant.",
        ),
    ),
    *of_file(
        "smi_fast/objectives/head_similarity.py",
        f"{OBJECTIVES}/test_head_similarity.py",
        Mutant(
            "head-variance",
            "(variance + variance.mT + CONTRAST)",
            "(variance + CONTRAST)",
            "SSIM divides by the variance of one map.",
        ),
        Mutant(
            "head-square",
            "return (1 - ssim.square()).mean()",
            "return (1 - ssim).mean()",
            "The similarity isn't squared.",
        ),
    ),
    *of_file(
        "smi_fast/objectives/patch_similarity.py",
        f"{OBJECTIVES}/test_patch_similarity.py",
        Mutant(
            "similarity-diagonal",
            "2 * kernel.sum((2, 3)) - kernel[..., :rows].sum((2, 3))",
            "2 * kernel.sum((2, 3))",
            "Pairs in the square on the diagonal count twice.",
        ),
        Mutant(
            "similarity-ends",
            "width[0] = width[-1] = spacing / 2",
            "width[0] = spacing / 2",
            "The last point of the trapezoid counts whole.",
        ),
        Mutant(
            "similarity-gradient",
            "result[:, start + rows :] += rest",
            "pass",
            "Pairs above the diagonal have half of their gradient.",
        ),
        Mutant(
            "similarity-prefix",
            "[:, inputs.teacher.num_prefix_tokens :].mean(2)",
            "[:, 1:].mean(2)",
            "Register tokens count as patches.",
        ),
    ),
    *of_file(
        "smi_fast/objectives/pixels.py",
        PIXELS,
        Mutant(
            "variation-norm",
            "images, active, self.norm, patch_size",
            'images, active, "l2", patch_size',
            "norm is not read.",
            "tests/inversion/test_inverter.py::test_l2_norm_and_l1_variation_are_recorded",
        ),
        Mutant(
            "variation-active",
            "images, active, self.norm,",
            "images, None, self.norm,",
            "Frozen pixels count in total variation.",
        ),
        Mutant(
            "l2-per-image",
            "if not self.per_image:",
            "if self.per_image:",
            "The norm of the batch and that of each image are swapped.",
        ),
        Mutant(
            "l2-active",
            "if inputs.active is not None:\n            # Made",
            "if False:\n            # Made",
            "Frozen pixels count in the norm.",
            "tests/inversion/test_inverter.py tests/objectives",
        ),
        Mutant(
            "seams-mask",
            "below, beside = mask[:, :, 1:] | mask[:, :, :-1],",
            "below, beside = mask[:, :, 1:] & mask[:, :, :-1],",
            "Seams beside frozen patches don't count.",
        ),
        Mutant(
            "target-size",
            "math.sqrt(values / PUBLISHED_VALUES)",
            "(values / PUBLISHED_VALUES)",
            "The target grows with the number of pixels.",
        ),
    ),
    *of_file(
        "smi_fast/objectives/token_statistics.py",
        STATISTICS,
        Mutant(
            "tokens-prefix",
            "inputs.taps[name][:, inputs.teacher.num_prefix_tokens :]",
            "inputs.taps[name]",
            "The class token counts as a patch.",
        ),
        Mutant(
            "tokens-join",
            "fraction * (1 - fraction) * apart.square()",
            "fraction * apart.square()",
            "The variance of several batches is too large.",
        ),
    ),
    *of_file(
        "smi_fast/objectives/targets.py",
        TARGETS,
        Mutant(
            "targets-low",
            "drawn = low + (high - low) * share",
            "drawn = high * share",
            "The logits of wanted classes start at zero.",
        ),
    ),
    *of_file(
        "smi_fast/objectives/base.py",
        "tests/inversion/test_inputs.py::test_bad_options_are_refused",
        Mutant(
            "objectives-names",
            "if not names or len(set(names)) < len(names):",
            "if not names:",
            "Two objectives have the same column of the history.",
        ),
        Mutant(
            "objectives-lazy-images",
            "            with torch.enable_grad():\n                images = vars",
            "            if True:\n                images = vars",
            "An objective that reads the images without a gradient cuts off that of the others.",
            "tests/parametrizations/test_sigmoid.py::"
            "test_who_reads_images_without_a_gradient_leaves_them_theirs",
        ),
    ),
)
