"""What the benchmark's files share: the rule for stopping, solvers by name, and the dumped layers."""

import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: threads that wait for others spoil all times

from benchopt import BaseSolver
from benchopt.stopping_criterion import StoppingCriterion

from convexprune.solvers import LayerProgram, available, solve
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.testing import zoo

sys.path.append(str(Path(__file__).resolve().parents[2]))
from dump import FOLDER, read_layer  # benchmarks/ is no package, its scripts lie beside this folder
from profiles import ratios

__all__ = ["FOLDER", "Certified", "Registered", "ratios", "read_layer", "seconds_to_certificate"]


class Certified(StoppingCriterion):
    """Stop at the first certified answer, or when a run took the solver's whole time limit."""

    def get_runner_instance(self, *args: Any, **kwargs: Any) -> StoppingCriterion:
        """Of a fresh rule: benchopt writes the first solver's strategy into the one that all solvers share."""
        return super(Certified, Certified()).get_runner_instance(*args, **kwargs)

    def check_convergence(self, objective_list: list[dict[str, Any]]) -> tuple[bool, float]:
        last = objective_list[-1]
        late = last["time"] >= getattr(self.solver, "time_limit", math.inf)
        return bool(last["objective_certified"]) or late, 0.0


class Registered(BaseSolver):
    """A solver of the registry, run from nothing at tolerances 1, 0.1, 0.01, … until its answer is certified.

    The time is that of the whole call: building, solving, and each judging that the call asked for.
    """

    sampling_strategy = "tolerance"
    parameter_template = "{method}"

    def skip(self, program: LayerProgram) -> tuple[bool, str | None]:
        missing = available()[self.method].missing
        reason = f"not installed: {missing}" if missing else make_solver(self.method, {})[1].refuses(program)
        return reason is not None, reason

    def set_objective(self, program: LayerProgram) -> None:
        self.program = program

    def warm_up(self) -> None:
        """Imports and compilation are not timed."""
        easy, solver = zoo.program("squared-loss plain 20x8x5"), make_solver(self.method, {})[1]
        if solver.refuses(easy) is None:
            solve(easy, solver, tol=1e-2, time_limit=self.time_limit)

    def get_next(self, stop_val: float) -> float:
        return min(stop_val, 1.0) / 10

    def run(self, stop_val: float) -> None:
        tol = min(stop_val, 1.0)
        self.solution = solve(self.program, self.method, tol=tol, feas_tol=tol / 10, time_limit=self.time_limit)

    def get_result(self) -> dict[str, Any]:
        return {"weights": self.solution.weights, "multipliers": self.solution.multipliers}


def seconds_to_certificate(df: Any) -> dict[str, dict[str, float]]:
    """From benchopt's results, by solver and dataset: the fastest certified run, median of repetitions, or inf."""
    found: dict[str, dict[str, float]] = {}
    for (solver, dataset), runs in df.groupby(["solver_name", "dataset_name"]):
        proven = runs[runs.objective_certified == 1].groupby("idx_rep").time.min()
        everywhere = len(proven) == runs.idx_rep.nunique()
        found.setdefault(solver, {})[dataset] = float(proven.median()) if everywhere else math.inf
    return found
