"""Mutants of the CPU engine in csrc/cpu/."""

from tests.mutants.mutant import Mutant, of_file

BUDGET = "tests/backends/cpu/test_cpp.py::test_error_is_within_its_budget -k"
ENGINE = "tests/engine/test_cpu_engine.py"
BLOCKS = f"{ENGINE}::test_equals_the_blocks"
FIRST_ROWS = f"{ENGINE}::test_first_rows_are_those_of_the_block"

MUTANTS = (
    *of_file(
        "csrc/cpu/engine_steps_kernel.h",
        f"{BUDGET} normalize",
        Mutant(
            "steps-overflow",
            "std::isinf(variance) ? std::numeric_limits<T>::quiet_NaN()",
            "false ? std::numeric_limits<T>::quiet_NaN()",
            "A variance that overflows gives zeros instead of NaN.",
            "tests/engine/test_autograd.py::test_overflow_shows",
        ),
        Mutant(
            "steps-normalize-gradient",
            "rstd * (load_n(d + i, n) - mean - load_n(normalized + i, n) * slope);",
            "rstd * (load_n(d + i, n) - mean);",
            "LayerNorm has the gradient of a subtraction of the mean.",
        ),
        Mutant(
            "steps-bias-alone",
            "sum += added ? load_n(added + i, n) + term : term;",
            "sum += added ? load_n(added + i, n) + term : V{};",
            "A bias without a residual is not added.",
        ),
        Mutant(
            "steps-rms-mean",
            "centred ? sum_of<T>(sums) / static_cast<T>(width) : T{0};\n  for",
            "sum_of<T>(sums) / static_cast<T>(width);\n  for",
            "RMSNorm subtracts the mean.",
        ),
        Mutant(
            "steps-rms-gradient",
            "centred ? sum_of<T>(sums) / static_cast<T>(width) : T{0};\n  const T slope",
            "sum_of<T>(sums) / static_cast<T>(width);\n  const T slope",
            "RMSNorm has the gradient of LayerNorm.",
        ),
        Mutant(
            "steps-gelu-sign",
            "return x < 0.0f ? tail : 1.0f - tail;",
            "return 1.0f - tail;",
            "GELU of a negative number is that of the positive one.",
            f"{BUDGET} gelu",
        ),
        Mutant(
            "steps-gelu-slope",
            "slope * (one + T{3} * bent)",
            "slope * (one + bent)",
            "GELU by tanh has a wrong derivative.",
            f"{BUDGET} gelu",
        ),
        Mutant(
            "steps-gelu-sigmoid",
            "const V s = v < zero ? e * larger : larger;",
            "const V s = larger;",
            "Quick GELU of a negative number is minus that of the positive one.",
            f"{BUDGET} gelu",
        ),
    ),
    *of_file(
        "csrc/cpu/simd.h",
        f"{BUDGET} gelu",
        Mutant(
            "simd-rest-is-stored",
            "std::copy_n(some, count, to);",
            "",
            "The last elements of a row are missing.",
        ),
        Mutant(
            "simd-rest-is-loaded",
            "std::copy_n(from, count, some);",
            "",
            "The last elements of a row count as zeros.",
        ),
        Mutant(
            "simd-rest-is-zero",
            "if (count == lanes<T>()) return vector;",
            "return vector;",
            "The variance counts elements behind a row.",
            f"{BUDGET} normalize",
        ),
    ),
    *of_file(
        "csrc/cpu/engine_eva_steps_kernel.h",
        f"{BUDGET} swiglu",
        Mutant(
            "eva-swiglu-derivative",
            "store_n(gate + i, u * (s + silu * (one - s)), n);",
            "store_n(gate + i, u * s, n);",
            "The derivative of silu is its sigmoid.",
        ),
        Mutant(
            "eva-rotate-back",
            "kBackward ? a * cosine[i] + b * sine[j]",
            "kBackward ? a * cosine[i] + b * sine[i]",
            "Backward takes the sine of the wrong channel.",
            f"{BUDGET} rotate",
        ),
    ),
    *of_file(
        "csrc/cpu/engine_eva_steps.cpp",
        f"{BUDGET} rotate",
        Mutant(
            "eva-rotate-heads",
            "(own == 1 ? 0 : i % heads)",
            "0",
            "Every head takes the rotation of the first.",
        ),
    ),
    *of_file(
        "csrc/cpu/gather_attention.cpp",
        f"{BUDGET} attend_",
        Mutant(
            "ragged-padding",
            "bool padded_ = false;",
            "bool padded_ = true;",
            "An image writes zeros over the tokens of the next one.",
        ),
    ),
    *of_file(
        "csrc/cpu/engine_row_attention_kernel.h",
        f"{BUDGET} attend_rows",
        Mutant(
            "rows-softmax",
            "d_score = p[j] * (d_p[j] - mean);",
            "d_score = p[j] * d_p[j];",
            "The softmax has the gradient of a plain product.",
        ),
        Mutant(
            "rows-largest",
            "std::exp(p[j] - highest)",
            "std::exp(p[j])",
            "Large scores overflow.",
            f"{ENGINE}::test_large_scores_do_not_overflow",
        ),
    ),
    *of_file(
        "csrc/cpu/engine_row_attention.cpp",
        f"{BUDGET} attend_rows-ragged",
        Mutant(
            "rows-of-their-image",
            "return offsets_[task / heads_ + 1] - begin(task);",
            "return offsets_.back() - begin(task);",
            "Queries attend to the tokens of later images.",
        ),
        Mutant(
            "rows-place",
            "* stride_ + begin(task) % stride_;",
            "* stride_;",
            "All images write their probabilities into those of the first one.",
        ),
    ),
    *of_file(
        "csrc/cpu/engine_embedding.cpp",
        "tests/engine/test_embedding.py",
        Mutant(
            "embedding-prefix",
            "token = i / rows * kept + row - first;",
            "token = i / rows * kept + row;",
            "A patch takes the product of a later one.",
        ),
        Mutant(
            "embedding-position",
            "if (places) add(places + at[token] * width);",
            "if (places) add(places + (token % kept) * width);",
            "Patches have the positions of the first patches of the grid.",
        ),
        Mutant(
            "embedding-gradient",
            "from + (i * (kept + first) + first) * width",
            "from + i * (kept + first) * width",
            "The gradient of a patch is that of the token before it.",
        ),
        Mutant(
            "embedding-range",
            'table ? checked_indices("positions", positions_any, table->size(0)) : positions_any;',
            "as_contiguous(positions_any);",
            "A position outside the grid reads memory behind the table.",
        ),
    ),
    *of_file(
        "csrc/cpu/engine_blocks.cpp",
        BLOCKS,
        Mutant(
            "blocks-packed",
            "if (!is_packed_for(x)) return product(x, *transposed);",
            "return product(x, *transposed);",
            "Packed weights are never used.",
            f"{ENGINE}::test_packed_products_are_the_same",
        ),
        Mutant(
            "blocks-bias",
            "bias = *block.fc2_bias;",
            "bias = *block.proj_bias;",
            "The bias of the MLP is that of attention.",
        ),
        Mutant(
            "blocks-eps",
            "own_eps += eps_count;",
            "own_eps += 0;",
            "Every block has the eps of the first.",
            f"{ENGINE}::test_every_norm_has_its_own_eps",
        ),
        Mutant(
            "blocks-inner-norm",
            "normalize_inner_backward(d_attended, own[2], own[3], centred);",
            "normalize_inner_backward(d_attended, own[count - 2], own[count - 1], centred);",
            "The gradient of attention's norm reads what that of the MLP saved.",
            f"{ENGINE}::test_every_inner_norm_has_its_own_eps",
        ),
        Mutant(
            "blocks-order",
            "const Tensor* own = &saved[count * i];",
            "const Tensor* own = &saved[count * (blocks.size() - 1 - i)];",
            "The gradient of a block reads what another block saved.",
        ),
    ),
    *of_file(
        "csrc/cpu/engine_last_block.cpp",
        FIRST_ROWS,
        Mutant(
            "last-block-bias",
            "add(y, w.fc2_bias);",
            "",
            "The bias of the last layer is missing.",
        ),
        Mutant(
            "last-block-residual",
            "[](auto& to, const auto& from) { to = from; });\n  recorded(",
            "[](auto&, const auto&) {});\n  recorded(",
            "The gradient doesn't pass by the last block.",
        ),
        Mutant(
            "last-block-inner-norm",
            "d_attended = normalize_inner_backward(d_attended, saved[8], saved[9], centred);",
            "d_attended = normalize_inner_backward(d_attended, saved[count - 2], saved[count - 1],"
            " centred);",
            "The gradient of attention's norm reads what that of the MLP saved.",
            f"{ENGINE}::test_every_inner_norm_has_its_own_eps",
        ),
        Mutant(
            "last-block-ragged",
            "T* own = rows + offsets[i] * width;",
            "T* own = rows + i * count;",
            "The class tokens are the first rows of all images.",
            "tests/teacher/test_ragged.py::test_the_engine_gives_what_blocks_one_by_one_give",
        ),
    ),
)
