"""Ellipsoids, hulls and coresets of points: Löwner, Lewis, Carathéodory."""

from convexprune.solvers.geometry import cvxpy_ as _cvxpy
from convexprune.solvers.geometry import exchange as _exchange
from convexprune.solvers.geometry import multiplicative as _multiplicative
from convexprune.solvers.geometry import working_set as _working_set
from convexprune.solvers.geometry.caratheodory import caratheodory
from convexprune.solvers.geometry.ellipsoid import Ellipsoid, LownerEllipsoid, lowner_ellipsoid
from convexprune.solvers.geometry.hull import Combination, OutsideHull
from convexprune.solvers.geometry.lewis import LevelEllipsoid, level_ellipsoid, lewis_weights
from convexprune.solvers.geometry.max_norm import MaxNormCoreset, max_norm_coreset

__all__ = [
    "Combination",
    "Ellipsoid",
    "LevelEllipsoid",
    "LownerEllipsoid",
    "MaxNormCoreset",
    "OutsideHull",
    "caratheodory",
    "level_ellipsoid",
    "lewis_weights",
    "lowner_ellipsoid",
    "max_norm_coreset",
]

del _cvxpy, _exchange, _multiplicative, _working_set  # imported to register their methods
