"""Clarabel, on conic forms of our own."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.methods.backends.conic import ConicForm
from convexprune.solvers.methods.backends.direct import Answer, Direct, Point
from convexprune.solvers.methods.registry import register


@register("clarabel")
@dataclass(frozen=True)
class Clarabel(Direct):
    """Clarabel, an interior point method for small programs and many digits: convex penalties, all fits of ours.

    Args:
        settings: Clarabel's own options by its own names; they win over what the call's limits imply.
    """

    package: ClassVar[str] = "clarabel"
    packages: ClassVar[tuple[str, ...]] = ("clarabel", "scipy")
    no_start: ClassVar[str | None] = "Clarabel has no warm start"

    def known(self) -> tuple[str, ...]:
        """Those of ``clarabel.DefaultSettings``."""
        import clarabel

        return tuple(name for name in dir(clarabel.DefaultSettings()) if not name.startswith("_") and name != "default")

    def rounds(self, wanted: float) -> list[dict[str, Any]]:
        """One: an interior point method gains digits cheaply at the end, and cannot go on from where it stopped."""
        return [dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), max(1e-4 * wanted, 1e-10))]

    def limited(self, max_iter: int | None, seconds: float | None) -> dict[str, Any]:
        """``max_iter`` and ``time_limit``."""
        limits = {"max_iter": max_iter, "time_limit": seconds}
        return {name: value for name, value in limits.items() if value is not None}

    def answer(self, form: ConicForm, settings: Mapping[str, Any], start: Point | None) -> Answer:  # noqa: ARG002
        """Solve it; the accuracy of what comes back is for the certificate to judge."""
        import clarabel
        from scipy import sparse

        began, options = time.perf_counter(), clarabel.DefaultSettings()
        kinds = ((clarabel.ZeroConeT, form.zero), (clarabel.NonnegativeConeT, form.nonneg))
        cones = [kind(size) for kind, size in kinds if size] + [clarabel.SecondOrderConeT(size) for size in form.cones]
        try:
            for name, value in ({"verbose": False} | dict(settings)).items():
                setattr(options, name, value)
            P = sparse.csc_matrix(sparse.triu(form.P))
            solver = clarabel.DefaultSolver(P, form.q, form.A, form.b, cones, options)
        except Exception as error:  # Clarabel raises nothing more specific for a bad value
            raise InvalidInput(f"settings {dict(settings)}: clarabel does not take them: {error}") from error
        setup = time.perf_counter() - began
        found = solver.solve()
        status = str(found.status)
        ended = {"MaxIterations": "iteration limit", "MaxTime": "time limit"}.get(status, "own rule")
        point = tuple(np.array(values) for values in (found.x, found.z, found.s))
        if "Infeasible" in status or not all(np.isfinite(values).all() for values in point):
            return Answer(None, "failed", found.iterations, setup, status)
        return Answer(point, ended, found.iterations, setup, status)  # type: ignore[arg-type]
