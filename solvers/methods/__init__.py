"""Methods: solvers by name, one a file, the loop that runs them, and paths of programs."""

from convexprune.solvers.methods import admm as _admm
from convexprune.solvers.methods import continuation as _continuation
from convexprune.solvers.methods import packages as _packages
from convexprune.solvers.methods import published as _published
from convexprune.solvers.methods import quadratic as _quadratic
from convexprune.solvers.methods.epsilon import feasible_eps
from convexprune.solvers.methods.interface import Proposal, Start
from convexprune.solvers.methods.iterative import IterativeSolver
from convexprune.solvers.methods.path import EpsPath, PathPoint, smallest_eps, solve_path
from convexprune.solvers.methods.refit import refit
from convexprune.solvers.methods.registry import available, register
from convexprune.solvers.methods.solve import crosscheck, solve

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

del _admm, _continuation, _packages, _published, _quadratic  # imported to register their solvers
