"""SparseGPT: a sweep over the inputs that makes up for each removed weight with those behind it.

Frantar and Alistarh, SparseGPT: massive language models can be accurately pruned in one shot, ICML 2023, algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.options import Options
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.scoring import Scoring, largest, of_each
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
        inverse, U = self._inverse(problem)
        return U[: problem.rows].square() / inverse.diagonal()[: problem.rows, None]

    def _inverse(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """H⁻¹ of the damped H = XᵀX, and the weights, those of dead inputs 0; the bias is the last input."""
        X, U = problem.inputs.double(), problem.W.double().clone()
        H = X.T @ X
        dead = H.diagonal() == 0
        H.diagonal()[dead], U[dead] = 1.0, 0.0
        H.diagonal().add_(self.damping * float(H.diagonal().mean()))
        return torch.cholesky_inverse(torch.linalg.cholesky(H)), U

    def weights(self, problem: Problem, keep: Tensor, wanted: int | tuple[int, int], options: Options) -> Tensor:
        """The sweep; each block keeps as large a part of its weights as the layer does, of each m inputs n."""
        (inverse, U), rows, support = self._inverse(problem), problem.rows, problem.support(options)
        pattern, count = wanted if isinstance(wanted, tuple) else None, int(keep.sum())
        # The rows of the upper Cholesky factor of H⁻¹ are those of the inverses of what is left of H, scaled.
        factor = torch.linalg.cholesky(inverse, upper=True)
        for first in range(0, rows, size := pattern[1] if pattern else self.block or rows):
            part = slice(first, min(first + size, rows))
            saliency = (U[part] / factor.diagonal()[part, None]).square()
            most = round(count * part.stop / rows) - round(count * first / rows)
            stay = of_each(saliency, pattern[0]) if pattern else largest({"": (saliency,)}, most)[""][0]
            stay = stay if support is None else stay & support[part]
            errors = torch.zeros_like(saliency)
            for i, kept in enumerate(stay, start=first):
                errors[i - first] = torch.where(kept, 0.0, U[i]) / factor[i, i]
                U[i : part.stop] -= torch.outer(factor[i, i : part.stop], errors[i - first])
            U[part] = torch.where(stay, U[part], 0.0)
            U[part.stop :] -= factor[part, part.stop :].T @ errors
        return problem.fold.undo(U.to(problem.dtype)).to(problem.stored.dtype)
