"""Mutants of pool/, and of the modules that fill pools."""

from tests.mutants.mutant import Mutant, of_file

STORED = "tests/pool/test_pool.py"
POOL = f"{STORED} tests/pool/test_pool_interrupted.py tests/pool/test_pool_opened.py"
FILL = "tests/test_fill.py tests/test_fill_ended.py"

MUTANTS = (
    *of_file(
        "smi_fast/pool/pool.py",
        POOL,
        Mutant(
            "pool-left-overs",
            "                self._settle()  # an interrupt may have come after the last line\n",
            "                pass\n",
            "A batch that fails leaves its images behind.",
        ),
        Mutant(
            "pool-metadata-first",
            "            self._write(made.files)\n",
            '            metadata.append(self.path / METADATA, b"".join(made.lines), self._size)\n'
            "            self._write(made.files)\n",
            "An interrupted batch has lines whose files don't exist.",
        ),
        Mutant(
            "pool-unfinished",
            "made.lines))\n        self._discard_unfinished()\n",
            "made.lines))\n",
            "Unfinished images stay after their batch was added.",
        ),
        Mutant(
            "pool-missing",
            "                pool._check_present(found[0])\n",
            "",
            "A pool that lacks a file is resumed.",
        ),
        Mutant(
            "pool-parse",
            "return super().records if self._records is None else list(self._records)",
            "return super().records",
            "Each batch reads the whole metadata.",
        ),
        Mutant(
            "pool-number",
            '"start": self._held}',
            '"start": 0}',
            "A second batch replaces the first.",
        ),
        Mutant(
            "pool-strays",
            "        self._delete_strays(ahead)\n",
            "",
            "Loaders of folders find the images of a batch that was killed.",
        ),
    ),
    *of_file(
        "smi_fast/pool/contents.py",
        POOL,
        Mutant(
            "pool-delete-first",
            "        for name in (METADATA, CLASSES, CARD, *REPORTS):\n"
            "            delete_file(path / name)\n"
            "        delete_parts(path)\n"
            "        for folder in reversed(folders):\n"
            "            delete_pictures(folder)\n",
            "        for folder in reversed(folders):\n"
            "            delete_pictures(folder)\n"
            "        delete_parts(path)\n"
            "        for name in (METADATA, CLASSES, CARD, *REPORTS):\n"
            "            delete_file(path / name)\n",
            "An interrupted overwrite leaves lines whose files don't exist.",
        ),
        Mutant(
            "pool-link",
            'for folder in filter(Path.is_symlink, (*folders, path / "report", path / PARTS)):',
            "for folder in filter(Path.is_symlink, []):",
            "An overwrite that leaves a linked folder alone says nothing.",
        ),
    ),
    *of_file(
        "smi_fast/pool/shards.py",
        "tests/pool/test_shards.py",
        Mutant(
            "shards-order",
            "patches.append(grid.swapaxes(1, 2)[mask > 0])",
            "patches.append(grid.swapaxes(1, 2)[mask > 0][::-1])",
            "Patches aren't in the order of their places.",
        ),
        Mutant(
            "shards-missing",
            'if (header["shard"], header["shards"]) != (str(number), str(count)):',
            "if False:",
            "A missing shard is not noticed.",
        ),
        Mutant(
            "shards-normalised",
            "return space.normalize(pixels).flatten(-3)",
            "return pixels.flatten(-3)",
            "The teacher sees patches in another space than it was trained in.",
        ),
        Mutant(
            "shards-room",
            "        room -= needed\n",
            "",
            "A shard grows without a limit.",
        ),
    ),
    *of_file(
        "smi_fast/pool/export.py",
        "tests/pool/test_export.py",
        Mutant(
            "export-folder",
            "if any(path.iterdir()):",
            "if False:",
            "What is exported mixes with other files.",
        ),
    ),
    *of_file(
        "smi_fast/pool/page.py",
        "tests/pool/test_page.py",
        Mutant(
            "page-escape",
            'name, shown = escape(group[0]["class_name"]), group[:MOST_PER_CLASS]',
            'name, shown = group[0]["class_name"], group[:MOST_PER_CLASS]',
            "A class of a strange name runs as a script.",
        ),
        Mutant(
            "page-last-bin",
            "counts[min(int(value * BINS), BINS - 1)] += 1",
            "counts[int(value * BINS) % BINS] += 1",
            "An image of confidence 1 counts among those of 0.",
        ),
    ),
    *of_file(
        "smi_fast/pool/parts.py",
        "tests/pool/test_parts.py",
        Mutant(
            "parts-torn",
            "        if len(lines) == size:\n",
            "        if lines:\n",
            "A part of a batch counts.",
        ),
        Mutant(
            "parts-turn",
            "        if number not in ahead:\n            break\n",
            "        if number not in ahead:\n            continue\n",
            "Batches come into the metadata before those that are missing.",
        ),
        Mutant(
            "parts-free",
            "    if any(map(_is_locked, _files(path, _LOCKS))):\n",
            "    if False:\n",
            "A pool is resumed while a process of a group still adds images.",
        ),
    ),
    *of_file(
        "smi_fast/group.py",
        "tests/test_group.py",
        Mutant(
            "group-next",
            'int(self._store.add("next", 1)) - 1',
            'int(self._store.add(f"next{self.rank}", 1)) - 1',
            "Each process makes all batches.",
            "tests/test_group.py::test_numbers_are_given_out_once",
        ),
    ),
    *of_file(
        "smi_fast/pool/check.py",
        "tests/pool/test_pool_check.py",
        Mutant(
            "check-hash",
            'fingerprint(contents) != record["sha256"]:',
            "not contents:",
            "A picture that was replaced by another is taken for whole.",
        ),
        Mutant(
            "check-mask",
            'if kept == record.get("kept") else',
            "if True else",
            "A mask of other patches is taken for whole.",
        ),
    ),
    *of_file(
        "smi_fast/pool/merge.py",
        "tests/pool/test_merge.py",
        Mutant(
            "merge-trajectory",
            'record["trajectory"] + trajectory',
            'record["trajectory"]',
            "Trajectories of different pools share a number.",
        ),
        Mutant(
            "merge-held",
            "_check_held(made.path, held[start : start + len(new)], new)",
            "pass",
            "A merge goes on from the images of other pools.",
        ),
    ),
    *of_file(
        "smi_fast/pool/settings.py",
        POOL,
        Mutant(
            "pool-order-of-keys",
            "json.dumps(side[key], sort_keys=True)",
            "json.dumps(side[key])",
            "The same settings in another order are refused.",
        ),
    ),
    *of_file(
        "smi_fast/pool/batch.py",
        POOL,
        Mutant(
            "batch-rounding",
            ".mul(255).round().byte()",
            ".mul(255).byte()",
            "Pixels are cut off instead of rounded.",
        ),
        Mutant(
            "batch-encoders",
            "_ENCODERS = 4",
            "_ENCODERS = 1",
            "One thread encodes all pictures, which a GPU waits for.",
            STORED,
        ),
        Mutant(
            "pool-background",
            'masks, settings["background"])',
            'masks, "mean")',
            "Masked images have the mean colour whatever the pool says.",
        ),
    ),
    *of_file(
        "smi_fast/pool/metadata.py",
        POOL,
        Mutant(
            "metadata-torn",
            "return records[: end if len(records) == end else start], whole",
            "return records, whole",
            "A part of a batch counts, and the next one starts from another seed.",
        ),
        Mutant(
            "metadata-texts",
            "intern(value) if",
            "value if",
            "Each record holds the same long texts once more.",
        ),
        Mutant(
            "metadata-cut",
            "    cut(path, size)\n    path.parent",
            "    path.parent",
            "A line is written behind a torn one, and both are lost.",
        ),
    ),
    *of_file(
        "smi_fast/pool/layout.py",
        "tests/pool/test_loaders.py",
        Mutant(
            "layout-class-names",
            "{max(4, len(str(classes - 1)))}",
            "4",
            "Folders of classes don't sort as the classes do.",
            f"{STORED}::test_class_folders_sort_as_the_classes_do",
        ),
    ),
    *of_file(
        "smi_fast/pool/files.py",
        POOL,
        Mutant(
            "files-atomic",
            'return path.with_name(f".{path.name}.part")',
            "return path",
            "A file that can't be written is lost.",
        ),
        Mutant(
            "files-url",
            "    if is_url(path):\n",
            "    if False:\n",
            "A pool at a URL becomes a folder named s3: on this machine.",
        ),
        Mutant(
            "files-temporary",
            "        with suppress(OSError):\n            temporary.unlink()\n        raise",
            "        raise",
            "A write that fails leaves its part behind.",
        ),
        Mutant(
            "files-foreign",
            "    found = _PICTURE.fullmatch(name)\n",
            '    found = _PICTURE.search("000000.png")\n',
            "An overwrite deletes files that the pool didn't write.",
        ),
    ),
    *of_file(
        "smi_fast/plan.py",
        FILL,
        Mutant(
            "fill-resume",
            "if trajectory.start >= plan.held]",
            "]",
            "A resumed run inverts the first labels again.",
        ),
        Mutant(
            "fill-trajectory",
            "last.label == label and last.images < most",
            "last.images < most",
            "An image has the label of the trajectory before it.",
        ),
    ),
    *of_file(
        "smi_fast/pool/writer.py",
        FILL,
        Mutant(
            "writer-thread",
            "        self._last = self._threads.submit(job)\n",
            "        job()\n",
            "The next batch waits until the one before is written.",
        ),
        Mutant(
            "writer-error",
            "        if kind is None:\n            self.wait()\n",
            "",
            "The last batch is lost without a word.",
        ),
    ),
    *of_file(
        "smi_fast/batch_maker.py",
        FILL,
        Mutant(
            "fill-seed",
            "return (seed << 32) + start",
            "return seed",
            "Every batch has the same noise.",
            "tests/test_batch_seeds.py",
        ),
    ),
    *of_file(
        "smi_fast/workers.py",
        FILL,
        Mutant(
            "workers-loss",
            "loss=None if self._last_is_held else made.loss,",
            "loss=made.loss,",
            "The pool shows the loss of the batch that was written last.",
        ),
        Mutant(
            "workers-stop",
            "            self._group.stop()\n",
            "            pass\n",
            "A group goes on after Ctrl-C.",
        ),
        Mutant(
            "workers-dead",
            "any(map(self._pool.part_is_held, holding))",
            "bool(holding)",
            "A group waits for a process that was killed.",
        ),
    ),
    *of_file(
        "smi_fast/soft_stop.py",
        FILL,
        Mutant(
            "stop-second",
            "        signal.signal(signal.SIGINT, signal.default_int_handler)\n        # Not",
            "        # Not",
            "A second Ctrl-C does nothing.",
        ),
    ),
    *of_file(
        "smi_fast/job_progress.py",
        "tests/test_job_progress.py",
        Mutant(
            "progress-rate",
            "(self._total - done.images) / rate",
            "self._total / rate",
            "The time that is left doesn't shrink.",
        ),
    ),
    *of_file(
        "smi_fast/fill.py",
        FILL,
        Mutant(
            "fill-dead",
            "    if not first or len(pool.records) == len(labels):\n",
            "    if not first or not stop.wanted:\n",
            "A group leaves out what a process that died had taken.",
        ),
        Mutant(
            "fill-unfinished",
            "worker.add_unfinished(error.result.images, start)",
            "pass",
            "The images before a NaN are lost.",
        ),
    ),
)
