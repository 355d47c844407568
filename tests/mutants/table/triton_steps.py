"""Mutants of the steps of the engine in kernels/, run by Triton's interpreter."""

from tests.mutants.mutant import Mutant, of_file

EXECUTION = "tests/backends/triton/test_execution.py"
ROWS = "tests/backends/triton/test_engine.py::test_first_rows_are_those_of_the_block -k float32"
STEP = f"{EXECUTION}::test_error_of_a_step_is_within_its_budget -k"

MUTANTS = (
    *of_file(
        "kernels/engine_steps.py",
        f"{STEP} normalize",
        Mutant(
            "triton-steps-padding",
            "centred = tl.where(exists, values - mean[:, None], 0.0)",
            "centred = values - mean[:, None]",
            "Columns that only fill up a tile add to the variance.",
        ),
        Mutant(
            "triton-steps-overflow",
            'tl.where(variance < float("inf"), tl.rsqrt(variance + eps), float("nan"))',
            "tl.rsqrt(variance + eps)",
            "A variance that overflows gives zeros instead of NaN.",
            f"{EXECUTION}::test_a_variance_that_overflows_shows",
        ),
        Mutant(
            "triton-steps-residual",
            "        tl.store(out + at, values, mask=exists)\n    centred",
            "        pass\n    centred",
            "The residual stream lacks what a block adds.",
        ),
        Mutant(
            "triton-steps-slope",
            "change = d - n * slope[:, None]",
            "change = d",
            "LayerNorm has the gradient of a subtraction of the mean.",
        ),
        Mutant(
            "triton-steps-rms",
            "    if CENTRED:\n        mean = tl.sum(d, 1) / D",
            "    if True:\n        mean = tl.sum(d, 1) / D",
            "RMSNorm has the gradient of LayerNorm.",
        ),
        Mutant(
            "triton-steps-copy",
            "tl.store(copy + at, total, mask=exists)",
            "tl.store(copy + at, total - d, mask=exists)",
            "Products read another gradient than the one that is added to.",
        ),
        Mutant(
            "triton-steps-gelu",
            "DENSITY_AT_ZERO * tl.exp(-0.5 * y * y)",
            "DENSITY_AT_ZERO * tl.exp(-y * y)",
            "The derivative of GELU has too narrow a density.",
            f"{STEP} gelu",
        ),
        Mutant(
            "triton-steps-cubic",
            "(SLOPE * (1.0 + 3.0 * CUBIC * y * y))",
            "SLOPE",
            "The derivative of GELU by tanh is that of quick GELU.",
            f"{STEP} gelu",
        ),
        Mutant(
            "triton-steps-columns",
            "exists = (row < ROWS)[:, None] & (column < F)[None, :]\n    return",
            "exists = (row < ROWS)[:, None] & (column >= 0)[None, :]\n    return",
            "Columns past the last one are those of the next row.",
            f"{STEP} gelu",
        ),
        Mutant(
            "triton-steps-end",
            "exists = at < ELEMENTS",
            "exists = at >= 0",
            "The last program goes on behind the end.",
            f"{STEP} multiply",
        ),
    ),
    *of_file(
        "kernels/engine_products.py",
        f"{STEP} linear_gelu",
        Mutant(
            "triton-products-inner",
            "real = inner < K - start",
            "real = inner < K",
            "A product goes on into the next row.",
        ),
        Mutant(
            "triton-products-bias",
            "tl.load(bias + column, mask=column < F, other=0.0)",
            "tl.load(bias + column % BLOCK_F, mask=column < F, other=0.0)",
            "Every tile of columns has the bias of the first.",
        ),
        Mutant(
            "triton-products-strides",
            "        stride_k,\n        stride_f,\n        ROWS,\n        K,",
            "        stride_f,\n        stride_k,\n        ROWS,\n        K,",
            "The gradient passes through the transpose of the weights.",
            f"{STEP} multiplied",
        ),
        Mutant(
            "triton-products-factors",
            "product *= tl.load(factors + at,",
            "product += tl.load(factors + at,",
            "The derivative of GELU is added.",
            f"{STEP} multiplied",
        ),
        Mutant(
            "triton-products-precision",
            '"tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"',
            '"tf32"',
            "Products of float32 are always TF32.",
        ),
        Mutant(
            "triton-products-always-ieee",
            '"tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"',
            '"ieee"',
            "Tensor cores are never used for float32.",
            f"{EXECUTION}::test_products_follow_the_precision_of_torch",
        ),
    ),
    *of_file(
        "kernels/attend_rows.py",
        f"{STEP} attend_rows",
        Mutant(
            "triton-rows-largest",
            "total = total * tl.exp2(largest - larger) + tl.sum",
            "total = total + tl.sum",
            "The sum of earlier tiles isn't scaled to the new largest score.",
        ),
        Mutant(
            "triton-rows-end",
            'return tl.where(start + tl.arange(0, BLOCK_N) < N, scores, -float("inf"))',
            "return scores",
            "Tokens past the last one take a share.",
        ),
        Mutant(
            "triton-rows-bias",
            "values + tl.load(q_bias + channel, mask=real, other=0.0)",
            "values",
            "Queries lack their bias.",
        ),
        Mutant(
            "triton-rows-sums",
            "tl.sum(tl.where(query == r, sums, 0.0), 0)",
            "tl.sum(sums, 0)",
            "The gradient of a score takes the row sums of all queries.",
        ),
        Mutant(
            "triton-rows-scale",
            "tl.sum(ds[:, None] * k, 0) * scale",
            "tl.sum(ds[:, None] * k, 0)",
            "The gradient of queries lacks the scale.",
        ),
    ),
    *of_file(
        "kernels/engine_steps.py",
        f"{STEP} rows_",
        Mutant(
            "triton-steps-places",
            "has = exists & (row % N < R)[:, None]",
            "has = exists & (row % N < 1)[:, None]",
            "Of several rows only the first passes its gradient by the norm.",
        ),
        Mutant(
            "triton-steps-images",
            "(row // N * R + row % N) * D",
            "(row // N + row % N) * D",
            "An image's rows get the gradient of another one's.",
        ),
        Mutant(
            "triton-steps-weight",
            "        d *= tl.load(weight + column, mask=column < D, other=0.0)[None, :]\n",
            "        d = d\n",
            "The gradient lacks the weight of the norm behind the blocks.",
            f"{STEP} final_norm",
        ),
        Mutant(
            "triton-steps-shift",
            "            result += tl.load(shift + column, mask=column < D, other=0.0)[None, :]\n",
            "            result = result\n",
            "The norm behind the blocks lacks its bias.",
            f"{STEP} final_norm",
        ),
        Mutant(
            "triton-steps-stride",
            "x_at = (row // R * stride + row % R * D)",
            "x_at = (row // R * (R * D) + row % R * D)",
            "Rows are read from the images in front of their own.",
            ROWS,
        ),
    ),
    *of_file(
        "kernels/embed_tokens.py",
        f"{STEP} embed_tokens",
        Mutant(
            "triton-embed-slot",
            "row // (P + K) * K + place - P",
            "row // (P + K) * K + place",
            "Tokens are those of the next patches.",
        ),
        Mutant(
            "triton-embed-bias",
            "tl.where(of_patch[:, None], constant[None, :], 0.0)",
            "constant[None, :]",
            "The class token has the bias of patches.",
        ),
    ),
    *of_file(
        "kernels/gather_patches.py",
        "tests/backends/triton/test_engine.py::test_teachers",
        Mutant(
            "triton-patches-stride",
            "+ batch * stride\n",
            "+ batch * (K * C * P * P)\n",
            "Images behind the first have the gradient of other tokens.",
        ),
    ),
    *of_file(
        "kernels/rows_at.py",
        f"{STEP} rows_at",
        Mutant(
            "triton-tables-row",
            "tl.load(lr + at + one)",
            "tl.load(lr + one)",
            "Every iteration has the first learning rate.",
        ),
        Mutant(
            "triton-tables-tiles",
            "for start in range(0, COUNT, BLOCK):",
            "for start in range(0, 1):",
            "Images behind the first tile have no jitter of their own.",
        ),
    ),
    *of_file(
        "kernels/cross_entropy.py",
        f"{STEP} cross_entropy",
        Mutant(
            "triton-loss-largest",
            "tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)",
            "tl.exp(largest - larger) + tl.sum(tl.exp(x), 0)",
            "Large logits overflow.",
        ),
        Mutant(
            "triton-loss-wanted",
            "tl.where(start + column == target, 1.0, 0.0)",
            "tl.where(column == target, 1.0, 0.0)",
            "Classes past the first tile have no gradient of their own.",
        ),
        Mutant(
            "triton-loss-mean",
            "1 / max(1, batch)",
            "1.0",
            "The gradient is that of the sum over images.",
        ),
    ),
    *of_file(
        "kernels/engine_eva.py",
        f"{STEP} rotate",
        Mutant(
            "triton-eva-prefix",
            "turns = exists & (patch >= 0)[:, None]",
            "turns = exists & (patch >= -1)[:, None]",
            "A prefix token turns as a patch of another image, or as what lies in front of all.",
        ),
        Mutant(
            "triton-eva-heads",
            "own = head % H * (2 * D)",
            "own = 0",
            "All heads turn as the first one.",
        ),
        Mutant(
            "triton-eva-back",
            "b * sine_b, -a * sine_a",
            "b * sine_a, -a * sine_b",
            "The gradient of a pair takes the sine of its other channel.",
        ),
        Mutant(
            "triton-eva-swiglu",
            "up * (s + silu * (1.0 - s))",
            "up * s",
            "The derivative of SwiGLU's gate lacks a part.",
            f"{STEP} swiglu",
        ),
        Mutant(
            "triton-eva-swiglu-backward",
            "tl.store(d_x + at_gate + F, d * of_up, mask=exists)",
            "tl.store(d_x + at_gate + F, d * of_gate, mask=exists)",
            "Both halves of SwiGLU have the gradient of the gate.",
            f"{STEP} swiglu",
        ),
    ),
)
