"""Fits f(Z): what the layer's outputs Z = X U must keep. One geometry a file, one measure for any of them."""

from convexprune.solvers.programs.fits.linear import Ball, SquaredLoss
from convexprune.solvers.programs.fits.nettrim import NetTrimLoss, NetTrimSet
from convexprune.solvers.programs.fits.protocol import Fit
from convexprune.solvers.programs.fits.relu import ReluBall, ReluLoss

__all__ = ["Ball", "Fit", "NetTrimLoss", "NetTrimSet", "ReluBall", "ReluLoss", "SquaredLoss"]
