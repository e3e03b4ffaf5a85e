"""Penalties g(U): what "sparse" means. One a file."""

from convexprune.solvers.programs.penalties.base import Homogeneous, Penalty, is_homogeneous
from convexprune.solvers.programs.penalties.group import GroupL2
from convexprune.solvers.programs.penalties.l1 import L1
from convexprune.solvers.programs.penalties.restricted import Restricted
from convexprune.solvers.programs.penalties.sparse import NM, TopK

__all__ = ["L1", "NM", "GroupL2", "Homogeneous", "Penalty", "Restricted", "TopK", "is_homogeneous"]
