"""The solver layer: layerwise convex programs, solvers by name, and a certificate for every answer.

>>> from convexprune.solvers import LayerProgram, ReluBall, solve
>>> solution = solve(LayerProgram(X, ReluBall(Y, eps=0.1 * Y.norm())))  # doctest: +SKIP
"""

from convexprune.solvers import admm as _admm
from convexprune.solvers import continuation as _continuation
from convexprune.solvers import published as _published
from convexprune.solvers import quadratic as _quadratic
from convexprune.solvers.backends import clarabel_ as _clarabel
from convexprune.solvers.backends import cvxpy_ as _cvxpy
from convexprune.solvers.backends import osqp_ as _osqp
from convexprune.solvers.backends import scs_ as _scs
from convexprune.solvers.caratheodory import caratheodory
from convexprune.solvers.certificate import Certificate, certify
from convexprune.solvers.crosscheck import crosscheck
from convexprune.solvers.ellipsoid import Ellipsoid, LownerEllipsoid, lowner_ellipsoid
from convexprune.solvers.epsilon import feasible_eps
from convexprune.solvers.feasible import make_feasible
from convexprune.solvers.fits import Ball, NetTrimLoss, NetTrimSet, ReluBall, ReluLoss, SquaredLoss
from convexprune.solvers.gram import Gram
from convexprune.solvers.guarantees import proven_zeros, support_bounds
from convexprune.solvers.hull import Combination, OutsideHull
from convexprune.solvers.interface import Proposal, Start
from convexprune.solvers.iterative import IterativeSolver
from convexprune.solvers.lewis import LevelEllipsoid, level_ellipsoid, lewis_weights
from convexprune.solvers.max_norm import MaxNormCoreset, max_norm_coreset
from convexprune.solvers.path import EpsPath, PathPoint, smallest_eps, solve_path
from convexprune.solvers.penalties import L1, NM, GroupL2, Restricted, TopK
from convexprune.solvers.program import LayerProgram
from convexprune.solvers.refit import refit
from convexprune.solvers.registry import available, register
from convexprune.solvers.solution import Solution, Status
from convexprune.solvers.solve import solve

__all__ = [
    "L1",
    "NM",
    "Ball",
    "Certificate",
    "Combination",
    "Ellipsoid",
    "EpsPath",
    "Gram",
    "GroupL2",
    "IterativeSolver",
    "LayerProgram",
    "LevelEllipsoid",
    "LownerEllipsoid",
    "MaxNormCoreset",
    "NetTrimLoss",
    "NetTrimSet",
    "OutsideHull",
    "PathPoint",
    "Proposal",
    "ReluBall",
    "ReluLoss",
    "Restricted",
    "Solution",
    "SquaredLoss",
    "Start",
    "Status",
    "TopK",
    "available",
    "caratheodory",
    "certify",
    "crosscheck",
    "feasible_eps",
    "level_ellipsoid",
    "lewis_weights",
    "lowner_ellipsoid",
    "make_feasible",
    "max_norm_coreset",
    "proven_zeros",
    "refit",
    "register",
    "smallest_eps",
    "solve",
    "solve_path",
    "support_bounds",
]

del _admm, _clarabel, _continuation, _cvxpy, _osqp, _published, _quadratic, _scs  # imported to register their solvers
