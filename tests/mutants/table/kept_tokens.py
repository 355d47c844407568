"""Mutants of fewer tokens in deeper blocks, and of numbers of tokens of their own."""

from tests.mutants.mutant import Mutant, of_file

NARROW = "tests/teacher/test_narrow.py"
RAGGED = "tests/teacher/test_ragged.py"

MUTANTS = (
    *of_file(
        "smi_fast/teacher/blocks.py",
        f"{NARROW}::test_equals_timms_blocks_on_the_tokens_that_go_on",
        Mutant(
            "narrow-left",
            "left = left.gather(1, places)",
            "left = places",
            "After a second narrowing importance belongs to other patches.",
        ),
        Mutant(
            "narrow-block",
            "attention = self._class_row(way, x, index)[:, :, self._prefix :].mean(1)",
            "attention = self._class_row(way, x, index - 1)[:, :, self._prefix :].mean(1)",
            "Tokens are chosen by the weights of the block before.",
        ),
        Mutant(
            "narrow-rotations",
            "r.take_along_dim(turned, 1)",
            "r[:, : places.shape[1]]",
            "Tokens that go on are rotated as the first ones.",
            f"{NARROW}::test_rotations_go_on_with_their_tokens",
        ),
    ),
    *of_file(
        "smi_fast/teacher/ragged.py",
        RAGGED,
        Mutant(
            "ragged-rows",
            "x.new_zeros(len(self.lengths) * self.tokens, *x.shape[2:])",
            "x.new_ones(len(self.lengths) * self.tokens, *x.shape[2:])",
            "Rows that don't count are not 0.",
        ),
        Mutant(
            "ragged-length",
            "torch.arange(tokens, device=lengths.device) < lengths[:, None]",
            "torch.arange(tokens, device=lengths.device) <= lengths[:, None]",
            "One patch behind the length of each image costs products.",
        ),
        Mutant(
            "ragged-range",
            "(lengths < 0) | (lengths > most)",
            "lengths < 0",
            "More patches than there are may count.",
        ),
    ),
    *of_file(
        "smi_fast/teacher/blocks.py",
        f"{RAGGED}::test_each_image_is_as_if_it_were_alone",
        Mutant(
            "ragged-attention",
            "qkv, lengths=lengths, importance=scored",
            "qkv, importance=scored",
            "Tokens attend to padding.",
        ),
        Mutant(
            "ragged-class-row",
            "rows.unpack(probabilities[:, :, 0].mean(dim=1))",
            "rows.unpack(probabilities[:, :, -1].mean(dim=1))",
            "Importance is the attention of the last prefix token.",
        ),
        Mutant(
            "ragged-packed",
            'packed = x.device.type == "cpu" and way.rotations is None',
            "packed = False",
            "Padded rows cost matrix products.",
            f"{RAGGED}::test_padded_rows_cost_no_product",
        ),
    ),
    *of_file(
        "smi_fast/teacher/sparse_vit.py",
        RAGGED,
        Mutant(
            "ragged-prefix",
            "way, lengths + self.num_prefix_tokens, importance",
            "way, lengths, importance",
            "The class token counts as a patch.",
        ),
        Mutant(
            "ragged-pooling",
            "if rows_read(self.vit) is None:",
            "if False:",
            "A teacher that pools all tokens pools padding.",
        ),
    ),
    *of_file(
        "smi_fast/teacher/narrowing.py",
        NARROW,
        Mutant(
            "narrow-prefix",
            "torch.cat([first, places + prefix], dim=1)",
            "torch.cat([first, places], dim=1)",
            "Prefix tokens go on twice.",
        ),
        Mutant(
            "narrow-taps",
            "max(blocks) >= min(narrow)",
            "max(blocks) > min(narrow)",
            "Taps of a narrowed block are taken, which have other tokens.",
        ),
        Mutant(
            "narrow-pooling",
            "if narrow and rows_read is None:",
            "if False:",
            "A teacher that pools all tokens is narrowed.",
        ),
        Mutant(
            "narrow-least",
            "max(1, int(row.shape[1] * share))",
            "int(row.shape[1] * share)",
            "No token goes on where few are kept.",
        ),
    ),
    *of_file(
        "smi_fast/teacher/sparse_vit.py",
        NARROW,
        Mutant(
            "narrow-size",
            "            narrow=self.narrow,\n",
            "",
            "A narrowed teacher of another size computes all tokens.",
        ),
    ),
    *of_file(
        "smi_fast/teacher/ragged.py",
        "tests/teacher/test_ragged.py::test_each_image_is_as_if_it_were_alone",
        Mutant(
            "ragged-offsets",
            "F.pad(self.lengths.cumsum(0), (1, 0))",
            "F.pad(self.lengths.flip(0).cumsum(0), (1, 0))",
            "Images take the tokens of others.",
        ),
    ),
)
