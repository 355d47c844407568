"""Objectives: the weighted terms of the loss."""

from smi_fast.objectives.adversarial import AdversarialJS
from smi_fast.objectives.attention_prior import AttentionPrior
from smi_fast.objectives.base import LossInputs, Objective, UserTerm, as_objectives, value_of
from smi_fast.objectives.batch_norm import BatchNormMatching
from smi_fast.objectives.classification import BinaryCrossEntropy, CrossEntropy
from smi_fast.objectives.embedding_target import EmbeddingTarget
from smi_fast.objectives.gaussian_similarity import GaussianSimilarity
from smi_fast.objectives.head_similarity import HeadSimilarity
from smi_fast.objectives.neuron_target import NeuronTarget
from smi_fast.objectives.patch_similarity import PatchSimilarity
from smi_fast.objectives.pixels import L2Norm, PatchSeamTV, TotalVariation, VariationTarget
from smi_fast.objectives.token_statistics import TokenStatistics, collect_statistics

__all__ = [
    "AdversarialJS",
    "AttentionPrior",
    "BatchNormMatching",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "EmbeddingTarget",
    "GaussianSimilarity",
    "HeadSimilarity",
    "L2Norm",
    "LossInputs",
    "NeuronTarget",
    "Objective",
    "PatchSeamTV",
    "PatchSimilarity",
    "TokenStatistics",
    "TotalVariation",
    "UserTerm",
    "VariationTarget",
    "as_objectives",
    "collect_statistics",
    "value_of",
]
