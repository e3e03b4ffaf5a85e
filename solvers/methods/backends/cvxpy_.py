"""The reference formulation through cvxpy, with any of its installed conic solvers."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

from convexprune.solvers.errors import MissingExtra, UnknownOption
from convexprune.solvers.methods.backends.direct import PIP, wanted_accuracy
from convexprune.solvers.methods.interface import Limits, Proposal, Start, Watch
from convexprune.solvers.methods.registry import register
from convexprune.solvers.programs import LayerProgram
from convexprune.solvers.programs.program import Scaling


@register("cvxpy")
@dataclass(frozen=True)
class CVXPY:
    """The reference formulation (``program.to_cvxpy()``) solved by any conic solver that cvxpy has installed.

    "clarabel", "scs" and "osqp" solve conic forms of our own instead, without the time that cvxpy takes to build its.
    The columns of X and the targets are scaled to unit root mean square first and the answer is scaled back; that is
    the only change to the reference. The solver's tolerances follow from the call's, and can be set by its own names.

    Args:
        backend: cvxpy's name of the solver, such as "CLARABEL" or "SCS".
        settings: The backend's own options by its own names; they win over what the call's limits imply.
    """

    backend: str = "CLARABEL"
    settings: Mapping[str, Any] = field(default_factory=dict)
    packages: ClassVar[tuple[str, ...]] = ("cvxpy", "clarabel", "scs")

    @staticmethod
    def missing() -> str | None:
        """What to install before this solver can run, or None."""
        return None if find_spec("cvxpy") else PIP

    def installed(self) -> list[str]:
        """The solvers that cvxpy has; MissingExtra is raised where it is not installed itself."""
        if self.missing():
            raise MissingExtra(f"solver 'cvxpy' needs cvxpy, which is not installed: {PIP}")
        import cvxpy as cp

        names: list[str] = cp.installed_solvers()
        return names

    def solved(self, problem: Any, limits: Limits, accuracy: Mapping[str, Mapping[str, Any]], setup: float) -> Proposal:
        """How solving a cvxpy problem ended, as a proposal without weights; ``accuracy`` holds settings by backend."""
        import cvxpy as cp

        backend = self.backend.upper()
        names = {"CLARABEL": {"max_iter": limits.max_iter, "time_limit": limits.time_limit}}
        names["SCS"] = {"max_iters": limits.max_iter or 200_000, "time_limit_secs": limits.time_limit}
        limited = {name: value for name, value in names.get(backend, {}).items() if value is not None}
        settings = limited | dict(accuracy.get(backend, {})) | dict(self.settings)
        failed = Proposal(
            None, None, "failed", 0, setup, "", {"backend": backend, "settings": settings, "start": "not used"}
        )
        try:
            with warnings.catch_warnings():
                # The certificate judges accuracy; cvxpy's warning about it would say it twice.
                warnings.filterwarnings("ignore", "Solution may be inaccurate")
                problem.solve(solver=backend, **settings)
        except cp.error.SolverError as error:
            return replace(failed, message=str(error))
        except (AttributeError, TypeError, ValueError) as error:
            if not self.settings:
                raise
            message = f"settings {dict(self.settings)}: {self.backend} does not take them: {error}"
            raise UnknownOption(message) from error
        stats = problem.solver_stats
        iterations = int(stats.num_iters or 0) if stats else 0
        # A backend that a limit stopped may call what it has "optimal_inaccurate" all the same.
        ended = "own rule"
        if problem.status != "optimal" and limits.max_iter is not None and iterations >= limits.max_iter:
            ended = "iteration limit"
        elif problem.status != "optimal" and limits.time_limit is not None:
            ended = "time limit"
        return replace(failed, ended=ended, iterations=iterations, message=problem.status)

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None; MissingExtra where cvxpy is not installed."""
        available = self.installed()
        if not program.penalty.convex:
            return f"{type(program.penalty).__name__} is not convex; the solver 'continuation' takes it"
        from cvxpy.constraints import SOC
        from cvxpy.reductions.solvers.defines import SOLVER_MAP_CONIC as CONIC

        installed = [s for s in available if s in CONIC and SOC in CONIC[s].SUPPORTED_CONSTRAINTS]
        if self.backend.upper() not in installed:
            return f"cvxpy has no installed conic solver {self.backend!r} for second-order cones; it has {installed}"
        problem, _ = program.to_cvxpy()
        return None if problem.is_dcp() else "its reference formulation is not convex by cvxpy's rules"

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:  # noqa: ARG002
        """Build, solve, scale back. A start is not used: conic solvers behind cvxpy take none from outside."""
        began = time.perf_counter()
        scaling = Scaling.of(program)
        problem, U = scaling.apply(program).to_cvxpy()
        wanted = wanted_accuracy(program, limits)
        # An interior point method gains digits cheaply at the end, and needs them where prices differ by 1e12.
        accuracy = {
            "CLARABEL": dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), max(1e-4 * wanted, 1e-10)),
            "SCS": dict.fromkeys(("eps_abs", "eps_rel"), max(0.05 * wanted, 1e-10)),
        }
        found = self.solved(problem, limits, accuracy, time.perf_counter() - began)
        if found.ended == "failed" or U.value is None:
            return replace(found, ended="failed")
        multipliers = problem.constraints[0].dual_value
        device = program.inputs.device
        weights = scaling.undo_weights(torch.as_tensor(U.value, dtype=torch.float64))
        weights = program.penalty.to(weights).prox(weights, 0.0)  # within its domain, which conic solvers keep roughly
        if multipliers is not None:
            # cvxpy's Lagrangian has ⟨dual, Z − XU⟩ for the constraint Z == XU.
            multipliers = -scaling.undo_multipliers(torch.as_tensor(multipliers, dtype=torch.float64)).to(device)
        return replace(found, weights=weights.to(device), multipliers=multipliers)
