"""Fits f(Z): what the layer's outputs Z = X U must keep."""

from convexprune.solvers.programs.fits.base import Fit
from convexprune.solvers.programs.fits.geometries import Ball, NetTrimLoss, NetTrimSet, ReluBall, ReluLoss, SquaredLoss

__all__ = ["Ball", "Fit", "NetTrimLoss", "NetTrimSet", "ReluBall", "ReluLoss", "SquaredLoss"]
