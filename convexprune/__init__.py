"""Prune trained networks by convex optimisation, with a certificate for every layer.

``prune_(model, calibration, eps=0.1)`` prunes a whole model in place; ``layer_program`` and ``write_back_`` do one
layer by hand; ``convexprune.solvers`` is the optimisation underneath.
"""

from convexprune.files import save_weights
from convexprune.matrices import write_back_
from convexprune.nettrim import layer_program, prune_
from convexprune.report import Report

__all__ = ["Report", "layer_program", "prune_", "save_weights", "write_back_"]
