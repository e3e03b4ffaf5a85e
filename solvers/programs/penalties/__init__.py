"""Penalties g(U): what "sparse" means."""

from convexprune.solvers.programs.penalties.base import Homogeneous, Penalty, is_homogeneous
from convexprune.solvers.programs.penalties.norms import L1, GroupL2
from convexprune.solvers.programs.penalties.sparse import NM, Restricted, TopK

__all__ = ["L1", "NM", "GroupL2", "Homogeneous", "Penalty", "Restricted", "TopK", "is_homogeneous"]
