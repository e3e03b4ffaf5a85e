"""Clarabel, SCS and OSQP, on conic forms of our own, and whatever solver cvxpy has, on the reference formulation."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from convexprune.solvers.errors import InvalidInput, UnknownOption
from convexprune.solvers.methods.conic import ConicForm, refusal
from convexprune.solvers.methods.direct import (
    Direct,
    PackageSolver,
    Point,
    RawSolution,
    by_tens,
    wanted_accuracy,
)
from convexprune.solvers.methods.interface import Limits, Proposal, Start, Watch
from convexprune.solvers.methods.registry import register
from convexprune.solvers.programs import L1, LayerProgram
from convexprune.solvers.programs.fits import LossFit
from convexprune.solvers.programs.program import Scaling

_SMALL = 2**18  # P·N·M up to which an interior point method is quicker than many iterations of a first-order one
_FINEST = 1e-13  # accuracy of the last round
_SHIFTS = (1e-8, 1e-10, 1e-12)  # of the diagonal of its linear system; the first is its own choice
_PROOF = 1e-12  # what a ray may lack that proves there is no solution


def _answer(
    form: ConicForm, point: tuple[Any, Any, Any], ended: str, steps: int, setup: float, status: str, **hints: Any
) -> RawSolution:
    """An answer without its point where that is not finite; a ray where the package calls the program infeasible."""
    dual, ray = "dual" in status.lower(), "infeasible" in status.lower()
    if ray:
        point = (np.zeros(len(form.q)), point[1], np.zeros(len(form.b)))
    if dual or not all(values is not None and bool(np.isfinite(values).all()) for values in point):
        return RawSolution(None, "failed", steps, setup, status)
    return RawSolution(point, ended, steps, setup, status, hints, ray)


@register("clarabel")
@dataclass(frozen=True)
class Clarabel(Direct):
    """Clarabel, an interior point method for small programs and many digits: convex penalties, all fits of ours."""

    stage: ClassVar[str] = "clarabel"
    package: ClassVar[str] = "clarabel"
    packages: ClassVar[tuple[str, ...]] = ("clarabel", "scipy")
    no_start: ClassVar[str | None] = "Clarabel has no warm start"
    most: ClassVar[int | None] = None

    @staticmethod
    def suits(program: LayerProgram) -> bool:
        """Whether the program is of a kind and size that it is quick for."""
        P, (N, M) = program.samples, program.shape
        return P * N * M <= _SMALL and refusal(program) is None

    def known(self) -> tuple[str, ...]:
        """Those of ``clarabel.DefaultSettings``."""
        import clarabel

        return tuple(name for name in dir(clarabel.DefaultSettings()) if not name.startswith("_") and name != "default")

    def rounds(self, wanted: float) -> list[dict[str, Any]]:
        """At the usual regularisation, and where that is felt with less of it, as far as arithmetic goes."""
        accuracy = ("tol_gap_abs", "tol_gap_rel", "tol_feas")
        again = dict.fromkeys(accuracy, _FINEST) | {"iterative_refinement_max_iter": 20}
        finer = [again | {"static_regularization_constant": shift} for shift in _SHIFTS]
        return [dict.fromkeys(accuracy, max(1e-4 * wanted, 1e-10)), *finer]

    def answer(self, form: ConicForm, settings: Mapping[str, Any], start: Point | None) -> RawSolution:  # noqa: ARG002
        """Solve it; the accuracy of what comes back is for the certificate to judge."""
        import clarabel
        from scipy import sparse

        began, options = time.perf_counter(), clarabel.DefaultSettings()
        kinds = ((clarabel.ZeroConeT, form.zero), (clarabel.NonnegativeConeT, form.nonneg))
        cones = [kind(size) for kind, size in kinds if size] + [clarabel.SecondOrderConeT(size) for size in form.cones]
        try:
            defaults = {"verbose": False, "tol_infeas_abs": _PROOF, "tol_infeas_rel": _PROOF}
            for name, value in (defaults | dict(settings)).items():
                setattr(options, name, value)
            P = sparse.csc_matrix(sparse.triu(form.P))
            solver = clarabel.DefaultSolver(P, form.q, form.A, form.b, cones, options)
        except Exception as error:  # Clarabel raises nothing more specific for a bad value
            raise InvalidInput(f"settings {dict(settings)}: clarabel does not take them: {error}") from error
        setup = time.perf_counter() - began
        found = solver.solve()
        status = str(found.status)
        ended = {"MaxIterations": "iteration limit", "MaxTime": "time limit"}.get(status, "own rule")
        point = (np.array(found.x), np.array(found.z), np.array(found.s))
        return _answer(form, point, ended, found.iterations, setup, status)


_SCS_SETTINGS = (
    *("acceleration_interval", "acceleration_lookback", "acceleration_regularization", "acceleration_relaxation"),
    *("acceleration_type_1", "adaptive_diag_scale", "adaptive_scale", "alpha", "eps_abs", "eps_infeas", "eps_rel"),
    *("linear_solver", "log_csv_filename", "max_iters", "normalize", "rho_x", "scale", "time_limit_secs", "verbose"),
    "write_data_filename",
)


@register("scs")
@dataclass(frozen=True)
class SCS(Direct):
    """SCS, a first-order conic splitting method with warm starts: convex penalties, all fits of ours.

    It runs in rounds, each ten times as accurate and from where the last one ended, until the certificate closes.
    """

    package: ClassVar[str] = "scs"
    packages: ClassVar[tuple[str, ...]] = ("scs", "scipy")
    limits: ClassVar[tuple[str, str]] = ("max_iters", "time_limit_secs")

    def known(self) -> tuple[str, ...]:
        """Those of SCS 3.3: the package does not list them."""
        return _SCS_SETTINGS

    def rounds(self, wanted: float) -> list[dict[str, Any]]:
        """From half of what is wanted, by the linear solver of SCS itself: on these sparse forms MKL is slower."""
        return by_tens(0.5 * wanted, linear_solver="qdldl")

    def answer(self, form: ConicForm, settings: Mapping[str, Any], start: Point | None) -> RawSolution:
        """Solve it, from (x, y, s) where there is one."""
        import scs

        data = {"P": form.P, "A": form.A, "b": form.b, "c": form.q}
        cones = {"z": form.zero, "l": form.nonneg, "q": list(form.cones)}
        began = time.perf_counter()
        try:
            solver = scs.SCS(data, cones, **({"verbose": False} | dict(settings)))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"settings {dict(settings)}: scs does not take them: {error}") from error
        setup = time.perf_counter() - began
        x, y, s = (None, None, None) if start is None else start
        found = solver.solve(warm_start=start is not None, x=x, y=y, s=s)
        info, status = found["info"], str(found["info"]["status"])
        limit = "iteration limit" if "max_iters" in status else "time limit" if "time_limit" in status else "own rule"
        ended, point = "own rule" if info["status_val"] == 1 else limit, (found["x"], found["y"], found["s"])
        return _answer(form, point, ended, int(info["iter"]), setup, status, scale=info["scale"])


@register("osqp")
@dataclass(frozen=True)
class OSQP(Direct):
    """OSQP, a first-order method for quadratic programs, polished: the losses with an L1 penalty.

    Neurons are solved one by one, small ones a few at a time. It runs in rounds, each ten times as accurate and from
    where the last one ended, until the certificate closes.
    """

    package: ClassVar[str] = "osqp"
    packages: ClassVar[tuple[str, ...]] = ("osqp", "scipy")

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None; exceptions as for every backend."""
        reason = super().refuses(program)
        if reason:
            return reason
        if not isinstance(program.fit, LossFit):
            cone = f"the ball of {type(program.fit).__name__} is a second-order cone"
            return f"OSQP solves quadratic programs, and {cone}; it takes SquaredLoss, ReluLoss and NetTrimLoss"
        if not isinstance(program.penalty, L1):
            return f"OSQP solves quadratic programs, and {type(program.penalty).__name__} needs cones; it takes L1"
        return None

    def known(self) -> tuple[str, ...]:
        """Those of its settings structure."""
        import osqp

        return tuple(sorted(name for name in vars(osqp.OSQP().ext.OSQPSettings) if not name.startswith("_")))

    def rounds(self, wanted: float) -> list[dict[str, Any]]:
        """From what is wanted, with polishing."""
        return by_tens(wanted, polishing=True)

    def answer(self, form: ConicForm, settings: Mapping[str, Any], start: Point | None) -> RawSolution:
        """Solve it, from x and y where there are any."""
        import osqp
        from scipy import sparse

        began, solver = time.perf_counter(), osqp.OSQP()
        low = np.concatenate([form.b[: form.zero], np.full(form.nonneg, -np.inf)])
        P = sparse.csc_matrix(sparse.triu(form.P))
        try:
            solver.setup(P, form.q, form.A, low, form.b, **({"verbose": False} | dict(settings)))
        except (TypeError, ValueError, osqp.OSQPException) as error:
            raise InvalidInput(f"settings {dict(settings)}: osqp does not take them: {error}") from error
        if start is not None:
            solver.warm_start(*start[:2])
        setup = time.perf_counter() - began
        found = solver.solve(raise_error=False)
        status, steps = str(found.info.status), int(found.info.iter)
        limits = {"maximum iterations reached": "iteration limit", "run time limit reached": "time limit"}
        impossible = status.startswith("primal infeasible")
        y, slack = (
            found.prim_inf_cert if impossible else found.y,
            None if found.x is None else form.b - form.A @ found.x,
        )
        return _answer(form, (found.x, y, slack), limits.get(status, "own rule"), steps, setup, status)


@register("cvxpy")
@dataclass(frozen=True)
class CVXPY(PackageSolver):
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
    package: ClassVar[str] = "cvxpy"
    packages: ClassVar[tuple[str, ...]] = ("cvxpy", "clarabel", "scs")

    def installed(self) -> list[str]:
        """The solvers that cvxpy has; MissingExtra is raised where it is not installed itself."""
        self.check_installed()
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
