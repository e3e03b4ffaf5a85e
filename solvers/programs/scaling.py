"""A change of units and its inverse."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from convexprune.solvers.programs.penalties import is_homogeneous
from convexprune.solvers.programs.program import LayerProgram


@dataclass(frozen=True, eq=False)
class Scaling:
    """Columns of X divided by d, outputs multiplied by c, the objective by b: V = c·diag(d) U solves the new program.

    Attributes:
        d: [N, 1] > 0.
        c: A number > 0.
        b: A number > 0.
    """

    d: Tensor
    c: float
    b: float

    @classmethod
    def of(cls, program: LayerProgram) -> Self:
        """Unit root mean square for the columns of X and for the targets, median 1 for the penalty's prices."""
        root = program.samples**0.5
        d = torch.linalg.vector_norm(program.inputs, dim=0, dtype=torch.float64)[:, None] / root
        d = torch.where(d > 0, d, 1.0)
        entries = program.fit.shape[0] * program.fit.shape[1]
        price = program.penalty.to(d).cost(program.shape) / d
        positive = price[price > 0]
        b = 1 / float(positive.median()) if len(positive) else 1.0
        return cls(d, entries**0.5 / (program.fit.size or 1.0), b)

    def apply(self, program: LayerProgram) -> LayerProgram:
        """The program in the new units, in float64; its value is b·c times the old one."""
        wide = program.to(torch.float64)
        penalty: Any = wide.penalty  # what is not homogeneous has ``times``
        if is_homogeneous(penalty):
            penalty = penalty.rescaled(self.d / self.b)
        else:
            penalty = penalty.rescaled(self.c * self.d).times(self.b * self.c)
        return LayerProgram(wide.inputs / self.d.T, wide.fit.rescaled(self.c).times(self.b * self.c), penalty)

    def undo_weights(self, V: Tensor) -> Tensor:
        """U = diag(1/d) V / c."""
        return V / self.d.to(V) / self.c

    def undo_multipliers(self, L: Tensor) -> Tensor:
        """Λ/b: the objective is scaled by b·c, the outputs by c."""
        return L / self.b
