"""The reference formulations through cvxpy, with any of its installed conic solvers."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from convexprune.solvers.errors import MissingExtra
from convexprune.solvers.geometry.cloud import Cloud
from convexprune.solvers.geometry.method import ELLIPSOIDS
from convexprune.solvers.methods.backends.direct import PIP
from convexprune.solvers.methods.interface import Limits, Proposal, Start, Watch

if TYPE_CHECKING:
    import cvxpy as cp


@ELLIPSOIDS.register("cvxpy")
@dataclass(frozen=True)
class CVXPY:
    """The reference formulation solved by a conic solver that cvxpy has installed; for some thousand points, d ≤ 20.

    Args:
        backend: cvxpy's name of the solver, such as "CLARABEL" or "SCS".
        settings: The backend's own options by its own names.
    """

    backend: str = "CLARABEL"
    settings: Mapping[str, Any] = field(default_factory=dict)
    packages: ClassVar[tuple[str, ...]] = ("cvxpy", "clarabel", "scs")

    @staticmethod
    def missing() -> str | None:
        """What to install before this solver can run, or None."""
        return None if find_spec("cvxpy") else PIP

    def refuses(self, program: Cloud) -> str | None:  # noqa: ARG002 - it takes any points
        """Why these points cannot be taken, or None.

        Raises:
            MissingExtra: cvxpy is not installed.
        """
        if self.missing():
            raise MissingExtra(f"solver 'cvxpy' needs cvxpy, which is not installed: {PIP}")
        import cvxpy as cp

        installed = cp.installed_solvers()
        return None if self.backend.upper() in installed else f"cvxpy has {installed}, not {self.backend!r}"

    def run(self, program: Cloud, limits: Limits, start: Start | None, watch: Watch) -> Proposal:  # noqa: ARG002
        """Build and solve; the weights are the multipliers of the points' constraints."""
        import cvxpy as cp

        began = time.perf_counter()
        problem = reference_problem(program.rows(slice(None))[:, : program.rank], program.free)
        setup = time.perf_counter() - began
        settings = self._settings(limits) | dict(self.settings)
        effective = {"backend": self.backend.upper(), "settings": settings, "start": "not used"}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Solution may be inaccurate")  # the certificate judges accuracy
                problem.solve(solver=self.backend.upper(), **settings)
        except cp.error.SolverError as error:
            return Proposal(None, None, "failed", 0, setup, str(error), effective)
        found = problem.constraints[0].dual_value
        iterations, seconds = int(problem.solver_stats.num_iters or 0), time.perf_counter() - began
        u = None if found is None else _weights(found[0] if isinstance(found, list) else found)
        ended = "failed" if u is None else _ended(limits, iterations, seconds, problem.status)
        u = None if u is None else u.to(program.points.device)
        return Proposal(u, None, ended, iterations, setup, problem.status, effective)

    def _settings(self, limits: Limits) -> dict[str, Any]:
        wanted = max(1e-12, 1e-4 * limits.tol)
        if self.backend.upper() == "CLARABEL":
            names: dict[str, Any] = {"max_iter": limits.max_iter, "time_limit": limits.time_limit}
            names |= dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), wanted)
            names["max_step_fraction"] = 0.9  # with its own 0.99 it gives up on one cloud in three
        elif self.backend.upper() == "SCS":
            names = {"max_iters": limits.max_iter or 200_000, "time_limit_secs": limits.time_limit}
            names |= dict.fromkeys(("eps_abs", "eps_rel"), wanted)
        else:
            names = {}
        return {name: value for name, value in names.items() if value is not None}


def reference_problem(y: Tensor, free: bool) -> "cp.Problem":
    """The ellipsoid of least volume around points y [n, r] as a cvxpy problem; its first constraint is the points'.

    About the origin, {x : xᵀXx ≤ 1}: maximise log det X over X ⪰ 0 with a_iᵀXa_i ≤ 1. With a free centre,
    {x : ‖Bx + b‖ ≤ 1}: maximise log det B over B ⪰ 0 and b with ‖Ba_i + b‖ ≤ 1.
    """
    import cvxpy as cp

    A, r = y.cpu().numpy(), y.shape[1]
    shape = cp.Variable((r, r), PSD=True)
    if not free:
        return cp.Problem(cp.Maximize(cp.log_det(shape)), [cp.sum(cp.multiply(A @ shape, A), axis=1) <= 1])
    shift = cp.Variable((1, r))
    inside = cp.norm(A @ shape + cp.vstack([shift] * len(A)), axis=1) <= 1
    return cp.Problem(cp.Maximize(cp.log_det(shape)), [inside])


def _ended(limits: Limits, iterations: int, seconds: float, status: str) -> str:
    if limits.max_iter is not None and iterations >= limits.max_iter:
        return "iteration limit"
    late = limits.time_limit is not None and (seconds >= limits.time_limit or status == "user_limit")
    return "time limit" if late else "own rule"


def _weights(found: Any) -> Tensor | None:
    u = torch.as_tensor(found, dtype=torch.float64).reshape(-1).clamp(min=0)
    return u / u.sum() if bool(u.isfinite().all()) and float(u.sum()) > 0 else None
