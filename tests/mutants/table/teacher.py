"""Mutants of smi_fast/teacher/."""

from tests.mutants.mutant import Mutant, of_file

SPARSE = "tests/teacher/test_sparse_vit.py"
EVERY = f"{SPARSE}::test_equals_timm_with_every_patch"
SUBSET = f"{SPARSE}::test_equals_timm_on_a_subset_of_tokens"
IMPORTANCE = f"{SPARSE}::test_importance_is_the_attention_of_what_the_head_reads"
TAPS = "tests/teacher/test_taps.py::test_each_tap_is_what_the_block_computes"
PROBE = "tests/teacher/test_probe.py"
SUPPORT = "tests/teacher/test_support.py::test_what_cannot_be_exact_is_refused_by_name"
EXIT = "tests/teacher/test_early_exit.py"
EVA = "tests/teacher/test_eva.py"
WEIGHTS = "tests/teacher/test_weights.py"

MUTANTS = (
    *of_file(
        "smi_fast/teacher/blocks.py",
        TAPS,
        Mutant(
            "blocks-done",
            "done = index + 1",
            "done = index",
            "A block with a tap runs twice.",
        ),
        Mutant(
            "blocks-importance",
            "slice(self._prefix, None) if self._rows_read is None else slice(0, 1)",
            "slice(0, 1)",
            "Importance with average pooling is that of the first patch.",
            IMPORTANCE,
        ),
        Mutant(
            "blocks-importance-of-prefix",
            "probabilities[:, :, queries, self._prefix :]",
            "probabilities[:, :, queries, 1:]",
            "Distillation and register tokens count as patches.",
            IMPORTANCE,
        ),
        Mutant(
            "blocks-tap-of-last",
            "if set(names.values()) - {ROW}:",
            "if False:",
            "Taps of the last block are missing, or only of its first rows.",
        ),
        Mutant(
            "blocks-row",
            "y, 1, rotation)[0][:, :, 0]",
            "y, 2, rotation)[0][:, :, 1]",
            "The row is that of the second token.",
        ),
        Mutant(
            "blocks-early-exit",
            "found, goes_on=False)",
            "found, goes_on=True)",
            "An early exit computes what no tap reads.",
            f"{EXIT}::test_nothing_runs_that_the_last_tap_does_not_need",
        ),
    ),
    *of_file(
        "smi_fast/teacher/steps.py",
        TAPS,
        Mutant(
            "blocks-norm",
            "out = attention.norm(out)",
            "",
            "The norm of attention's output is left out.",
            EVERY,
        ),
        Mutant(
            "blocks-gate",
            "out = out * attention.gate(y).sigmoid()",
            "out = out * attention.gate(y)",
            "The gate of attention has no sigmoid.",
            f"{SPARSE}::test_equals_timm_with_a_gate",
        ),
    ),
    *of_file(
        "smi_fast/teacher/attention.py",
        EVERY,
        Mutant(
            "attention-scale",
            "q * q.shape[-1] ** -0.5 @ k.mT",
            "q @ k.mT",
            "Scores have no scale.",
            IMPORTANCE,
        ),
        Mutant(
            "attention-norm-of-keys",
            "q, k = attention.q_norm(q), attention.k_norm(k)\n    return",
            "q, k = attention.q_norm(q), attention.q_norm(k)\n    return",
            "Keys take the norm of queries.",
        ),
        Mutant(
            "attention-pool",
            "(pool.q_norm(q) * pool.scale) @ pool.k_norm(k).mT",
            "pool.q_norm(q) @ pool.k_norm(k).mT",
            "Map pooling scores patches without its scale.",
            f"{SPARSE}::test_importance_of_map_pooling_is_its_own_attention",
        ),
    ),
    *of_file(
        "smi_fast/teacher/mlp.py",
        "tests/teacher/test_taps.py::test_the_hidden_layer_of_a_gated_mlp",
        Mutant(
            "mlp-gate",
            "if mlp.gate_last else mlp.act(first) * second",
            "if True else mlp.act(first) * second",
            "The wrong half of a gated MLP is activated.",
        ),
        Mutant(
            "mlp-norm",
            "mlp.norm(mlp.drop1(found))",
            "mlp.drop1(found)",
            "The hidden layer isn't normed.",
        ),
    ),
    *of_file(
        "smi_fast/teacher/rotary.py",
        EVA,
        Mutant(
            "rotary-positions",
            "[table[positions].unsqueeze(2)]",
            "[table[: positions.shape[1]].expand(len(positions), -1, -1).unsqueeze(2)]",
            "Patches are rotated as the first cells of the grid.",
            f"{EVA}::test_a_patch_turns_with_its_place_under_jitter",
        ),
        Mutant(
            "rotary-prefix",
            "attention.num_prefix_tokens if rotation",
            "0 if rotation",
            "The class token is rotated too.",
        ),
        Mutant(
            "rotary-blocks",
            "[block.transpose(0, 1)[positions] for block in table]",
            "[table[0].transpose(0, 1)[positions] for block in table]",
            "Every block has the mixed rotations of the first.",
        ),
    ),
    *of_file(
        "smi_fast/teacher/student.py",
        "tests/teacher/test_student.py",
        Mutant(
            "student-dropout",
            "model.norm_pre(model.pos_drop(patch_tokens(model, patches, kept)))",
            "model.norm_pre(patch_tokens(model, patches, kept))",
            "A student trains without the dropout of its tokens.",
        ),
        Mutant(
            "student-checkpoint",
            "model.grad_checkpointing and self.training",
            "False",
            "A student that was told to checkpoint keeps all activations.",
        ),
        Mutant(
            "student-norm",
            "model.forward_head(model.norm(x))",
            "model.forward_head(x)",
            "The head of a student reads tokens that aren't normalised.",
        ),
    ),
    *of_file(
        "smi_fast/engine/iteration_reference.py",
        SUBSET,
        Mutant(
            "sparse-positions",
            "patches + table[positions]",
            "patches + table[: patches.shape[1]]",
            "Patches take the position embeddings of the first cells.",
        ),
    ),
    *of_file(
        "smi_fast/teacher/embedding.py",
        SUBSET,
        Mutant(
            "sparse-prefix",
            "return prefix, vit.pos_embed[:, :count], vit.pos_embed[0, count:]",
            "return prefix, None, vit.pos_embed[0, count:]",
            "The class token has no position embedding.",
        ),
        Mutant(
            "sparse-places",
            "bool(((kept < 0) | (kept >= count)).any()):",
            "bool((kept >= count).any()):",
            "A patch of a negative place takes another's position.",
            f"{SPARSE}::test_forward_patches_says_what_it_expected",
        ),
    ),
    *of_file(
        "smi_fast/teacher/head.py",
        EVERY,
        Mutant(
            "head-distilled",
            "int(vit.num_prefix_tokens) if isinstance(vit, VisionTransformerDistilled) else 1",
            "1",
            "The distillation token isn't computed.",
        ),
        Mutant(
            "head-classes",
            "    if isinstance(vit.head, nn.Identity):\n        return 0\n",
            "    if isinstance(vit.head, (nn.Identity, nn.Linear)):\n"
            "        return vit.num_classes\n",
            "A replaced head doesn't change the number of classes.",
            f"{SPARSE}::test_classes_are_those_of_a_head_that_replaced_timms",
        ),
    ),
    *of_file(
        "smi_fast/teacher/sparse_vit.py",
        SUBSET,
        Mutant(
            "sparse-follow",
            "            self._weights.follow()\n        shown",
            "            pass\n        shown",
            "Weights that are replaced are not noticed.",
            f"{WEIGHTS}::test_changes_are_noticed",
        ),
        Mutant(
            "sparse-refresh",
            "self._blocks.refresh()",
            "",
            "A refresh doesn't forget what an engine has folded.",
            f"{WEIGHTS}::test_refresh_follows_what_torch_does_not_count",
        ),
    ),
    *of_file(
        "smi_fast/teacher/probe.py",
        PROBE,
        Mutant(
            "probe-gradient",
            'for name, ours, own in zip(("logits", "pixel gradients"), found, expected, '
            "strict=True):",
            'for name, ours, own in zip(("logits",), found, expected, strict=False):',
            "A teacher that cuts the gradient is accepted.",
            f"{PROBE}::test_a_patch_with_a_published_name_is_judged_by_what_it_computes",
        ),
        Mutant(
            "probe-float64",
            "what = _difference(theirs, sparse, TOLERANCE_FLOAT64)",
            "pass",
            "A teacher with large weights is refused for its rounding.",
            f"{PROBE}::test_rounding_of_large_weights_is_told_from_a_fault",
        ),
        Mutant(
            "probe-nan",
            "if not apart <= tolerance * largest:",
            "if apart > tolerance * largest:",
            "Logits that are NaN count as equal.",
        ),
    ),
    *of_file(
        "smi_fast/teacher/frozen.py",
        f"{WEIGHTS}::test_a_moved_copy_has_weights_of_its_own",
        Mutant(
            "frozen-moved",
            "if own.data_ptr() == self._addresses[index] != found[index]:",
            "if self._addresses[index] != found[index]:",
            "A copy that was moved takes over weights of another type.",
        ),
        Mutant(
            "frozen-addresses",
            "        self._addresses = found\n",
            "",
            "A second replacement of a weight is not noticed.",
            f"{WEIGHTS}::test_every_replacement_is_noticed",
        ),
        Mutant(
            "frozen-state",
            'return {"_tables": [], "_shared": [], "_addresses": []}',
            "return vars(self)",
            "A saved teacher has its weights several times.",
            f"{WEIGHTS}::test_a_saved_teacher_has_its_weights_once",
        ),
    ),
    *of_file(
        "smi_fast/teacher/support.py",
        SUPPORT,
        Mutant(
            "support-overlaps",
            "if proj.stride != proj.kernel_size or any(proj.padding) or proj.groups != 1:",
            "if any(proj.padding) or proj.groups != 1:",
            "Patches that overlap are computed as if they didn't.",
        ),
        Mutant(
            "support-scale",
            "if abs(attention.scale - width**-0.5) > 1e-9:",
            "if False:",
            "Attention with a scale of its own gets the usual one.",
        ),
        Mutant(
            "support-pool",
            "if teacher.attn_pool.pos_embed is not None:",
            "if False:",
            "The positions of map pooling are added to the wrong patches.",
        ),
        Mutant(
            "support-hooks",
            '"forward_hooks", "pre_hooks", "backward_hooks"',
            '"pre_hooks", "backward_hooks"',
            "A forward hook is ignored.",
            f"{PROBE}::test_a_hook_is_refused",
        ),
    ),
    *of_file(
        "smi_fast/teacher/taps.py",
        "tests/teacher/test_taps.py::test_what_is_no_tap_is_refused",
        Mutant(
            "taps-depth",
            "if index >= depth:",
            "if index > depth:",
            "The block after the last is asked for.",
        ),
        Mutant(
            "taps-negative",
            "form.format(block % depth)",
            "form.format(abs(block))",
            "A block from the end is one from the start.",
            "tests/objectives/test_every_objective.py tests/objectives/test_patch_similarity.py",
        ),
        Mutant(
            "taps-until",
            "if index >= until for name",
            "if index > until for name",
            "A tap of the first block behind an early exit is asked for.",
            f"{EXIT}::test_what_is_no_early_exit_is_refused",
        ),
    ),
    *of_file(
        "smi_fast/teacher/space.py",
        "tests/teacher/test_space.py",
        Mutant(
            "space-clamp",
            "self.mean[:, None, None]).clamp(0, 1)",
            "self.mean[:, None, None])",
            "Pixels by rounding lie outside of [0, 1].",
        ),
        Mutant(
            "space-low",
            "return -self.mean / self.std",
            "return self.mean / self.std",
            "Black isn't the lower bound.",
        ),
    ),
)
