"""The solver layer: layerwise convex programs, solvers by name, and a certificate for every answer.

>>> from convexprune.solvers import LayerProgram, ReluBall, solve
>>> solution = solve(LayerProgram(X, ReluBall(Y, eps=0.1 * Y.norm())))  # doctest: +SKIP
"""

from convexprune.solvers.certificate import Solution, Status, certify
from convexprune.solvers.methods import available, crosscheck, register, solve, solve_path
from convexprune.solvers.programs import L1, Ball, LayerProgram, NetTrimSet, ReluBall, SquaredLoss, TopK

__all__ = [
    "L1",
    "Ball",
    "LayerProgram",
    "NetTrimSet",
    "ReluBall",
    "Solution",
    "SquaredLoss",
    "Status",
    "TopK",
    "available",
    "certify",
    "crosscheck",
    "register",
    "solve",
    "solve_path",
]
