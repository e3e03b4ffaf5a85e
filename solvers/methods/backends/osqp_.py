"""OSQP, on the quadratic programs among our conic forms."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.methods.backends.conic import ConicForm
from convexprune.solvers.methods.backends.direct import Answer, Direct, Point
from convexprune.solvers.methods.registry import register
from convexprune.solvers.programs.fits.measures import HalfSquare
from convexprune.solvers.programs.penalties import L1
from convexprune.solvers.programs.program import LayerProgram


@register("osqp")
@dataclass(frozen=True)
class OSQP(Direct):
    """OSQP, a first-order method for quadratic programs, polished: the losses with an L1 penalty.

    Neurons are solved one by one, small ones a few at a time. It runs in rounds, each ten times as accurate and from
    where the last one ended, until the certificate closes.

    Args:
        settings: OSQP's own options by its own names; they win over what the call's limits imply.
    """

    package: ClassVar[str] = "osqp"
    packages: ClassVar[tuple[str, ...]] = ("osqp", "scipy")

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None.

        Raises:
            MissingExtra: The package is not installed. UnknownOption: It has no setting of a name given.
        """
        reason = super().refuses(program)
        if reason:
            return reason
        if not isinstance(program.fit.measure, HalfSquare):  # type: ignore[attr-defined]
            return (
                f"OSQP solves quadratic programs, and the ball of {type(program.fit).__name__} is a second-order cone; "
                "it takes SquaredLoss, ReluLoss and NetTrimLoss"
            )
        if not isinstance(program.penalty, L1):
            return f"OSQP solves quadratic programs, and {type(program.penalty).__name__} needs cones; it takes L1"
        return None

    def known(self) -> tuple[str, ...]:
        """Those of its settings structure."""
        import osqp

        names = vars(osqp.OSQP().ext.OSQPSettings)
        return tuple(sorted(name for name in names if not name.startswith("_")))

    def rounds(self, wanted: float) -> list[dict[str, Any]]:
        """``eps_abs`` and ``eps_rel`` from what is wanted, by tens, with polishing."""
        finest = 1e-10
        steps = [step for step in (wanted * 10.0**-k for k in range(6)) if step > finest] or [finest]
        return [{"eps_abs": step, "eps_rel": step, "polishing": True} for step in steps]

    def limited(self, max_iter: int | None, seconds: float | None) -> dict[str, Any]:
        """``max_iter`` and ``time_limit``."""
        limits = {"max_iter": 200_000 if max_iter is None else max_iter, "time_limit": seconds}
        return {name: value for name, value in limits.items() if value is not None}

    def answer(self, form: ConicForm, settings: Mapping[str, Any], start: Point | None) -> Answer:
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
        if "infeasible" in status or not (_finite(found.x) and _finite(found.y)):
            return Answer(None, "failed", steps, setup, status)
        ended = {"maximum iterations reached": "iteration limit", "run time limit reached": "time limit"}
        point = (found.x, found.y, form.b - form.A @ found.x)
        return Answer(point, ended.get(status, "own rule"), steps, setup, status)


def _finite(values: Any) -> bool:
    return values is not None and bool(np.isfinite(values).all())
