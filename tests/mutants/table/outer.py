"""Mutants of converters, the published interface, verify, and other modules at the top."""

from tests.mutants.mutant import Mutant, of_file

COMPAT = "tests/compat/test_smi.py"
DRAWS = f"{COMPAT}::test_draws_and_returns_what_the_published_loop_does"
CONVERT = "tests/convert/test_torchvision.py"
BUDGET = "tests/verify/test_budget.py"
CORRECTNESS = "tests/verify/test_correctness.py::test_wrong_kernel_is_seen"

MUTANTS = (
    *of_file(
        "examples/linear_gradient_matching.py",
        "tests/test_examples.py",
        Mutant(
            "example-gradient",
            "wrong = (features @ head.T).softmax(1) - F.one_hot(labels, len(head))",
            "wrong = (features @ head.T).softmax(1)",
            "The closed gradient of a linear head forgets the labels.",
        ),
    ),
    *of_file(
        "smi_fast/visualize.py",
        "tests/test_visualize.py",
        Mutant(
            "visualize-labels",
            '{"label": first + i,',
            '{"label": i,',
            "The second batch of neurons has the names of the first.",
        ),
        Mutant(
            "visualize-resume",
            "if start < held:",
            "if False:",
            "A resumed pool has its first neurons twice.",
        ),
        Mutant(
            "visualize-kept",
            "        result.kept,\n",
            "",
            "The activation is that of the whole image.",
        ),
        Mutant(
            "visualize-importance",
            "if before >= 0 else Attention()",
            "if False else Attention()",
            "Sparse images keep the patches that the class token attends to.",
        ),
    ),
    *of_file(
        "smi_fast/convert/dinov3.py",
        "tests/convert/test_huggingface.py",
        Mutant(
            "dinov3-theta",
            "rope_temperature=config.rope_theta,",
            "rope_temperature=100.0,",
            "Patches turn by other angles than the model's.",
        ),
        Mutant(
            "dinov3-act",
            "if config.hidden_act != expected:",
            "if False:",
            "Another activation is only found out by the proof.",
        ),
    ),
    *of_file(
        "smi_fast/convert/build.py",
        CONVERT,
        Mutant(
            "convert-proof",
            "if not apart <= TOLERANCE:  # not finite counts as different",
            "if False:",
            "A model with another activation is converted.",
            f"{CONVERT}::test_what_is_refused",
        ),
        Mutant(
            "convert-eps",
            "norm_layer=partial(LayerNorm, eps=eps),",
            "norm_layer=LayerNorm,",
            "LayerNorm has timm's eps and not the model's.",
            f"{CONVERT}::test_it_computes_the_same",
        ),
        Mutant(
            "convert-shares",
            "weight.detach().clone() for",
            "weight.detach() for",
            "A change of the conversion changes the model.",
            f"{CONVERT}::test_the_model_stays_as_it_was",
        ),
    ),
    *of_file(
        "smi_fast/judge.py",
        "tests/test_judge.py",
        Mutant(
            "judge-space",
            ".float() - mean) / std)",
            ".float()) / std)",
            "The judge sees images in another space than it was trained in.",
        ),
    ),
    *of_file(
        "smi_fast/provenance.py",
        "tests/test_provenance.py",
        Mutant(
            "provenance-address",
            'return re.sub(" at 0x[0-9a-f]+", "", repr(value))',
            "return repr(value)",
            "A pool with a function of one's own can't be resumed.",
        ),
    ),
    *of_file(
        "smi_fast/calibrate.py",
        "tests/test_calibrate.py",
        Mutant(
            "calibration-mean",
            'image_space(sparse, settings["mean"], settings["std"])',
            "image_space(sparse, None, None)",
            "A pool is normalised with another mean than it was made with.",
        ),
        Mutant(
            "calibration-teacher",
            'settings["teacher_sha256"] != fingerprint(sparse.vit)',
            "False",
            "A pool of another teacher calibrates this one.",
        ),
        Mutant(
            "calibration-normalised",
            "self.space.normalize(self.read(index)[None])[0]",
            "self.read(index)",
            "Batches are pixels in [0, 1].",
        ),
    ),
    *of_file(
        "smi_fast/compat/smi.py",
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
    ),
    *of_file(
        "smi_fast/compat/stops.py",
        "tests/compat/test_published_order.py::test_stops_are_taken_as_published",
        Mutant(
            "compat-skipped",
            "if 0 <= t < iterations and t + 1 not in its})",
            "if 0 <= t < iterations})",
            "A stop that another one follows at once is taken.",
        ),
        Mutant(
            "compat-still-stops",
            "frozenset(t - before for t in its for before in (0, 1))",
            "frozenset(t - before for t in taken for before in (0, 1))",
            "Around a stop that isn't taken images are jittered.",
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
            "budget-missing",
            "torch.where(ours.isnan(), 0.0, torch.nan)",
            "torch.where(ours.isnan(), 0.0, 0.0)",
            "Where the exact result is NaN, everything is allowed.",
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
    *of_file(
        "smi_fast/verify/stages.py",
        "tests/verify/test_stages.py",
        Mutant(
            "stages-first-error",
            "        except Exception as problem:\n            problems",
            "        except KeyboardInterrupt as problem:\n            problems",
            "An error of one stage ends those after it.",
        ),
        Mutant(
            "stages-time",
            "left = max(0.0, end - start)",
            "left = seconds",
            "A stage that hangs takes the time of the others, and the whole has no end.",
        ),
        Mutant(
            "stages-garbage",
            "if not _is_json(line):",
            "if False:",
            "A line that is none ends the report.",
        ),
        Mutant(
            "stages-proof",
            "if problems and stage.proves:",
            "if False:",
            "A check that crashed counts as passed.",
        ),
        Mutant(
            "stages-attempt",
            "    except Exception as problem:\n        said",
            "    except KeyboardInterrupt as problem:\n        said",
            "A precision that fails ends its stage.",
            "tests/test_gpu_benchmark.py::test_a_precision_that_fails_leaves_the_others",
        ),
        Mutant(
            "stages-in-turn",
            "limit = (end - time.monotonic()) / (len(parts) - index)",
            "limit = end - time.monotonic()",
            "The first function that hangs takes the time of all.",
        ),
    ),
    *of_file(
        "smi_fast/verify/captured.py",
        "tests/verify/test_captured.py",
        Mutant(
            "captured-moments",
            'names = ("parameters", "exp_avg", "exp_avg_sq", "record", "iteration")',
            'names = ("parameters", "exp_avg", "record", "iteration")',
            "A replay that loses Adam's second moment passes.",
        ),
        Mutant(
            "captured-bits",
            "torch.equal(_bits(one[name]), _bits(other[name]))",
            "torch.equal(one[name], other[name])",
            "The sign of zero isn't compared, and NaN never equals NaN.",
        ),
    ),
    *of_file(
        "smi_fast/verify/compare.py",
        "tests/verify/test_compare.py",
        Mutant(
            "compare-slower",
            "elif now[name] > SLOWER * milliseconds:",
            "elif now[name] * SLOWER < milliseconds:",
            "What has become faster is called slower.",
        ),
        Mutant(
            "compare-ways",
            'own = [("way", way)] if way else []',
            "own: list[tuple[str, str]] = []",
            "The times of all ways to compute an op are one.",
        ),
    ),
    *of_file(
        "smi_fast/verify/timing.py",
        "tests/verify/test_timing.py",
        Mutant(
            "timing-wrong",
            "if (failures := verdict(backend, device, dtype, [call]).failures)",
            "if (failures := ())",
            "A wrong kernel is timed.",
        ),
    ),
    *of_file(
        "benchmarks/gpu/steps.py",
        "tests/test_gpu_benchmark.py",
        Mutant(
            "gpu-equal-first",
            "if not error <= ALLOWED[precision]:",
            "if False:",
            "Iterations with another gradient get a time.",
        ),
        Mutant(
            "gpu-whole-run",
            "sparse = (last * early + (iterations - last) * late) / 1e3",
            "sparse = iterations * late / 1e3",
            "Whole runs are told too short: the dense iterations before the stops are left out.",
        ),
    ),
    *of_file(
        "benchmarks/gpu/parity.py",
        "tests/test_gpu_benchmark.py",
        Mutant(
            "gpu-parity",
            "if not found[key] < LIMITS[key]]",
            "if found[key] > 1e9]",
            "A replay in float64 may be anywhere.",
        ),
    ),
    *of_file(
        "benchmarks/baselines/strong_dense.py",
        "tests/test_gpu_benchmark.py",
        Mutant(
            "strong-clamp",
            "self.images.clamp_(self._low, self._high)",
            "pass",
            "The strong baseline leaves out a part of the published iteration.",
        ),
        Mutant(
            "strong-frozen",
            ".to(dtype).requires_grad_(False)",
            ".to(dtype)",
            "The strong baseline computes gradients of weights, and is easy to beat.",
        ),
    ),
)
