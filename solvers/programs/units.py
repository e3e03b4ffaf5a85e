"""Units in which squares of a program's outputs neither overflow nor vanish in the precision that they are taken in."""

import torch
from torch import Tensor

from convexprune.solvers.arrays import power_of_two, unit_of, working_dtype
from convexprune.solvers.errors import InvalidTolerance, NonFinite
from convexprune.solvers.programs.program import LayerProgram

_LARGEST = 0.9  # of the exponents of the precision: inputs stay below
_UNEVEN = 1e6  # lengths of columns may differ by this factor: float32 holds their squares, and sums tell them apart


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


def leveled(program: LayerProgram) -> tuple[LayerProgram, Tensor]:
    """The program of X/d for the weights dU, and d [N, 1]: 1 unless columns are of extremely different lengths.

    As where all inputs are tiny, but for the 1 that a bias belongs to. The d are powers of two, which make columns that
    are not 0 about as long as the targets.
    """
    X = program.inputs
    lengths = torch.linalg.vector_norm(X, dim=0, dtype=torch.float64)[:, None]
    used = lengths > 0
    if not bool(used.any()) or float(lengths.max()) <= _UNEVEN * float(lengths[used].min()):
        return program, X.new_ones(len(lengths), 1)
    limits = torch.finfo(X.dtype)
    relative = (lengths / (program.fit.size or lengths.max())).clamp(limits.tiny, limits.max / 2)
    d = torch.where(used, relative.log2().round().exp2(), 1.0).to(X)
    return LayerProgram(X / d.T, program.fit, program.penalty.rescaled(d)), d
