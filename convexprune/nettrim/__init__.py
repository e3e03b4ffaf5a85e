"""Net-Trim over whole models: parallel and cascade, tolerances and budgets, from one journal."""

from convexprune.nettrim.layer import layer_program
from convexprune.nettrim.posed import FITS
from convexprune.nettrim.prune import prune_

__all__ = ["FITS", "layer_program", "prune_"]
