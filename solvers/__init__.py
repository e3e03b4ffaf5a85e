"""The solver layer: layerwise convex programs, solvers by name, and a certificate for every answer.

>>> from convexprune.solvers import LayerProgram, ReluBall, solve
>>> solution = solve(LayerProgram(X, ReluBall(Y, eps=0.1 * Y.norm())))  # doctest: +SKIP
"""

from convexprune.solvers import admm as _admm
from convexprune.solvers import published as _published
from convexprune.solvers.backends import cvxpy_ as _cvxpy
from convexprune.solvers.certificate import Certificate, certify
from convexprune.solvers.crosscheck import crosscheck
from convexprune.solvers.fits import Ball, NetTrimSet, ReluBall
from convexprune.solvers.interface import IterativeSolver, Proposal, Start
from convexprune.solvers.penalties import L1
from convexprune.solvers.program import LayerProgram
from convexprune.solvers.registry import available, register
from convexprune.solvers.solution import Solution, Status
from convexprune.solvers.solve import solve

__all__ = [
    "L1",
    "Ball",
    "Certificate",
    "IterativeSolver",
    "LayerProgram",
    "NetTrimSet",
    "Proposal",
    "ReluBall",
    "Solution",
    "Start",
    "Status",
    "available",
    "certify",
    "crosscheck",
    "register",
    "solve",
]

del _admm, _cvxpy, _published  # imported to register their solvers
