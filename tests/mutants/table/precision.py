"""Mutants of bfloat16, in csrc/cpu/ and in smi_fast/."""

from tests.mutants.mutant import Mutant, of_file

STEPS = "tests/backends/cpu/test_cpp.py -k bfloat16"
LESSER = "tests/backends/cpu/test_cpp.py::test_lesser_instruction_sets"
PRECISION = "tests/engine/test_precision.py"
RUN = f"{PRECISION}::test_a_run_is_within_its_budget"
SUBSTITUTE = f"{PRECISION}::test_there_is_no_silent_substitute"

MUTANTS = (
    *of_file(
        "csrc/cpu/simd.h",
        STEPS,
        Mutant(
            "bf16-truncates",
            "const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;",
            "const uint32_t rounded = bits >> 16;",
            "Numbers are rounded towards zero.",
        ),
        Mutant(
            "bf16-vectors-truncate",
            "const Vec<uint32_t> rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;",
            "const Vec<uint32_t> rounded = bits >> 16;",
            "Numbers of a vector are rounded towards zero.",
            LESSER,
        ),
        Mutant(
            "bf16-nan",
            "static_cast<uint16_t>(x == x ? rounded : 0x7FC0)",
            "static_cast<uint16_t>(rounded)",
            "Rounding turns some NaN into a zero.",
        ),
        Mutant(
            "bf16-vectors-nan",
            "vector == vector ? rounded : Vec<uint32_t>{} + 0x7FC0",
            "rounded",
            "Rounding turns some NaN of a vector into a zero.",
            LESSER,
        ),
    ),
    *of_file(
        "csrc/cpu/engine_steps_kernel.h",
        STEPS,
        Mutant(
            "bf16-copy-of-gradient",
            "if (copy) store_n(copy + i, sum, n);",
            "(void)copy;",
            "Products go on reading the gradient of the block behind.",
        ),
    ),
    *of_file(
        "csrc/cpu/engine_blocks.cpp",
        RUN,
        Mutant(
            "bf16-operand",
            "*block.to_mlp, *block.mlp_rstd, copy, centred);",
            "*block.to_mlp, *block.mlp_rstd, std::nullopt, centred);",
            "The gradient of attention lacks that of the MLP.",
        ),
    ),
    *of_file(
        "csrc/cpu/gather_attention_kernel.h",
        STEPS,
        Mutant(
            "bf16-attention-workspace",
            "std::is_same_v<S, Computed<S>> && width % lanes<S>() == 0",
            "width % lanes<S>() == 0",
            "The copy of a head in float32 has no memory.",
            LESSER,
        ),
        Mutant(
            "bf16-attention-gradient",
            "own.d_qkv + own.head.offset(part, i), head.width, d_qkv",
            "own.d_qkv + own.head.offset(0, i), head.width, d_qkv",
            "Keys and values get the gradient of queries.",
        ),
    ),
    *of_file(
        "csrc/cpu/gather_attention_pairs_kernel.h",
        STEPS,
        Mutant(
            "pairs-odd",
            "i + 1 < count ? halves(from[i + 1] + c) : Vec<uint32_t>{}",
            "halves(from[std::min(i + 1, count - 1)] + c)",
            "An odd last row counts twice.",
        ),
        Mutant(
            "pairs-blocks",
            "{begin ? w.d_k : nullptr, width});",
            "{nullptr, width});",
            "Keys get the gradient of the last block of queries only.",
        ),
        Mutant(
            "pairs-order",
            "halves(from[i] + c) | second << 16",
            "halves(from[i] + c) << 16 | second",
            "The numbers of a pair are swapped.",
        ),
        Mutant(
            "pairs-softmax",
            "softmax_backward(w.p, w.d_p, length, queries, head.scale);",
            "softmax_backward(w.p, w.d_p, length, queries, 1.0f);",
            "The gradient of queries and keys lacks the scale.",
        ),
    ),
    *of_file(
        "csrc/cpu/gather_attention.cpp",
        STEPS,
        Mutant(
            "pairs-width",
            "if (has_pairs && width % 32 == 0) {",
            "if (has_pairs) {",
            "Heads of any width are read in whole vectors.",
        ),
    ),
    *of_file(
        "smi_fast/engine/__init__.py",
        SUBSTITUTE,
        Mutant(
            "precision-substitute",
            "    if precision == FLOAT32:\n        return None\n",
            "    return None\n",
            "Without an engine blocks run in float32, and nothing says so.",
        ),
    ),
    *of_file(
        "smi_fast/engine/cpu.py",
        SUBSTITUTE,
        Mutant(
            "precision-float64",
            "self._precision != FLOAT32 and dtype != torch.float32",
            "False",
            "A teacher in float64 is taken for one in float32.",
        ),
    ),
    *of_file(
        "smi_fast/engine/precision.py",
        f"{PRECISION}::test_an_inversion_says_its_precision",
        Mutant(
            "precision-described",
            "if precision == FLOAT32 else precision",
            "if precision else precision",
            "A result in bfloat16 says that it is of float32.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/inputs.py",
        f"{PRECISION}::test_the_precision_of_a_given_sparse_vit_counts",
        Mutant(
            "precision-of-inverter",
            "if precision not in (None, teacher.precision):",
            "if False:",
            "An inverter ignores the precision that it was given.",
        ),
    ),
    *of_file(
        "smi_fast/teacher/sparse_vit.py",
        PRECISION,
        Mutant(
            "precision-size",
            "            precision=self.precision,\n",
            "",
            "A teacher of another size computes in float32.",
        ),
        Mutant(
            "precision-ragged",
            "        if self.precision != FLOAT32:\n",
            "        if False:\n",
            "Blocks of ragged batches run in float32, and nothing says so.",
        ),
        Mutant(
            "precision-late",
            "            self._blocks.engine_for(self.device, self.dtype)\n",
            "",
            "What has no engine is refused in the first pass only.",
            SUBSTITUTE,
        ),
    ),
    *of_file(
        "smi_fast/engine/gain.py",
        f"{PRECISION}::test_the_gain_is_measured_within_its_time",
        Mutant(
            "gain-generator",
            "@torch.random.fork_rng(devices=[])\n",
            "",
            "The measurement draws from torch's generator.",
        ),
        Mutant(
            "gain-share",
            "found[BFLOAT16] / found[FLOAT32]",
            "found[FLOAT32] / found[BFLOAT16]",
            "A gain is told as a loss.",
            "tests/test_cli.py::test_info_tells_what_bfloat16_gives",
        ),
    ),
)
