"""Mutants of pools at a URL."""

from tests.mutants.mutant import Mutant, of_file

REMOTE = "tests/pool/test_remote.py"

MUTANTS = (
    *of_file(
        "smi_fast/pool/pool.py",
        REMOTE,
        Mutant(
            "remote-lines-first",
            "            self._write(made.files)\n"
            "            if loss_line is not None:\n"
            "                self._write({LOSS: loss_line})\n"
            "            self._append(made.lines, None if seconds is None else time_line)\n",
            "            self._append(made.lines, None if seconds is None else time_line)\n"
            "            self._write(made.files)\n"
            "            if loss_line is not None:\n"
            "                self._write({LOSS: loss_line})\n",
            "A batch that is interrupted has lines whose pictures don't exist.",
        ),
    ),
    *of_file(
        "smi_fast/pool/remote.py",
        REMOTE,
        Mutant(
            "remote-metadata-first",
            "        self._store.write(contents)\n"
            "        if len(metadata[METADATA]) != self._sizes.get(METADATA, 0):"
            "  # lines are only appended\n"
            "            self._store.write(metadata)\n",
            "        self._store.write(metadata)\n        self._store.write(contents)\n",
            "A reader sees the metadata of a pool whose report is still the old one.",
        ),
        Mutant(
            "remote-parts",
            "int(found[1]) < batches",
            "int(found[1]) > batches",
            "Parts stay beside the metadata that has them.",
        ),
        Mutant(
            "remote-strays",
            "                if number not in held\n",
            "                if False\n",
            "Loaders find the pictures of a batch that was killed.",
        ),
        Mutant(
            "remote-begun",
            "                self._copy_parts()\n                with",
            "                with",
            "The batches of a killed process are forgotten.",
        ),
        Mutant(
            "remote-missing",
            "                if record[key] not in self._sizes:\n",
            "                if False:\n",
            "A pool that lacks a picture is resumed.",
        ),
        Mutant(
            "remote-deletes-late",
            "        self._lease.check(self._store)\n        self._store.delete(names)\n",
            "        self._store.delete(names)\n",
            "A process whose lock was taken over deletes the pictures of the other.",
        ),
        Mutant(
            "remote-lines-late",
            "        self._lease.check(self._store)  # the pictures may have taken long\n",
            "",
            "A process whose lock was taken over amid a batch adds its lines.",
        ),
        Mutant(
            "remote-part-late",
            "        self._lease.check(self._store)\n        _write_part(",
            "        _write_part(",
            "A process of a group whose lock was taken over amid a batch adds its lines.",
        ),
        Mutant(
            "remote-copies-all",
            "    if names and SETTINGS not in names:\n",
            "    if False:\n",
            "pool check copies a whole bucket that holds no pool.",
        ),
    ),
    *of_file(
        "smi_fast/pool/store.py",
        REMOTE,
        Mutant(
            "store-torn",
            "            if size != len(content)\n",
            "            if False\n",
            "A torn upload is taken for whole.",
        ),
        Mutant(
            "store-move",
            "            if sizes[path] == len(paths[path]) and name != path:\n",
            "            if name != path:\n",
            "A reader sees a torn file under its name.",
        ),
        Mutant(
            "store-again",
            "                if isinstance(error, _FINAL):\n",
            "                if True:\n",
            "A connection that the server has closed ends a pool.",
        ),
        Mutant(
            "store-root",
            'root.rstrip("/") or self._fs.root_marker',
            'root.rstrip("/")',
            "A pool at the root of a server doesn't find its own files.",
        ),
        Mutant(
            "store-outside",
            '                if name.startswith("../"):',
            "                if False:",
            "A server that lists such names overwrites files of this machine.",
        ),
        Mutant(
            "store-rmdir",
            "                if not self._fs.ls(path, detail=False):\n",
            "                if True:\n",
            "Where rmdir deletes what is in a folder, a pool deletes itself.",
        ),
    ),
    *of_file(
        "smi_fast/pool/files.py",
        REMOTE,
        Mutant(
            "files-password",
            'return _PASSWORD.sub(r"\\1:***@", text)',
            "return text",
            "A message shows the password of a URL.",
        ),
    ),
    *of_file(
        "smi_fast/pool/lease.py",
        REMOTE,
        Mutant(
            "lease-ignored",
            "            if held:\n",
            "            if False:\n",
            "Two processes add images to one pool.",
        ),
        Mutant(
            "lease-silent",
            "            if not said:\n",
            "            if False:\n",
            "A command that waits a minute for a lock says nothing.",
        ),
        Mutant(
            "lease-lost",
            "        if self.name not in store.names(LOCKS):\n",
            "        if False:\n",
            "A process whose lock was taken over goes on.",
        ),
        Mutant(
            "lease-pause",
            "min(now - self._last, 2 * _LOOK)",
            "now - self._last",
            "A process that was stopped with all others takes the lock of one that goes on.",
        ),
    ),
    *of_file(
        "smi_fast/fill.py",
        "tests/test_fill.py -k in_place_of_a_pool",
        Mutant(
            "fill-url",
            "    if not isinstance(pool, Pool):\n",
            "    if False:\n",
            "A URL in place of a pool is an error that names neither.",
        ),
    ),
    *of_file(
        "smi_fast/pool/export.py",
        "tests/pool/test_export.py",
        Mutant(
            "export-url",
            "    path = folder_of(path)\n",
            "    path = Path(path)\n",
            "An export to a URL goes into a folder with a strange name.",
        ),
    ),
)
