"""Layer programs: a penalty, a fit of the outputs X U, and the inputs X or their Gram."""

from convexprune.solvers.programs.fits import Fit
from convexprune.solvers.programs.geometries import Ball, NetTrimLoss, NetTrimSet, ReluBall, ReluLoss, SquaredLoss
from convexprune.solvers.programs.gram import Gram
from convexprune.solvers.programs.penalties import L1, GroupL2, Penalty
from convexprune.solvers.programs.program import LayerProgram
from convexprune.solvers.programs.supports import NM, Restricted, TopK

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
