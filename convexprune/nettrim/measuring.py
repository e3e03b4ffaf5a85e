"""What each error would cost: paths measured to allocate by."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from convexprune.nettrim.answers import Answer, Plain, answered, solver_for
from convexprune.nettrim.posed import How, Posed
from convexprune.nettrim.tolerance import Within
from convexprune.solvers import LayerProgram, Status, solve_path

__all__ = ["Measure"]


@dataclass(frozen=True)
class Measure(Plain):
    """The layer's Pareto path at a few relative eps, to allocate by: at a gap of 1e-2, from at most ``rows``·N samples.

    The weights are those at ``probe``, to try what they do to the network; nothing is promised of them.
    """

    eps: tuple[float, ...] = (0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.45, 0.65, 0.9)
    rows: int = 4
    probe: int = 4
    kind: ClassVar[str] = "measure"

    def programs(self, posed: Posed, how: How, share: float = 1.0) -> LayerProgram:
        """That of the probe."""
        return Within(self.eps[self.probe]).programs(posed, replace(how, cascade=False), share)

    def meet(self, posed: Posed, how: How, share: float = 1.0) -> Answer:
        """Warm starts along eps."""
        thin = posed.thinned(self.rows * len(posed.stored))
        program = self.programs(thin, how, share)
        limits = {"tol": 1e-2, "feas_tol": 1e-3, "max_iter": how.options.get("max_iter")}
        limits |= {"time_limit": how.options.get("time_limit")}
        own = {name: value for name, value in how.options.items() if name not in limits}
        radii = [eps * thin.size for eps in self.eps]
        path = solve_path(program, radii, solver_for(posed, how), **limits, **own)
        free = slice(0, posed.rows)
        points = tuple(
            (eps, point.error / (thin.size or 1.0), int(point.solution.weights[free].count_nonzero()))
            for eps, point in zip(self.eps, path, strict=True)
        )
        probe = replace(path[self.probe].solution, status=Status.NO_BOUND)  # a measurement, no answer
        return replace(answered(program, probe, thin, math.inf, math.inf, []), path=points)

    def __str__(self) -> str:
        return f"path of {len(self.eps)} eps"
