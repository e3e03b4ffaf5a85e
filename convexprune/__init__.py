"""Prune trained networks by convex optimisation, with a certificate for every layer.

``prune_(model, calibration, eps=0.1)`` prunes a whole model in place, ``coreset_prune_(model, calibration, "mussay",
0.5)`` removes neurons or weights by a coreset; ``keep_masks_`` keeps zeros through fine-tuning; ``verify`` recomputes
what a run claims; ``layer_program`` and ``write_back_`` do one layer by hand; ``convexprune.solvers`` is the
optimisation underneath.
"""

from convexprune.coresets import coreset_prune_
from convexprune.files import load_weights_into_, save_weights
from convexprune.masks import keep_masks_, make_permanent_
from convexprune.matrices import write_back_
from convexprune.nettrim import layer_program, prune_
from convexprune.nettrim.verify import verify
from convexprune.report import Report

__all__ = [
    "Report",
    "coreset_prune_",
    "keep_masks_",
    "layer_program",
    "load_weights_into_",
    "make_permanent_",
    "prune_",
    "save_weights",
    "verify",
    "write_back_",
]
