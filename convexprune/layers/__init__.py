"""Modules as matrices, samples first, and back; the only place where weights change. Kinds of modules are in ``kinds``.

A layer's own output is ``X U``: X [P, N] has one row for each position at which the layer is applied (its last column
is ones if the layer has a bias), U [N, M] the weights (its last row is the bias). Each group of a convolution is a pair
of matrices of its own, and so is each of the projections of queries, keys and values in a MultiheadAttention.
"""

from convexprune.layers.support import (
    gradient_matrices,
    input_matrices,
    input_positions,
    output_matrices,
    unsupported,
    weight_matrices,
    write_back_,
)

__all__ = [
    "gradient_matrices",
    "input_matrices",
    "input_positions",
    "output_matrices",
    "unsupported",
    "weight_matrices",
    "write_back_",
]
