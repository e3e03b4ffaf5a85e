"""A change of units and its inverse."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from convexprune.solvers.program import LayerProgram

__all__ = ["Scaling"]


@dataclass(frozen=True, eq=False)
class Scaling:
    """Columns of X divided by d, outputs multiplied by c: with U = diag(1/d) V / c the program in V is the same one.

    Attributes:
        d: [N, 1] > 0.
        c: A number > 0.
    """

    d: Tensor
    c: float

    @classmethod
    def of(cls, program: LayerProgram) -> Self:
        """Unit root mean square for every column of X that is not zero, and for the targets."""
        root = program.samples**0.5
        d = torch.linalg.vector_norm(program.inputs, dim=0, dtype=torch.float64)[:, None] / root
        size = program.fit.size
        entries = program.fit.shape[0] * program.fit.shape[1]
        return cls(torch.where(d > 0, d, 1.0), entries**0.5 / size if size > 0 else 1.0)

    def apply(self, program: LayerProgram) -> LayerProgram:
        """The program in the new units, in float64; its value is c times the old one."""
        wide = program.to(torch.float64)
        return LayerProgram(wide.inputs / self.d.T, wide.fit.rescaled(self.c), wide.penalty.rescaled(self.d))

    def undo_weights(self, V: Tensor) -> Tensor:
        """U = diag(1/d) V / c."""
        return V / self.d.to(V) / self.c

    def undo_multipliers(self, L: Tensor) -> Tensor:
        """Λ itself: value and outputs are both scaled by c, so the multipliers are not."""
        return L
