"""Penalties g(U): what "sparse" means. One a file."""

from convexprune.solvers.penalties.base import Homogeneous, Penalty, is_homogeneous
from convexprune.solvers.penalties.group import GroupL2
from convexprune.solvers.penalties.l1 import L1
from convexprune.solvers.penalties.restricted import Restricted
from convexprune.solvers.penalties.sparse import NM, TopK

__all__ = ["L1", "NM", "GroupL2", "Homogeneous", "Penalty", "Restricted", "TopK", "is_homogeneous"]
