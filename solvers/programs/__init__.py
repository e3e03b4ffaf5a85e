"""Layer programs: a penalty, a fit of the outputs X U, and the inputs X or their Gram."""

from convexprune.solvers.programs.fits import Ball, Fit, NetTrimLoss, NetTrimSet, ReluBall, ReluLoss, SquaredLoss
from convexprune.solvers.programs.gram import Gram
from convexprune.solvers.programs.penalties import L1, NM, GroupL2, Penalty, Restricted, TopK
from convexprune.solvers.programs.program import LayerProgram

__all__ = [
    "L1",
    "NM",
    "Ball",
    "Fit",
    "Gram",
    "GroupL2",
    "LayerProgram",
    "NetTrimLoss",
    "NetTrimSet",
    "Penalty",
    "ReluBall",
    "ReluLoss",
    "Restricted",
    "SquaredLoss",
    "TopK",
]
