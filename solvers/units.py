"""Units in which squares of a program's outputs neither overflow nor vanish in the precision that they are taken in."""

import torch

from convexprune.solvers.arrays import power_of_two, unit_of, working_dtype
from convexprune.solvers.errors import InvalidTolerance, NonFinite
from convexprune.solvers.program import LayerProgram

__all__ = ["moderated"]

_LARGEST = 0.9  # of the exponents of the precision: inputs stay below


def moderated(program: LayerProgram) -> tuple[LayerProgram, float]:
    """The program of cX and f(·/c), whose solutions and values are the same, and c: 1 unless targets are extreme.

    c is a power of two, so that nothing is rounded; Λ/c are the multipliers of the new program.

    Raises:
        NonFinite: The weight of a loss leaves the range of float64 in these units, as the loss does in the caller's.
    """
    X, Y = program.inputs, program.fit.Y
    unit = unit_of(Y) if bool(Y.any()) else unit_of(X)
    if unit == 1:
        return program, 1.0
    X = X.to(working_dtype(X.dtype))
    room = torch.finfo(X.dtype).max ** _LARGEST / max(float(X.abs().max()), unit)
    c = power_of_two(min(1 / unit, room))
    try:
        fit = program.fit.map(lambda A: A.to(working_dtype(A.dtype))).rescaled(c)
    except InvalidTolerance as error:
        raise NonFinite(
            f"targets Y: found numbers of about {unit:.1g}, the squares of which float64 does not hold; "
            "divide inputs and targets by the same number"
        ) from error
    return LayerProgram(X * c, fit, program.penalty), c
