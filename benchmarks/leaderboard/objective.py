"""The certificate is the objective: what is proven in float64 about weights and multipliers, whoever made them."""

import math
from typing import Any

from benchmark_utils import Certified
from benchopt import BaseObjective
from torch import Tensor

from convexprune.solvers import LayerProgram, certify
from convexprune.solvers.certificate import Certificate
from convexprune.solvers.errors import NonFinite


class Objective(BaseObjective):
    """Minimise penalty(U) + fit(X U), judged by the float64 certificate of the answer alone."""

    name = "certificate"
    url = "layer-programs"  # a title for the results page
    min_benchopt_version = "1.10"
    parameters = {"tol": [1e-4], "feas_tol": [1e-5]}  # noqa: RUF012 - benchopt's way
    sampling_strategy = "tolerance"
    stopping_criterion = Certified()
    test_dataset_name = "zoo"

    def skip(self, program: LayerProgram | None) -> tuple[bool, str | None]:
        return program is None, "no layers are dumped: see python benchmarks/dump.py --help"

    def set_data(self, program: LayerProgram) -> None:
        self.program = program

    def get_objective(self) -> dict[str, LayerProgram]:
        return {"program": self.program}

    def evaluate_result(self, weights: Tensor, multipliers: Tensor | None = None) -> dict[str, Any]:
        try:
            c = certify(self.program, weights, multipliers)
        except NonFinite:
            c = Certificate(math.inf, 0.0, math.inf, math.inf, math.inf)
        certified = int(c.within(self.tol, self.feas_tol))
        figures = {"value": c.value, "bound": c.bound, "gap": c.gap, "violation": c.violation}
        return figures | {"nonzeros": int((weights != 0).sum()), "certified": certified}

    def get_one_result(self) -> dict[str, Tensor]:
        return {"weights": self.program.inputs.new_zeros(self.program.shape)}
