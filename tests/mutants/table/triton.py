"""Mutants of kernels/, run by Triton's interpreter."""

from tests.mutants.mutant import Mutant, of_file

TRITON = "tests/backends/triton/test_execution.py::test_error_is_within_its_budget -k"
STEP = "tests/backends/triton/test_execution.py::test_error_of_a_step_is_within_its_budget -k"

MUTANTS = (
    *of_file(
        "kernels/adam_clamp.py",
        f"{TRITON} adam_clamp",
        Mutant(
            "triton-adam-eps",
            "tl.sqrt(v) * root_scale + EPS",
            "tl.sqrt(v) * root_scale",
            "A pixel without gradient becomes NaN.",
        ),
        Mutant(
            "triton-adam-bound",
            "tl.load(high + channel)",
            "tl.load(high)",
            "Every channel takes the upper bound of the first.",
        ),
        Mutant(
            "triton-adam-nan",
            "tl.where(pixels > highest, highest, pixels)",
            "tl.minimum(pixels, highest)",
            "A NaN becomes a bound.",
        ),
        Mutant(
            "triton-adam-correction",
            "_one_minus_power(log_beta2, taken)",
            "_one_minus_power(log_beta1, taken)",
            "The bias correction of the square uses the other beta.",
        ),
        Mutant(
            "triton-adam-decay",
            "(1.0 - eta * weight_decay)",
            "(1.0 - weight_decay)",
            "Pixels decay at the same rate whatever the learning rate is.",
        ),
    ),
    *of_file(
        "kernels/batch_norm_matching.py",
        f"{TRITON} batch_norm",
        Mutant(
            "triton-norm-tile",
            "centred = tl.where(mask, values - own_mean, 0.0)",
            "centred = values - own_mean",
            "Elements that only fill up a tile add to the variance.",
        ),
        Mutant(
            "triton-norm-merge",
            "square + size * (own - joint) * (own - joint)",
            "square",
            "The variance between tiles is lost.",
        ),
    ),
    *of_file(
        "kernels/gather_patches.py",
        f"{TRITON} gather_patches",
        Mutant(
            "triton-patches-rounding",
            "return (2 * shift + P) // (2 * P)",
            "return (2 * shift + P - 1) // (2 * P)",
            "Halves of a patch are rounded down.",
        ),
        Mutant(
            "triton-patches-jitter-of-each",
            "_wrapped(shift + batch * shift_image + shift_axis, WIDTH)\n"
            "    inside = tl.arange(0, BLOCK_P)\n    mirrored = tl.load(flip + batch * flip_image)",
            "_wrapped(shift + batch * shift_image + shift_axis, WIDTH)\n"
            "    inside = tl.arange(0, BLOCK_P)\n    mirrored = tl.load(flip)",
            "The gradient of every image is mirrored as the first image is.",
        ),
        Mutant(
            "triton-patches-zero",
            "mask=mask & (found > 0)[None, :, None], other=0.0)",
            "mask=mask, other=0.0)",
            "Patches that aren't kept have the gradient of another one.",
        ),
        Mutant(
            "triton-patches-landing-cell",
            "tl.where(mirrored, COLUMNS - 1 - column, column)",
            "column",
            "A mirrored patch keeps the position that it had before.",
        ),
    ),
    *of_file(
        "kernels/gather_sigmoid_patches.py",
        f"{TRITON} gather_sigmoid_patches",
        Mutant(
            "triton-sigmoid-patches-frozen-cell",
            "(y // P)[:, None] * COLUMNS + (x // P)[None, :]\n        still",
            "(row * COLUMNS + column)\n        still",
            "A window is frozen as a whole, as the patch is that it lands on.",
        ),
        Mutant(
            "triton-sigmoid-patches-zero",
            "wanted = mask & (found > 0)[None, :, None]",
            "wanted = mask",
            "Patches that aren't kept have the gradient of another one.",
        ),
        Mutant(
            "triton-sigmoid-patches-overflow",
            "tl.exp(-tl.abs(u))",
            "tl.exp(-u)",
            "A pixel that is nearly black has a NaN as its gradient.",
        ),
    ),
    *of_file(
        "kernels/active_variation.py",
        f"{TRITON} total_variation",
        Mutant(
            "triton-active-rim",
            "counted & ((here_active | there_active) != 0)",
            "counted & ((here_active & there_active) != 0)",
            "Differences across the border of an active patch have no gradient.",
        ),
        Mutant(
            "triton-active-twice",
            "counted & (there_active == 0)",
            "counted",
            "Differences between two active patches count twice.",
        ),
        Mutant(
            "triton-active-repeats",
            "tl.where(tl.sum(repeats) > 0, 0, P)",
            "P",
            "A patch that repeats counts again.",
            f"{TRITON} total_variation-repeated",
        ),
        Mutant(
            "triton-active-corner",
            "bit = (3 * below + 4)[:, None] + beside[None, :]",
            "bit = (3 * below + 4)[:, None] + 0 * beside[None, :]",
            "The patch beside a pixel's own is taken for its own.",
        ),
        Mutant(
            "triton-active-mirror",
            "tl.where(tl.load(flip), P - 1 - across, across)",
            "across",
            "The gradient of a mirrored window isn't mirrored back.",
            f"{STEP} pixel_gradient",
        ),
        Mutant(
            "triton-active-window",
            "lower = (y % P + inside >= P)[:, None]",
            "lower = (y % P + inside < 0)[:, None]",
            "All windows of a patch are taken for the upper ones.",
            f"{STEP} pixel_gradient",
        ),
        Mutant(
            "triton-active-bits",
            "    return a | b\n",
            "    return a + b\n",
            "A patch that repeats is taken for another one.",
            f"{TRITON} total_variation_backward-repeated",
        ),
    ),
    *of_file(
        "kernels/total_variation.py",
        f"{TRITON} total_variation",
        Mutant(
            "triton-variation-norm",
            "tl.where(norm > 0, tl.load(grad_l2) / norm, 0.0)",
            "tl.load(grad_l2) / norm",
            "A constant image has a NaN as its gradient.",
        ),
    ),
    *of_file(
        "kernels/gather_attention.py",
        f"{TRITON} gather_attention",
        Mutant(
            "triton-attention-rest",
            "tl.where(exists[:, None], result, 0.0),",
            "result,",
            "Rows after the length of an image aren't zero.",
        ),
        Mutant(
            "triton-attention-written",
            "written = K if token_index is None else length",
            "written = K",
            "A row after the length writes over the row of an earlier token.",
        ),
    ),
    *of_file(
        "kernels/_sdpa.py",
        f"{TRITON} gather_attention",
        Mutant(
            "triton-sdpa-importance",
            "row = scores.masked_fill(~valid, -torch.inf).softmax(-1)",
            "row = scores.softmax(-1)",
            "Tokens after the length take a part of the importance.",
            "tests/backends/triton/test_sdpa.py",
        ),
    ),
)
