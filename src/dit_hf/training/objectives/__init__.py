"""Training objectives: what a transformer learns to predict, at which times, and how it is compared with its target.

An objective is an object with the interface of [`Objective`]. A new one is a subclass and, to be chosen by a flag, a
row of [`OBJECTIVES`]; `Trainer` takes any instance.
"""

from .auxiliary import AuxiliaryLoss
from .base import Objective
from .diffusion import EpsilonObjective, MinSNR
from .distillation import DistillationObjective
from .flow import ClampedVelocityObjective, VelocityObjective
from .flow_maps import GUIDED, FlowMapObjective, MeanFlowObjective, SoFlowObjective
from .table import OBJECTIVES, choose_objective
from .times import TIME_SAMPLERS, LogitNormal, Shifted, Uniform


__all__ = [
    "GUIDED",
    "OBJECTIVES",
    "TIME_SAMPLERS",
    "AuxiliaryLoss",
    "ClampedVelocityObjective",
    "DistillationObjective",
    "EpsilonObjective",
    "FlowMapObjective",
    "LogitNormal",
    "MeanFlowObjective",
    "MinSNR",
    "Objective",
    "Shifted",
    "SoFlowObjective",
    "Uniform",
    "VelocityObjective",
    "choose_objective",
]
