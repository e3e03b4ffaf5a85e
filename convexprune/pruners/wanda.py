"""Wanda: weights times how large their inputs get.

Sun, Liu, Bair and Kolter, A simple and effective pruning approach for large language models, ICLR 2024, section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from convexprune.options import Options
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.scoring import Scoring
from convexprune.runs.problem import Problem


@register_pruner("wanda")
@dataclass(frozen=True)
class Wanda(Scoring):
    """The largest |w_ij|·‖X_i‖ of each output, as many in each, as published; patterns such as 2:4 too."""

    needs_data: ClassVar[bool] = True
    per_output: ClassVar[bool] = True

    def score(self, problem: Problem, options: Options) -> Tensor:
        """|W|∘‖X_i‖₂, the norm of input i over all samples and positions."""
        sizes: Tensor = problem.inputs[:, : problem.rows].double().norm(dim=0)
        return problem.stored[: problem.rows].double().abs() * sizes[:, None]
