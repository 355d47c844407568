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
            "            bias = block.fc2_bias\n",
            "",
            "The bias of the MLP is that of attention.",
        ),
        Mutant(
            "gpu-run-last-bias",
            "        x += self.blocks[-1].fc2_bias\n",
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
            "steps.add_normalize_(x, added, bias, block.eps[1],",
            "steps.add_normalize_(x, added, bias, block.eps[0],",
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
            "        result[:, :rows] = gradient.unflatten(0, q.shape[:2])\n",
            "",
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
            "        of_images[:, :rows] += torch.mm",
            "        of_images[:, :1] += torch.mm",
            "Only the first row has a gradient by its query.",
        ),
        Mutant(
            "gpu-rows-rotation",
            "steps.rotate_(kv, block.k_bias, rotation, block.half)",
            "pass",
            "Keys of the last block aren't rotated.",
            f"{ENGINE}::test_teachers -k dinov3",
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
            "        with products_in(ctx.block.steps.precision):\n",
            "        if True:\n",
            "The gradient of the last block is in the precision that the process allows.",
            SETTINGS,
        ),
    ),
    *of_file(
        "smi_fast/engine/gpu_steps.py",
        f"{ENGINE}::test_kernels_of_blocks",
        Mutant(
            "gpu-steps-fused",
            "self.fused = precision != FLOAT32",
            "self.fused = False",
            "No step is fused into a product.",
        ),
        Mutant(
            "gpu-steps-inner",
            "self.normalize_backward(d_hidden, normalized, block.centred)",
            "d_hidden",
            "The norm inside of the MLP has no gradient.",
            f"{ENGINE}::test_other_norms_and_activations -k inner",
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
)
