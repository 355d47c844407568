"""Mutants of the engine of GPUs, run by Triton's interpreter."""

from tests.mutants.mutant import Mutant, of_file

ENGINE = "tests/backends/triton/test_engine.py"
BLOCKS = f"{ENGINE}::test_equals_the_blocks -k float32"
ROWS = f"{ENGINE}::test_first_rows_are_those_of_the_block -k float32"
MEMORY = f"{ENGINE}::test_memory_is_planned_once_and_of_one_pass"
SETTINGS = f"{ENGINE}::test_products_see_the_precision_and_nothing_else_does"
CHOOSE = "tests/engine/test_choose.py"

MUTANTS = (
    *of_file(
        "smi_fast/engine/gpu_run.py",
        BLOCKS,
        Mutant(
            "gpu-run-bias",
            "pending = buffers.of_rows, block.fc2_bias",
            "pending = buffers.of_rows, block.proj_bias",
            "The bias of the MLP is that of attention.",
        ),
        Mutant(
            "gpu-run-last-bias",
            "        x += bias\n",
            "",
            "The bias of the last layer is missing.",
        ),
        Mutant(
            "gpu-run-query-bias",
            "biases = none if rotary else block.q_bias,",
            "biases = none,",
            "Queries lack their bias.",
        ),
        Mutant(
            "gpu-run-eps",
            "steps.add_normalize_(x, *of_attention, mlp_eps,",
            "steps.add_normalize_(x, *of_attention, eps,",
            "The second norm has the eps of the first.",
        ),
        Mutant(
            "gpu-run-copy",
            "saved.to_mlp, mlp_rstd, copy, centred)",
            "saved.to_mlp, mlp_rstd, None, centred)",
            "The gradient of attention lacks that of the MLP.",
            f"{ENGINE}::test_bfloat16_is_within_its_budget",
        ),
        Mutant(
            "gpu-run-value-bias",
            "none if block.v_bias is None else block.v_bias",
            "none",
            "The norm inside of attention reads values without their bias.",
            f"{ENGINE}::test_other_norms_and_activations -k inner",
        ),
        Mutant(
            "gpu-run-rotations",
            "steps.rotate_backward_(d_qkv, 2, rotations[index], block.half)",
            "pass",
            "The gradient of queries and keys stays rotated.",
            f"{ENGINE}::test_teachers -k dinov3",
        ),
        Mutant(
            "gpu-run-inner",
            "self.steps.normalize_backward(d_attended, saved.to_proj, centred)",
            "d_attended",
            "The norm inside of attention has no gradient.",
            f"{ENGINE}::test_other_norms_and_activations -k inner",
        ),
        Mutant(
            "gpu-run-overlap",
            "buffers, self.free = self.free, None",
            "buffers = self.free",
            "Two passes that overlap write into the same buffers.",
            MEMORY,
        ),
        Mutant(
            "gpu-run-shared",
            "buffers.key != key",
            "buffers.key[:2] != key[:2]",
            "A pass with gradient saves into buffers that blocks share.",
            MEMORY,
        ),
        Mutant(
            "gpu-run-captured",
            "Lease(None if captured else self, buffers)",
            "Lease(self, buffers)",
            "Passes write into the buffers of a CUDA graph.",
            MEMORY,
        ),
        Mutant(
            "gpu-run-inference",
            "torch.inference_mode(False)",
            "torch.no_grad()",
            "After a pass in inference mode no other can run.",
            MEMORY,
        ),
        Mutant(
            "gpu-run-freed",
            "        _ = ctx.saved_tensors  # raises when the graph has been freed\n",
            "",
            "A second backward pass isn't refused.",
            MEMORY,
        ),
    ),
    *of_file(
        "smi_fast/engine/gpu_last_rows.py",
        ROWS,
        Mutant(
            "gpu-rows-residual",
            "steps.normalize_backward_rows_(gradient.view(q.shape), d",
            "steps.normalize_backward_rows_(0 * gradient.view(q.shape), d",
            "The gradient doesn't pass by the last block.",
        ),
        Mutant(
            "gpu-rows-bias",
            "        y += block.fc2_bias\n",
            "",
            "The bias of the last layer is missing.",
        ),
        Mutant(
            "gpu-rows-queries",
            "for row in range(self.rows):",
            "for row in range(1):",
            "Only the first row has a gradient by its query.",
        ),
        Mutant(
            "gpu-rows-operand",
            "saved.rstd, result, operand, centred",
            "saved.rstd, result, None, centred",
            "In bfloat16 the blocks before the last one have no gradient.",
            f"{ENGINE}::test_three_iterations_give_the_images_of_the_cpu_engine",
        ),
        Mutant(
            "gpu-rows-pending",
            "steps.add_normalize_(x, *pending[1:], block.eps[0]",
            "steps.add_normalize_(x, None, None, block.eps[0]",
            "What the block before adds is lost.",
        ),
        Mutant(
            "gpu-rows-norm",
            "result if behind is None else behind(result)",
            "result",
            "A norm that isn't fused is left out.",
            f"{ENGINE}::test_a_norm_of_another_kind_stays_behind_the_rows",
        ),
        Mutant(
            "gpu-rows-rotation",
            "steps.rotate_(kv, block.k_bias, rotation, block.half)",
            "pass",
            "Keys of the last block aren't rotated.",
            f"{ENGINE}::test_teachers -k clip",
        ),
        Mutant(
            "gpu-rows-value-bias",
            "F.pad(v_bias, (len(v_bias), 0))",
            "F.pad(0 * v_bias, (len(v_bias), 0))",
            "The norm inside of the last attention reads values without their bias.",
            f"{ENGINE}::test_other_norms_and_activations -k inner",
        ),
        Mutant(
            "gpu-rows-settings",
            "        with products_in(rows.steps.precision):\n            result =",
            "        if True:\n            result =",
            "The gradient of the last block is in the precision that the process allows.",
            SETTINGS,
        ),
    ),
    *of_file(
        "smi_fast/engine/gpu_steps.py",
        f"{ENGINE}::test_kernels_of_blocks",
        Mutant(
            "gpu-steps-inner",
            "self.normalize_backward(d_hidden, normalized, block.centred)",
            "d_hidden",
            "The norm inside of the MLP has no gradient.",
            f"{ENGINE}::test_other_norms_and_activations -k inner",
        ),
        Mutant(
            "gpu-steps-fused",
            "self.fused = precision != FLOAT32",
            "self.fused = False",
            "No step is fused into a product.",
        ),
    ),
    *of_file(
        "smi_fast/engine/precision.py",
        SETTINGS,
        Mutant(
            "gpu-precision-restored",
            "        settings.fp32_precision = float32\n",
            "",
            "The precision of an engine becomes that of the process.",
        ),
        Mutant(
            "gpu-precision-sums",
            "            settings.allow_bf16_reduced_precision_reduction = False\n",
            "            pass\n",
            "Sums of a product may be rounded to bfloat16.",
        ),
        Mutant(
            "gpu-precision-tf32",
            '"tf32" if precision == TF32 else "ieee"',
            '"ieee"',
            "Products of tf32 leave tensor cores idle.",
        ),
    ),
    *of_file(
        "smi_fast/engine/gpu.py",
        f"{CHOOSE}::test_the_engine_of_gpus_says_what_it_does_not_run",
        Mutant(
            "gpu-types",
            "if reason is None and dtype != torch.float32:",
            "if False:",
            "The residual stream of a teacher in bfloat16 is bfloat16.",
        ),
    ),
    *of_file(
        "smi_fast/engine/cpu.py",
        "tests/engine/test_precision.py::test_there_is_no_silent_substitute",
        Mutant(
            "gpu-tf32-on-cpu",
            "self._precision not in ON_CPU",
            "False",
            "What is asked for in tf32 is computed in float32 on a CPU.",
        ),
    ),
    *of_file(
        "smi_fast/engine/gpu.py",
        f"{ENGINE}::test_teachers",
        Mutant(
            "gpu-embed-prefix",
            "[:, ctx.embedding.prefix.shape[1] :]",
            "[:, : grad.shape[1] - ctx.embedding.prefix.shape[1]]",
            "Patches have the gradient of the tokens in front of theirs.",
        ),
    ),
    *of_file(
        "smi_fast/engine/loss.py",
        f"{ENGINE}::test_the_loss_is_that_of_pytorch",
        Mutant(
            "gpu-loss-weight",
            "gradient if is_one(grad) else gradient * grad.to(gradient.dtype)",
            "gradient",
            "The weight of cross-entropy has no effect.",
        ),
        Mutant(
            "gpu-loss-soft",
            "targets.dtype == torch.int64 and kernels is not None",
            "kernels is not None",
            "Probabilities as targets are read as classes.",
        ),
    ),
    *of_file(
        "smi_fast/ops/constants.py",
        f"{ENGINE}::test_the_loss_is_that_of_pytorch",
        Mutant(
            "constants-one",
            "scalar.data_ptr() == one.data_ptr() and scalar.shape == one.shape",
            "scalar.shape == one.shape",
            "Any weight is taken for 1.",
        ),
    ),
)
