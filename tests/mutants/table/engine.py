"""Mutants of the CPU engine, in csrc/cpu/ and in smi_fast/engine/."""

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
            "steps-gelu-sign",
            "return x < 0.0f ? tail : 1.0f - tail;",
            "return 1.0f - tail;",
            "GELU of a negative number is that of the positive one.",
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
        "smi_fast/engine/memory.py",
        "tests/engine/test_memory.py",
        Mutant(
            "memory-small",
            "_BYTES = 31 << 20",
            "_BYTES = 1 << 20",
            "Each pass maps its memory anew.",
        ),
    ),
    *of_file(
        "csrc/cpu/engine_blocks.cpp",
        BLOCKS,
        Mutant(
            "blocks-packed",
            "if (x.size(0) != packed_rows) return product(x, *transposed);",
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
            "blocks-order",
            "const Tensor &qkv = saved[count * i], &derivative",
            "const Tensor &qkv = saved[count * (blocks.size() - 1 - i)], &derivative",
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
            "last-block-ragged",
            "T* own = rows + offsets[i] * width;",
            "T* own = rows + i * count;",
            "The class tokens are the first rows of all images.",
            "tests/teacher/test_ragged.py::test_the_engine_gives_what_blocks_one_by_one_give",
        ),
    ),
    *of_file(
        "smi_fast/engine/folding.py",
        BLOCKS,
        Mutant(
            "folding-key-bias",
            "torch.cat([self.q_bias, self.k_bias]) if rotary",
            "torch.cat([self.q_bias, 0 * self.k_bias]) if rotary",
            "The bias of LayerNorm doesn't reach keys that are rotated.",
            f"{ENGINE}::test_blocks_of_eva",
        ),
        Mutant(
            "folding-norm-of-mlp",
            "fc2, fc2_bias = _after_norm(fc2, fc2_bias, mlp.norm)",
            "fc2, fc2_bias = fc2 * mlp.norm.weight, fc2_bias",
            "The bias of the norm inside of the MLP is lost.",
            f"{ENGINE}::test_blocks_of_eva",
        ),
        Mutant(
            "folding-gate",
            "type(mlp.act) is nn.SiLU and not mlp.gate_last and",
            "type(mlp.act) is nn.SiLU and",
            "The halves of a gated MLP may be the wrong way round.",
            f"{ENGINE}::test_a_gate_that_comes_last_is_left_to_the_ops",
        ),
        Mutant(
            "folding-norm-bias",
            "bias + weight @ norm.bias",
            "bias",
            "The bias of LayerNorm is lost.",
        ),
        Mutant(
            "folding-value-bias",
            "_bias(linear) + linear.weight @ missing",
            "_bias(linear) + missing",
            "The bias of v doesn't pass through the projection.",
        ),
        Mutant(
            "folding-scale",
            "(gamma[:, None] * weight, gamma * bias)",
            "(gamma[:, None] * weight, bias)",
            "LayerScale leaves the bias out.",
        ),
        Mutant(
            "folding-gelu",
            'and mlp.act.approximate == "none"',
            'and mlp.act.approximate in ("none", "tanh")',
            "GELU by tanh is computed as GELU.",
            f"{ENGINE}::test_other_blocks_are_left_to_the_ops",
        ),
    ),
    *of_file(
        "smi_fast/engine/cpu.py",
        f"{ENGINE}::test_engine_follows_its_teacher",
        Mutant(
            "engine-versions",
            "state += [weight._version for weight in weights]",
            "",
            "Weights that change in place are not noticed.",
        ),
        Mutant(
            "engine-addresses",
            "state += [weight.data_ptr() for weight in weights]",
            "",
            "Weights that are replaced are not noticed.",
            "tests/teacher/test_weights.py::test_changes_are_noticed",
        ),
        Mutant(
            "engine-overlap",
            "buffers, self.free = self.free, None",
            "buffers = self.free",
            "Two passes that overlap write into the same buffers.",
            f"{ENGINE}::test_passes_may_overlap",
        ),
        Mutant(
            "engine-buffers",
            "buffers.key != (batch, tokens, saves)",
            "buffers.key[:2] != (batch, tokens)",
            "A pass with gradient saves into buffers that blocks share.",
            f"{ENGINE}::test_memory_is_planned_once",
        ),
        Mutant(
            "engine-last-rows",
            "if key not in self._last:",
            "if not self._last:",
            "The number of rows is that of the first pass.",
            f"{ENGINE}::test_passes_may_read_other_numbers_of_rows",
        ),
    ),
    *of_file(
        "smi_fast/engine/__init__.py",
        "tests/engine/test_choose.py",
        Mutant(
            "choose-autocast",
            "if reason is None and torch.is_autocast_enabled(device.type):",
            "if False:",
            "Autocast is not obeyed.",
            "tests/engine/test_autograd.py::test_autocast_is_obeyed",
        ),
        Mutant(
            "choose-backend",
            "if wanted not in (backends.AUTO, engine.backend):",
            "if False:",
            "An engine runs where another backend was asked for.",
        ),
        Mutant(
            "choose-compiler",
            "if torch.compiler.is_compiling():",
            "if False:",
            "A compiler doesn't see the blocks.",
        ),
    ),
)
