"""Methods: solvers by name, one a file, the loop that runs them, and paths of programs."""

from convexprune.solvers.methods import admm as _admm
from convexprune.solvers.methods import continuation as _continuation
from convexprune.solvers.methods import published as _published
from convexprune.solvers.methods import quadratic as _quadratic
from convexprune.solvers.methods.backends import clarabel_ as _clarabel
from convexprune.solvers.methods.backends import cvxpy_ as _cvxpy
from convexprune.solvers.methods.backends import osqp_ as _osqp
from convexprune.solvers.methods.backends import scs_ as _scs
from convexprune.solvers.methods.crosscheck import crosscheck
from convexprune.solvers.methods.epsilon import feasible_eps
from convexprune.solvers.methods.interface import Proposal, Start
from convexprune.solvers.methods.iterative import IterativeSolver
from convexprune.solvers.methods.path import EpsPath, PathPoint, smallest_eps, solve_path
from convexprune.solvers.methods.refit import refit
from convexprune.solvers.methods.registry import available, register
from convexprune.solvers.methods.solve import solve

__all__ = [
    "EpsPath",
    "IterativeSolver",
    "PathPoint",
    "Proposal",
    "Start",
    "available",
    "crosscheck",
    "feasible_eps",
    "refit",
    "register",
    "smallest_eps",
    "solve",
    "solve_path",
]

del _admm, _clarabel, _continuation, _cvxpy, _osqp, _published, _quadratic, _scs  # imported to register their solvers
