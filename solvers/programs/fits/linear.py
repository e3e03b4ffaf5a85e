"""Fits of a linear layer, logits, or anything in front of a Lipschitz activation: h = Z − Y."""

from dataclasses import dataclass

from torch import Tensor

from convexprune.solvers.programs.fits.base import LossFit, SetFit, TargetFit
from convexprune.solvers.programs.gram import Gram


class _Linear(TargetFit):
    def _gram_targets(self, gram: Gram) -> Tensor:
        return gram.targets

    def offset(self, Z: Tensor) -> Tensor:
        """Z − Y."""
        return Z - self.Y

    def as_loss(self, weight: float = 1.0) -> "SquaredLoss":
        """½·weight·‖Z − Y‖²."""
        return SquaredLoss(self.Y, weight)._with(gram=self.gram)


@dataclass(frozen=True, eq=False)
class Ball(_Linear, SetFit):
    """{Z : ‖Z − Y‖_F ≤ eps}: a linear layer, logits, or any Lipschitz activation.

    Args:
        targets: Y [P, M], or the ``Gram`` that holds them.
        eps: The radius in the units of Y, a number; or [M], one for each neuron.
    """


@dataclass(frozen=True, eq=False)
class SquaredLoss(_Linear, LossFit):
    """½·weight·‖Z − Y‖_F².

    Args:
        targets: Y [P, M], or the ``Gram`` that holds them.
        weight: What a unit of squared distance costs beside the penalty, > 0.
    """
