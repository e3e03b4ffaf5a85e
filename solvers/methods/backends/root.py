"""A linear layer's samples, turned into as many as it has inputs and one more."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from convexprune.solvers.programs.fits import Ball, SquaredLoss
from convexprune.solvers.programs.program import LayerProgram

_ROUNDING = 1e-13


@dataclass(frozen=True, eq=False)
class Root:
    """X = QR and Y = QQᵀY + rest give ‖XU − Y‖² = ‖RU − QᵀY‖² + ‖rest‖² for each neuron.

    So the N + 1 samples (R; 0), (QᵀY; ‖rest_m‖) pose the same program, and Λ = QΛ̃ + rest/‖rest‖·λ̃ is as long as Λ̃, with
    the same XᵀΛ and the same ⟨Λ, Y⟩.

    Attributes:
        Q: [P, N], orthonormal columns.
        rest: [P, M], columns of length 1 or, where Y is in the span of X up to rounding, 0.
        program: The program with N + 1 samples.
    """

    Q: Tensor
    rest: Tensor
    program: LayerProgram

    @classmethod
    def of(cls, program: LayerProgram) -> Self | None:
        """That of a ``Ball`` or ``SquaredLoss`` with more samples than it would have; None for other programs."""
        N, fit = program.shape[0], program.fit
        if type(fit) not in (Ball, SquaredLoss) or program.samples <= N + 1:
            return None
        Q, R = torch.linalg.qr(program.inputs)
        rest = fit.Y - Q @ (Q.T @ fit.Y)
        rest = rest - Q @ (Q.T @ rest)
        length = torch.linalg.vector_norm(rest, dim=0)
        length = torch.where(length > _ROUNDING * torch.linalg.vector_norm(fit.Y, dim=0), length, 0.0)
        rest = torch.where(length > 0, rest / length, 0.0)
        targets = torch.cat([Q.T @ fit.Y, length[None]])
        small = LayerProgram(torch.cat([R, R.new_zeros(1, N)]), fit.map(lambda _: targets), program.penalty)
        return cls(Q, rest, small)

    def apply_multipliers(self, L: Tensor) -> Tensor:
        """Λ̃ [N + 1, M] of Λ [P, M]: its part that matters."""
        return torch.cat([self.Q.T @ L, (self.rest * L).sum(0, keepdim=True)])

    def undo_multipliers(self, L: Tensor) -> Tensor:
        """Λ [P, M] of Λ̃ [N + 1, M]."""
        return self.Q @ L[:-1] + self.rest * L[-1]
