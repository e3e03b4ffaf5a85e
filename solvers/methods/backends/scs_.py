"""SCS, on conic forms of our own."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.methods.backends.conic import ConicForm
from convexprune.solvers.methods.backends.direct import Answer, Direct, Point
from convexprune.solvers.methods.registry import register

_KNOWN = (
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

    Args:
        settings: SCS's own options by its own names; they win over what the call's limits imply.
    """

    package: ClassVar[str] = "scs"
    packages: ClassVar[tuple[str, ...]] = ("scs", "scipy")

    def known(self) -> tuple[str, ...]:
        """Those of SCS 3.3: the package does not list them."""
        return _KNOWN

    def rounds(self, wanted: float) -> list[dict[str, Any]]:
        """``eps_abs`` and ``eps_rel`` from half of what is wanted, by tens.

        The linear solver that comes with SCS is named, for on these sparse forms MKL takes twice as long.
        """
        finest = 1e-10
        steps = [0.5 * wanted * 10.0**-k for k in range(6)]
        steps = [step for step in steps if step > finest] or [finest]
        return [{"linear_solver": "qdldl", "eps_abs": step, "eps_rel": step} for step in steps]

    def limited(self, max_iter: int | None, seconds: float | None) -> dict[str, Any]:
        """``max_iters`` and ``time_limit_secs``."""
        limits = {"max_iters": 200_000 if max_iter is None else max_iter, "time_limit_secs": seconds}
        return {name: value for name, value in limits.items() if value is not None}

    def answer(self, form: ConicForm, settings: Mapping[str, Any], start: Point | None) -> Answer:
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
        info = found["info"]
        steps, status = int(info["iter"]), str(info["status"])
        point = (found["x"], found["y"], found["s"])
        if info["status_val"] < 0 or not all(np.isfinite(values).all() for values in point):
            return Answer(None, "failed", steps, setup, status)
        ended = "own rule" if info["status_val"] == 1 else _reached(status)
        return Answer(point, ended, steps, setup, status, {"scale": info["scale"]})


def _reached(status: str) -> str:
    """Which limit an inaccurate answer names."""
    return "iteration limit" if "max_iters" in status else "time limit" if "time_limit" in status else "own rule"
