"""Mutants of parametrizations/ and learning_rate.py."""

from tests.mutants.mutant import Mutant, of_file

RATE = "tests/test_learning_rate.py"
FOURIER = "tests/parametrizations/test_fourier.py"
PARAMETRIZATIONS = "tests/parametrizations/test_parametrizations.py"

MUTANTS = (
    *of_file(
        "smi_fast/parametrizations/fourier.py",
        FOURIER,
        Mutant(
            "fourier-variance",
            "variance[0] = 1",
            "variance[0] = 4",
            "The contrast depends on the size of the image.",
        ),
        Mutant(
            "fourier-even",
            "if space.width % 2 == 0:",
            "if space.width % 2 == 1:",
            "The contrast depends on whether the width is even.",
        ),
        Mutant(
            "fourier-lowest",
            "lowest = max(flat_below, 1 / max(space.height, space.width))",
            "lowest = max(flat_below, 1 / min(space.height, space.width))",
            "The lowest frequency is that of the shorter side.",
        ),
        Mutant(
            "fourier-start",
            "return (noise * self.start).to(self._scale)",
            "return noise.to(self._scale)",
            "Images start with full contrast.",
        ),
        Mutant(
            "fourier-colours",
            "self._colours @ u.flatten(2)",
            "self._colours.mT @ u.flatten(2)",
            "Colours are mixed by the transposed matrix.",
        ),
        Mutant(
            "fourier-colours-contrast",
            "colours * (3**0.5 / colours.norm())",
            "colours / colours.norm(dim=0).max()",
            "Colours of photographs lower the contrast.",
        ),
        Mutant(
            "fourier-flat-below",
            "lowest = max(flat_below, 1 / max(space.height, space.width))",
            "lowest = 1 / max(space.height, space.width)",
            "The lowest frequencies move faster than the flat ones.",
        ),
    ),
    *of_file(
        "smi_fast/parametrizations/pyramid.py",
        "tests/parametrizations/test_pyramid.py",
        Mutant(
            "pyramid-variances",
            "dim=1) / len(sides) ** 0.5",
            "dim=1) / len(sides)",
            "The contrast depends on the number of levels.",
        ),
        Mutant(
            "pyramid-order",
            "F.pad(full, (smaller, 0))",
            "F.pad(full, (0, smaller))",
            "A given image goes into the smallest levels.",
        ),
    ),
    *of_file(
        "smi_fast/inversion/state.py",
        "tests/objectives/test_batch_norm.py::test_autocast_does_not_reach_the_cnn",
        Mutant(
            "images-autocast",
            "torch.autocast(parameters.device.type, enabled=False)",
            "torch.autocast(parameters.device.type, enabled=torch.is_autocast_enabled('cpu'))",
            "Autocast rounds the colours of images.",
        ),
    ),
    *of_file(
        "smi_fast/parametrizations/sigmoid.py",
        "tests/parametrizations/test_sigmoid.py",
        Mutant(
            "sigmoid-subclass",
            "if type(self).images is not SigmoidParametrization.images:",
            "if False:",
            "The teacher doesn't see what a subclass makes of the images.",
        ),
        Mutant(
            "sigmoid-margin",
            ".clamp(MARGIN, 1 - MARGIN).logit()",
            ".logit()",
            "A black pixel has infinite parameters.",
            FOURIER,
        ),
    ),
    *of_file(
        "smi_fast/parametrizations/base.py",
        f"{PARAMETRIZATIONS}::test_binding_leaves_the_given_parametrization_as_it_was",
        Mutant(
            "parametrization-bind",
            "bound = copy.copy(self)",
            "bound = self",
            "The parametrization of the caller changes.",
        ),
    ),
    *of_file(
        "smi_fast/learning_rate.py",
        RATE,
        Mutant(
            "rate-restart",
            "cycles = self.restarts + 1",
            "cycles = 1",
            "The cosine never starts again.",
        ),
    ),
)
