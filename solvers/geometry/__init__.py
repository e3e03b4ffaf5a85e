"""Ellipsoids, hulls and coresets of points: Löwner, Lewis, Carathéodory."""

from convexprune.solvers.geometry import working_set as _working_set
from convexprune.solvers.geometry.coresets import (
    LevelEllipsoid,
    MaxNormCoreset,
    level_ellipsoid,
    lewis_weights,
    max_norm_coreset,
)
from convexprune.solvers.geometry.ellipsoid import Ellipsoid, LownerEllipsoid, lowner_ellipsoid
from convexprune.solvers.geometry.hull import Combination, OutsideHull, caratheodory

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

del _working_set  # imported to register its method
