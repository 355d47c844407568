"""Mutants of csrc/cuda/, run by the emulation on the CPU."""

from tests.mutants.mutant import Mutant, of_file

EMULATION = "tests/backends/cuda/test_emulation.py"
BUDGET = f"{EMULATION}::test_error_is_within_its_budget -k"
OUTSIDE = f"{EMULATION}::test_patches_outside_of_the_grid"

MUTANTS = (
    *of_file(
        "csrc/cuda/adam_clamp.cu",
        f"{BUDGET} adam_clamp",
        Mutant(
            "cuda-adam-eps",
            "corrections.second + kEps)",
            "corrections.second)",
            "A pixel without gradient becomes NaN.",
        ),
        Mutant(
            "cuda-adam-bound",
            "high = to_float(pixels.high[channel])",
            "high = to_float(pixels.high[0])",
            "Every channel takes the upper bound of the first.",
        ),
        Mutant(
            "cuda-adam-nan",
            "value = value < low ? low : value > high ? high : value;",
            "value = fminf(fmaxf(value, low), high);",
            "A NaN becomes a bound.",
            f"{EMULATION}::test_adam_clamp_lets_nan_through",
        ),
        Mutant(
            "cuda-adam-correction",
            "sqrtf(-expm1f(t * rates.log_second))",
            "sqrtf(-expm1f(t * rates.log_first))",
            "The bias correction of the square uses the other beta.",
        ),
        Mutant(
            "cuda-adam-decay",
            "1.0f - rate * rates.weight_decay",
            "1.0f - rates.weight_decay",
            "Pixels decay at the same rate whatever the learning rate is.",
        ),
        Mutant(
            "cuda-adam-outside",
            "if (patch < 0 || patch >= rows * columns) return;",
            "if (patch < 0 || patch > rows * columns) return;",
            "The patch after the last is written.",
            OUTSIDE,
        ),
    ),
    *of_file(
        "csrc/cuda/batch_norm_matching.cu",
        f"{BUDGET} batch_norm",
        Mutant(
            "cuda-norm-centre",
            "squares / count - centered * centered",
            "squares / count",
            "The variance is taken around the recorded mean.",
        ),
        Mutant(
            "cuda-norm-splits",
            "for (int64_t split = channel * splits; split < (channel + 1) * splits; ++split)",
            "for (int64_t split = channel * splits; split < channel * splits + 1; ++split)",
            "The statistics are those of the first block of pixels.",
        ),
    ),
    *of_file(
        "csrc/cuda/patch_window.cuh",
        f"{BUDGET} gather_patches",
        Mutant(
            "cuda-patches-rounding",
            "/ columns + (2 * down + side) / (2 * side)) % rows;",
            "/ columns + (2 * down + side - 1) / (2 * side)) % rows;",
            "Halves of a patch are rounded down.",
        ),
        Mutant(
            "cuda-patches-negative",
            "rest < 0 ? rest + size : rest",
            "rest",
            "A negative shift reads outside of the image.",
        ),
        Mutant(
            "cuda-patches-jitter-of-each",
            "jitter.shift + image * jitter.shift_image",
            "jitter.shift",
            "Every image is shifted as the first is.",
        ),
        Mutant(
            "cuda-patches-outside",
            "if (patch < 0 || patch >= rows * columns) return;",
            "if (patch < 0 || patch > rows * columns) return;",
            "The patch after the last is read as the first.",
            OUTSIDE,
        ),
    ),
    *of_file(
        "csrc/cuda/gather_patches.cu",
        f"{BUDGET} gather_patches",
        Mutant(
            "cuda-patches-zero",
            "const cudaError_t error = cudaMemsetAsync(grad_images, 0, elements * element_bytes, "
            "stream);",
            "const cudaError_t error = cudaMemsetAsync(grad_images, 0, 0, stream);",
            "Patches that aren't kept have a gradient of whatever was in memory.",
        ),
    ),
    *of_file(
        "csrc/cuda/gather_sigmoid_patches.cu",
        f"{BUDGET} gather_sigmoid_patches",
        Mutant(
            "cuda-sigmoid-patches-frozen-of-each",
            "if (frozen) frozen += image * patches_of(shape);\n"
            "  for (int i = threadIdx.x; i < elements; i += kPatchThreads) {\n    float value",
            "for (int i = threadIdx.x; i < elements; i += kPatchThreads) {\n    float value",
            "Every image freezes the patches of the first.",
        ),
        Mutant(
            "cuda-sigmoid-patches-overflow",
            "expf(-fabsf(to_float(field[pixel])))",
            "expf(-to_float(field[pixel]))",
            "A pixel that is nearly black has a NaN as its gradient.",
        ),
        Mutant(
            "cuda-sigmoid-patches-deviation",
            "* to_float(std[place.channel]));",
            "* to_float(std[0]));",
            "Every channel takes the deviation of the first.",
        ),
    ),
    *of_file(
        "csrc/cuda/total_variation.cu",
        f"{BUDGET} total_variation",
        Mutant(
            "cuda-variation-outside",
            "active[i] >= patches) return;",
            "active[i] > patches) return;",
            "A patch after the last writes past the mask.",
            f"{EMULATION}::test_short_selection_is_clean[memory]",
        ),
        Mutant(
            "cuda-variation-mask",
            "(other_is_active || active(y, x))",
            "(other_is_active && active(y, x))",
            "Differences across the border of an active patch don't count.",
        ),
        Mutant(
            "cuda-variation-norm",
            "norm > 0.0f ? *grad_l2 / norm : 0.0f",
            "*grad_l2 / norm",
            "A constant image has a NaN as its gradient.",
        ),
        Mutant(
            "cuda-variation-plane",
            "this->mask += plane / static_cast<unsigned>(shape.channels) * patches;",
            "this->mask += plane * 0u * patches;",
            "Every image has the active patches of the first.",
        ),
    ),
    *of_file(
        "csrc/cuda/gather_attention_fwd.cu",
        f"{BUDGET} gather_attention",
        Mutant(
            "cuda-attention-importance",
            "if (lengths == nullptr || token < lengths[image]) {",
            "if (true) {",
            "Tokens after the length of an image have the importance of whatever was in memory.",
        ),
        Mutant(
            "cuda-attention-zero",
            "const cudaError_t error = cudaMemsetAsync(out, 0, elements * bytes_of(type), stream);",
            "const cudaError_t error = cudaMemsetAsync(out, 0, 0, stream);",
            "Rows after the length of an image are not written.",
        ),
    ),
    *of_file(
        "csrc/cuda/gather_attention_bwd.cu",
        f"{BUDGET} gather_attention_backward",
        Mutant(
            "cuda-attention-padding",
            "log_sums[row] = row < tokens.count ? log_sum[half] : INFINITY;",
            "log_sums[row] = log_sum[half];",
            "Queries that only fill up a tile add to the gradient of keys.",
            equivalent="the gradient and the query of such a row are zero, so it adds zero",
        ),
        Mutant(
            "cuda-attention-mean",
            "mean[half] = quad_sum(weighted[half]) / sum;",
            "mean[half] = quad_sum(weighted[half]);",
            "The mean of dP isn't divided by the sum of exponentials.",
        ),
    ),
)
