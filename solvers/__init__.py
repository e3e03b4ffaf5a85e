"""The solver layer: layerwise convex programs, solvers by name, and a certificate for every answer.

>>> from convexprune.solvers import LayerProgram, ReluBall, solve
>>> solution = solve(LayerProgram(X, ReluBall(Y, eps=0.1 * Y.norm())))  # doctest: +SKIP
"""

from convexprune.solvers import admm as _admm
from convexprune.solvers import published as _published
from convexprune.solvers.backends import cvxpy_ as _cvxpy
from convexprune.solvers.certificate import Certificate, certify
from convexprune.solvers.crosscheck import crosscheck
from convexprune.solvers.fits import Ball, NetTrimLoss, NetTrimSet, ReluBall, ReluLoss, SquaredLoss
from convexprune.solvers.gram import Gram
from convexprune.solvers.interface import IterativeSolver, Proposal, Start
from convexprune.solvers.penalties import L1, NM, GroupL2, TopK
from convexprune.solvers.program import LayerProgram
from convexprune.solvers.registry import available, register
from convexprune.solvers.solution import Solution, Status
from convexprune.solvers.solve import solve

__all__ = [
    "L1",
    "NM",
    "Ball",
    "Certificate",
    "Gram",
    "GroupL2",
    "IterativeSolver",
    "LayerProgram",
    "NetTrimLoss",
    "NetTrimSet",
    "Proposal",
    "ReluBall",
    "ReluLoss",
    "Solution",
    "SquaredLoss",
    "Start",
    "Status",
    "TopK",
    "available",
    "certify",
    "crosscheck",
    "register",
    "solve",
]

del _admm, _cvxpy, _published  # imported to register their solvers
