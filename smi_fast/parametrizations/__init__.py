"""Parametrizations: what the optimiser moves, and how images come from it."""

from smi_fast.parametrizations.base import Parametrization
from smi_fast.parametrizations.fourier import Fourier
from smi_fast.parametrizations.pixels import Pixels
from smi_fast.parametrizations.pyramid import Pyramid
from smi_fast.parametrizations.sigmoid import SigmoidParametrization

__all__ = ["Fourier", "Parametrization", "Pixels", "Pyramid", "SigmoidParametrization"]
