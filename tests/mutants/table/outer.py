"""Mutants of the pool, fill, the published interface and verify."""

from tests.mutants.mutant import Mutant, of_file

POOL = "tests/pool/test_pool.py"
COMPAT = "tests/test_compat.py"
DRAWS = f"{COMPAT}::test_draws_and_returns_what_the_published_loop_does"
FILL = "tests/test_fill.py"
BUDGET = "tests/verify/test_budget.py"
CORRECTNESS = "tests/verify/test_correctness.py::test_wrong_kernel_is_seen"

MUTANTS = (
    *of_file(
        "smi_fast/pool/pool.py",
        POOL,
        Mutant(
            "pool-atomic",
            'temporary = path.with_name(f".{path.name}.part")',
            "temporary = path",
            "A file that can't be written is lost.",
        ),
        Mutant(
            "pool-temporary",
            "        with suppress(OSError):\n            temporary.unlink()\n        raise",
            "        raise",
            "A write that fails leaves its part behind.",
        ),
        Mutant(
            "pool-left-overs",
            "                with suppress(OSError):\n"
            "                    (self.path / name).unlink()\n",
            "                pass\n",
            "A batch that fails leaves its images behind.",
        ),
        Mutant(
            "pool-manifest-first",
            "            for name, picture in pictures.items():\n"
            '                self._write(name, partial(picture.save, format="PNG"), held)\n'
            "            self._write(MANIFEST, lambda file: file.write(manifest), held)\n",
            "            self._write(MANIFEST, lambda file: file.write(manifest), held)\n"
            "            for name, picture in pictures.items():\n"
            '                self._write(name, partial(picture.save, format="PNG"), held)\n',
            "An interrupted batch has lines whose files don't exist.",
        ),
        Mutant(
            "pool-unfinished",
            "shutil.rmtree(self.path / UNFINISHED, ignore_errors=True)",
            "pass",
            "Unfinished images stay after their batch was added.",
        ),
        Mutant(
            "pool-rounding",
            ".mul(255).round().byte()",
            ".mul(255).byte()",
            "Pixels are cut off instead of rounded.",
        ),
        Mutant(
            "pool-delete-first",
            "            (self.path / MANIFEST).unlink(missing_ok=True)\n"
            "            for folder in (*FOLDERS.values(), UNFINISHED):\n"
            "                with suppress(FileNotFoundError):\n"
            "                    shutil.rmtree(self.path / folder)\n",
            "            for folder in (*FOLDERS.values(), UNFINISHED):\n"
            "                with suppress(FileNotFoundError):\n"
            "                    shutil.rmtree(self.path / folder)\n"
            "            (self.path / MANIFEST).unlink(missing_ok=True)\n",
            "An interrupted overwrite leaves lines whose files don't exist.",
        ),
        Mutant(
            "pool-number",
            "start=held):\n            files",
            "start=0):\n            files",
            "A second batch replaces the first.",
        ),
        Mutant(
            "pool-order-of-keys",
            "json.dumps(side[key], sort_keys=True)",
            "json.dumps(side[key])",
            "The same settings in another order are refused.",
        ),
    ),
    *of_file(
        "smi_fast/fill.py",
        FILL,
        Mutant(
            "fill-seed",
            "manual_seed((seed << 32) + start)",
            "manual_seed(seed)",
            "Every batch has the same noise.",
        ),
        Mutant(
            "fill-resume",
            "range(len(pool.records), len(labels), batch_size)",
            "range(0, len(labels), batch_size)",
            "A resumed run inverts the first labels again.",
        ),
        Mutant(
            "fill-unfinished",
            "pool.add_unfinished(error.result.images)",
            "pass",
            "The images before a NaN are lost.",
        ),
    ),
    *of_file(
        "smi_fast/compat.py",
        DRAWS,
        Mutant(
            "compat-range",
            "random.randint(-m, m) if drawn",
            "random.randint(0, m) if drawn",
            "Shifts are not drawn as published.",
        ),
        Mutant(
            "compat-flip",
            "random.random() > 0.5",
            "random.random() < 0.5",
            "The other iterations are mirrored.",
        ),
        Mutant(
            "compat-still",
            "flips.append(drawn and random.random() > 0.5)",
            "flips.append(random.random() > 0.5 and drawn)",
            "Around stops a number is drawn, and all later ones differ.",
        ),
        Mutant(
            "compat-targets",
            "targets = drawn.sort().values",
            "targets = drawn",
            "Random targets are not sorted.",
        ),
        Mutant(
            "compat-saved",
            "self._save(result.images if dense else result.masked_images)",
            "self._save(result.images)",
            "A sparse run saves whole images.",
        ),
    ),
    *of_file(
        "smi_fast/verify/budget.py",
        BUDGET,
        Mutant(
            "budget-twice",
            "2 * yardstick + floor * float(exact.abs().max())",
            "200 * yardstick + floor * float(exact.abs().max())",
            "A kernel may have a hundred times the error.",
        ),
        Mutant(
            "budget-norm",
            "error, 2 * (yardstick + random) + noise * norm)",
            "error, 2 * (yardstick + 100 * random) + noise * norm)",
            "A factor that half precision hides in every element is not seen.",
        ),
        Mutant(
            "budget-nan",
            "return self.value <= self.budget  # false for nan",
            "return not self.value > self.budget",
            "A NaN is within every budget.",
        ),
        Mutant(
            "budget-infinity",
            "exact = exact.clamp(-limit, limit)",
            "exact = exact.clamp(-limit, limit).nan_to_num()",
            "A NaN in the reference counts as zero.",
            BUDGET,
            "no call of the grid has a NaN in its exact result",
        ),
        Mutant(
            "budget-eager",
            "torch.where(eager.isfinite(), eager.double(), exact)",
            "eager.double()",
            "Where eager overflows, everything is allowed.",
        ),
    ),
    *of_file(
        "smi_fast/verify/cases.py",
        BUDGET,
        Mutant(
            "cases-rounded",
            "rounded.converted(torch.float64, device).run(SPECIFICATION)",
            "self.converted(torch.float64, device).run(SPECIFICATION)",
            "The rounding of the arguments counts as an error of the kernel.",
        ),
        Mutant(
            "cases-copies",
            "if not torch.equal(ours, eager):",
            "if False:",
            "Copies are not compared.",
            CORRECTNESS,
        ),
        Mutant(
            "cases-expanded",
            "return value[once].to(device, wanted).expand_as(value)",
            "return value.to(device, wanted)",
            "No kernel sees expanded arguments.",
        ),
    ),
    *of_file(
        "smi_fast/verify/correctness.py",
        CORRECTNESS,
        Mutant(
            "verify-wrong",
            "wrong = [str(error) for error in errors if not error.allowed]",
            "wrong = []",
            "A wrong kernel is called right.",
        ),
    ),
)
