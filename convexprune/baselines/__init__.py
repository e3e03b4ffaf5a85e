"""Other pruning methods, to compare with."""

from convexprune.baselines.magnitude import magnitude_prune_

__all__ = ["magnitude_prune_"]
