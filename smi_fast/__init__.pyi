"""Types of the public names, which ``__init__.py`` imports on first use."""

from smi_fast import compat as compat
from smi_fast import ops as ops
from smi_fast import recipes as recipes
from smi_fast.inversion import InversionResult as InversionResult
from smi_fast.inversion import NonFiniteLoss as NonFiniteLoss
from smi_fast.inversion import SparseInverter as SparseInverter
from smi_fast.inversion import invert as invert
from smi_fast.learning_rate import Cosine as Cosine
from smi_fast.learning_rate import LearningRate as LearningRate
from smi_fast.learning_rate import PerPhase as PerPhase
from smi_fast.objectives import AdversarialJS as AdversarialJS
from smi_fast.objectives import AttentionPrior as AttentionPrior
from smi_fast.objectives import BatchNormMatching as BatchNormMatching
from smi_fast.objectives import BinaryCrossEntropy as BinaryCrossEntropy
from smi_fast.objectives import CrossEntropy as CrossEntropy
from smi_fast.objectives import GaussianSimilarity as GaussianSimilarity
from smi_fast.objectives import HeadSimilarity as HeadSimilarity
from smi_fast.objectives import L2Norm as L2Norm
from smi_fast.objectives import LossInputs as LossInputs
from smi_fast.objectives import Objective as Objective
from smi_fast.objectives import PatchSeamTV as PatchSeamTV
from smi_fast.objectives import PatchSimilarity as PatchSimilarity
from smi_fast.objectives import TokenStatistics as TokenStatistics
from smi_fast.objectives import TotalVariation as TotalVariation
from smi_fast.objectives import UserTerm as UserTerm
from smi_fast.objectives import VariationTarget as VariationTarget
from smi_fast.objectives import collect_statistics as collect_statistics
from smi_fast.objectives import targets as targets
from smi_fast.parametrizations import Fourier as Fourier
from smi_fast.parametrizations import Parametrization as Parametrization
from smi_fast.parametrizations import Pixels as Pixels
from smi_fast.parametrizations import Pyramid as Pyramid
from smi_fast.schedules import Dense as Dense
from smi_fast.schedules import Schedule as Schedule
from smi_fast.schedules import Selection as Selection
from smi_fast.schedules import Stop as Stop
from smi_fast.schedules import StopSchedule as StopSchedule
from smi_fast.schedules import WrongSelection as WrongSelection
from smi_fast.teacher import SparseOutput as SparseOutput
from smi_fast.teacher import SparseViT as SparseViT
from smi_fast.teacher import UnsupportedTeacher as UnsupportedTeacher
from smi_fast.teacher import taps as taps
from smi_fast.zoo import load_cnn as load_cnn
from smi_fast.zoo import load_teacher as load_teacher

__version__: str
