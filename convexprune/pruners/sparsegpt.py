"""SparseGPT: a sweep over the inputs that makes up for each removed weight with those behind it.

Source: Frantar and Alistarh, SparseGPT: massive language models can be accurately pruned in one shot, ICML 2023,
algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.options import Options
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.scoring import Scoring
from convexprune.runs.problem import Problem
from convexprune.solvers.arrays import checked_count, checked_positive


@register_pruner("sparsegpt")
@dataclass(frozen=True)
class SparseGPT(Scoring):
    """A column sweep with the inverse Hessian; the mask of a block is chosen when the sweep comes to it.

    Args:
        block: Inputs whose mask is chosen at a time; 0: all at once.
        damping: What is added to the diagonal of XᵀX, relative to its mean.
    """

    block: int = 128
    damping: float = 0.01
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checked_count("block", self.block, least=0)
        checked_positive("damping", self.damping)

    def score(self, problem: Problem, options: Options) -> Tensor:
        """w²/(H⁻¹)_ii of the trained weights (the saliency of the optimal brain surgeon), by which layers share."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self._hessian(problem)))
        return problem.W[: problem.rows].double().square() / inverse.diagonal()[: problem.rows, None]

    def weights(
        self, problems: Sequence[Problem], keep: Sequence[Tensor], pattern: tuple[int, int] | None, options: Options
    ) -> list[Tensor]:
        """The sweep; each block keeps as large a part of its weights as the layer does, or n of each m inputs."""
        del options
        return [self._swept(problem, int(mask.sum()), pattern) for problem, mask in zip(problems, keep, strict=True)]

    def _hessian(self, problem: Problem) -> Tensor:
        """XᵀX with damping; dead inputs have a diagonal of 1. The bias comes last, so that the sweep ends with it."""
        X = problem.inputs.double()
        H = X.T @ X
        H.diagonal()[H.diagonal() == 0] = 1
        H.diagonal().add_(self.damping * float(H.diagonal().mean()))
        return H

    def _swept(self, problem: Problem, count: int, pattern: tuple[int, int] | None) -> Tensor:
        U, rows = problem.W.double().clone(), problem.rows
        # The rows of the upper Cholesky factor of H⁻¹ are those of the inverses of what is left of H, scaled.
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self._hessian(problem)))
        factor = torch.linalg.cholesky(inverse, upper=True)
        for first in range(0, rows, size := pattern[1] if pattern else self.block or rows):
            part = slice(first, min(first + size, rows))
            saliency = U[part].square() / factor.diagonal()[part, None].square()
            if pattern is not None:
                stay = saliency.argsort(dim=0, descending=True, stable=True).argsort(dim=0) < pattern[0]
            else:
                most = round(count * part.stop / rows) - round(count * first / rows)
                order = saliency.flatten().argsort(descending=True, stable=True)
                stay = torch.zeros(len(order), dtype=torch.bool, device=U.device)
                stay = stay.index_fill(0, order[:most], True).reshape(saliency.shape)
            for i, kept in zip(range(part.start, part.stop), stay, strict=True):
                removed = torch.where(kept, 0.0, U[i])
                U[i + 1 :] -= torch.outer(factor[i, i + 1 :], removed / factor[i, i])
                U[i] = torch.where(kept, U[i], 0.0)
        stored = problem.fold.undo(U.to(problem.dtype)).to(problem.stored.dtype)
        stored[:rows][U[:rows] == 0] = 0
        return stored
