"""‖XU − Y‖² in the eigenvectors of the Gram, where the prox of a ball is a scalar equation."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from convexprune.solvers.methods.curvature import Quadratic
from convexprune.solvers.methods.normal import LowRank, NormalMatrix, Operator
from convexprune.solvers.programs.fits.measures import LayerBall, NeuronBalls
from convexprune.solvers.programs.program import LayerProgram

_TINY = 1e-300
_RANK = 1e-14  # of the largest eigenvalue, for each input; smaller ones are taken for rounding
_SHARP = 1e-9  # of ‖Y‖: shorter distances drown in the rounding of ‖XU − Y‖² as a difference of squares
_NEWTON = 60  # steps at most; 2 or 3 are usual once a reach is known, 7 from zero


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """‖XU − Y‖² as a function of the scaled variables V = diag(d)U, all in float64.

    Attributes:
        d: [N, 1], such that the Gram of X/d has a diagonal of mean 1.
        gram: That Gram [N, N].
        moment: (X/d)ᵀY [N, M].
        values: λ [r, 1], the eigenvalues of ``gram`` that are more than rounding.
        vectors: Q [N, r], their eigenvectors.
        rotated: Qᵀ·moment [r, M].
        rest: o² [M], the squared distances of the targets from the span of the inputs.
        square: ‖y_m‖² [M].
    """

    d: Tensor
    gram: NormalMatrix
    moment: Tensor
    values: Tensor
    vectors: Tensor
    rotated: Tensor
    rest: Tensor
    square: Tensor

    @classmethod
    def of(cls, program: LayerProgram, scaling: float) -> Self:
        """One pass over the samples and one eigendecomposition; d_j is in proportion to ‖x_j‖^scaling."""
        model = Quadratic(program)
        length2 = model.gram.diagonal()[:, None].clamp(min=0)
        d = torch.where(length2 > 0, length2.clamp(min=_TINY) ** (scaling / 2), 1.0)
        d *= float((length2 / d.square()).mean()) ** 0.5 or 1.0
        gram, moment = model.gram.scaled(d), model.moment / d
        values, vectors = gram.eigen()
        kept = values > _RANK * len(d) * values.max()
        values, vectors = values[kept, None], vectors[:, kept]
        rotated = vectors.T @ moment
        rest = model.square - (rotated.square() / values).sum(0)
        return cls(d, gram, moment, values, vectors, rotated, rest.clamp(min=0), model.square)

    def gradient(self, V: Tensor) -> Tensor:
        """[N, M], that of ½‖XU − Y‖²."""
        return self.gram @ V - self.moment

    def distances(self, V: Tensor, gradient: Tensor) -> Tensor:
        """‖XU − Y‖² neuron by neuron, [M]."""
        return ((V * (gradient - self.moment)).sum(0) + self.square).clamp(min=0)

    def resolvent(self, reach: float) -> Operator:
        """(I + reach·gram)⁻¹."""
        share = reach * self.values / (1 + reach * self.values)
        if 2 * len(share) < len(self.d):
            return LowRank(1.0, self.vectors, -share)
        matrix = (self.vectors * -share.T) @ self.vectors.T
        matrix.diagonal().add_(1)
        return matrix

    def ridge(self, reach: float) -> Tensor:
        """(I + reach·gram)⁻¹·reach·moment [N, M]: the minimiser of ½reach‖XU − Y‖² + ½‖V‖²."""
        return self.vectors @ (reach / (1 + reach * self.values) * self.rotated)

    def project(self, q: Tensor, measure: LayerBall | NeuronBalls, reach: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest V to q [N, M] with XU in the balls.

        Args:
            q: [N, M].
            measure: A ball over the layer, or one for each neuron.
            reach: ν to begin with, [1] or [M].

        Returns:
            V = q − ν·gradient(V) [N, M], and ν ≥ 0, [1] or [M].
        """
        rotated = self.vectors.T @ q
        slope = self.values * rotated - self.rotated
        squares = slope.square() / self.values
        if isinstance(measure, NeuronBalls):
            radius2, rest, square = measure.eps.square(), self.rest, self.square
        else:
            squares = squares.sum(1, keepdim=True)
            radius2, rest, square = q.new_tensor([measure.eps**2]), self.rest.sum(), self.square.sum()
        reach = self._root(squares, torch.maximum(radius2 - rest, _SHARP**2 * square), reach)
        return q - self.vectors @ (slope * (reach / (1 + reach * self.values))), reach

    def _root(self, squares: Tensor, goal2: Tensor, reach: Tensor) -> Tensor:
        """The least ν ≥ 0 with Σ_j squares_j/(1 + νλ_j)² ≤ goal2, for each column of squares.

        The sum to the power −½ is a power mean, of exponent −2, of numbers that are linear in ν, so it is concave:
        wherever Newton's method begins, its first step ends left of the root, and from there it climbs.
        """
        goal = goal2.clamp(min=_TINY).sqrt()
        for _ in range(_NEWTON):
            grown = 1 + reach * self.values
            parts = squares / grown.square()
            size2, fall = parts.sum(0), (parts * self.values / grown).sum(0)
            move = size2 * (size2.sqrt() / goal - 1) / fall.clamp(min=_TINY)
            before, reach = reach, torch.where(fall > 0, (reach + move).clamp(min=0), 0.0)
            if bool(((reach - before).abs() <= 1e-13 * before).all()):
                break
        return reach
