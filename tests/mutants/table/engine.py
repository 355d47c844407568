"""Mutants of the CPU engine in smi_fast/engine/."""

from tests.mutants.mutant import Mutant, of_file

ENGINE = "tests/engine/test_cpu_engine.py"
KINDS = "tests/engine/test_block_kinds.py"
BLOCKS = f"{ENGINE}::test_equals_the_blocks"

MUTANTS = (
    *of_file(
        "smi_fast/engine/buffers.py",
        ENGINE,
        Mutant(
            "engine-buffers",
            "return rows <= self._rows and saves == self._saves",
            "return rows <= self._rows",
            "A pass with gradient saves into buffers that blocks share.",
            f"{ENGINE}::test_memory_is_planned_once",
        ),
        Mutant(
            "engine-fewer-rows",
            "return rows <= self._rows and",
            "return rows == self._rows and",
            "Images that leave a batch let all memory be planned anew.",
            f"{ENGINE}::test_fewer_rows_take_the_memory_of_more",
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
        Mutant(
            "memory-products",
            '_PRODUCTS = "8192"',
            '_PRODUCTS = "1024"',
            "The code of a batch's products is generated again where images leave it.",
        ),
    ),
    *of_file(
        "smi_fast/engine/folding.py",
        BLOCKS,
        Mutant(
            "engine-kinds",
            "if not foldable(block) or Kind.of(block) != Kind.of(blocks[0]):",
            "if not foldable(block):",
            "The norms of all blocks are computed as those of the first.",
            f"{KINDS}::test_norms_of_one_kind_run_together",
        ),
        Mutant(
            "folding-kinds-of-norms",
            "(all(map(_is_layer_norm, norms)) or all(map(_is_rms_norm, norms)))",
            "all(_is_layer_norm(norm) or _is_rms_norm(norm) for norm in norms)",
            "The second norm of a block is computed as the first.",
            f"{KINDS}::test_norms_of_one_kind_run_together",
        ),
        Mutant(
            "folding-inner-value-bias",
            "v_bias if kind.attention_norm else None",
            "0 * v_bias if kind.attention_norm else None",
            "The norm inside of attention doesn't see the bias of v.",
            f"{ENGINE}::test_every_inner_norm_has_its_own_eps",
        ),
        Mutant(
            "folding-key-bias",
            "torch.cat([self.q_bias, self.k_bias]) if rotary",
            "torch.cat([self.q_bias, 0 * self.k_bias]) if rotary",
            "The bias of LayerNorm doesn't reach keys that are rotated.",
            f"{KINDS}::test_blocks_of_eva",
        ),
        Mutant(
            "folding-norm-of-mlp",
            "fc2, fc2_bias = _after_norm(fc2, fc2_bias, mlp.norm)",
            "fc2, fc2_bias = fc2 * mlp.norm.weight, fc2_bias",
            "The bias of the norm inside of the MLP is lost.",
            f"{KINDS}::test_blocks_of_eva",
        ),
        Mutant(
            "folding-gate",
            "type(mlp.act) is nn.SiLU and not mlp.gate_last and",
            "type(mlp.act) is nn.SiLU and",
            "The halves of a gated MLP may be the wrong way round.",
            f"{KINDS}::test_a_gate_that_comes_last_is_left_to_the_ops",
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
            "return str(mlp.act.approximate)",
            'return "none"',
            "GELU by tanh is computed as GELU.",
            f"{KINDS}::test_each_gelu",
        ),
        Mutant(
            "folding-quick-gelu",
            'QuickGELU: "sigmoid"',
            'QuickGELU: "tanh"',
            "Quick GELU is computed by tanh.",
            f"{KINDS}::test_each_gelu",
        ),
        Mutant(
            "folding-gelus",
            "mlp_norm, _approximation(block.mlp))",
            'mlp_norm, "none")',
            "The GELU of all blocks is that of the first.",
            f"{KINDS}::test_another_gelu_is_left_to_the_ops",
        ),
    ),
    *of_file(
        "smi_fast/engine/weights.py",
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
            "engine-follows",
            "        if self._watch.changed():\n",
            "        if False:\n",
            "Weights that change are not noticed.",
        ),
    ),
    *of_file(
        "smi_fast/engine/cpu.py",
        f"{ENGINE}::test_engine_follows_its_teacher",
        Mutant(
            "engine-overlap",
            "buffers, self.free = self.free, None",
            "buffers = self.free",
            "Two passes that overlap write into the same buffers.",
            f"{ENGINE}::test_passes_may_overlap",
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
