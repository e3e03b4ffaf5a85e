"""What the errors of pruned layers can do to a network's outputs: ‖f̂(x) − f(x)‖_F ≤ Σ c_l r_l.

An error travels through the traced forward node by node, multiplied by each operation's Lipschitz constant. The
mathematics is in docs/networks.md.
"""

from convexprune.bounds.output import OutputBound, PrunedLayer, output_bound

__all__ = ["OutputBound", "PrunedLayer", "output_bound"]
