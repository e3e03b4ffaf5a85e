"""What each error would cost: paths measured to allocate by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from convexprune.errors import PruningFailed
from convexprune.nettrim.answers import Answer, Plain, answered, solver_for
from convexprune.nettrim.posed import How, Posed
from convexprune.nettrim.stopping import Until
from convexprune.nettrim.tolerance import Within
from convexprune.solvers import LayerProgram, Solution, Status, certify, solve_path
from convexprune.solvers.certificate.solution import Seconds
from convexprune.solvers.methods import EpsPath
from convexprune.solvers.methods.solve import environment
from convexprune.solvers.programs import GroupL2


def _path(program: LayerProgram, posed: Posed, eps: Sequence[float], how: How) -> EpsPath | None:
    """The program at these relative eps, as closely as a measurement asks for; None if that was cut short."""
    limits: dict[str, Any] = {"tol": 1e-2, "feas_tol": 1e-3, "max_iter": how.options.get("max_iter")}
    own = {name: value for name, value in how.options.items() if name not in (*limits, "time_limit")}
    grouped = isinstance(getattr(program.penalty, "penalty", program.penalty), GroupL2)
    solver = how.solver or "admm" if grouped else solver_for(posed, how)
    radii, over = [value * posed.size for value in eps], Until(how)
    path = solve_path(program, radii, solver, callback=over.seen, stop=over, **limits, **own)
    return None if over.ended else path


def _cut_short(program: LayerProgram, posed: Posed) -> Answer:
    """The trained weights in the place of a measurement that was stopped."""
    W = posed.W
    told = {"solver": "none", "message": "stopped", "limits": {"tol": 0.0, "feas_tol": 0.0}} | environment(W)
    certificate = certify(program, W)
    solution = Solution(W, None, Status.STOPPED, certificate, (), 0, Seconds(), told)
    return answered(program, solution, posed, math.inf, math.inf, [])


def check_measured(found: Mapping[str, Sequence[Answer]]) -> None:
    """Every layer has its path.

    Raises:
        PruningFailed: One was cut short, by its own time limit or by the caller's callback.
    """
    for name, answers in found.items():
        if not all(answer.path for answer in answers):
            raise PruningFailed(
                f"layer {name!r}: its path was cut short by layer_time_limit or the callback, and without it weights "
                "cannot be shared among layers; give it more time. The model is unchanged"
            )


class Measurement(Plain):
    """Base of goals that are read off a path, at a gap of 1e-2, from a random choice of at most ``rows``·N samples.

    The weights are those of the loosest eps; nothing is promised of them.
    """

    eps: tuple[float, ...]
    rows: int

    def sample(self, posed: Posed, how: How) -> Posed:
        """The samples that are measured on."""
        return posed.thinned(self.rows * len(posed.stored), how.seed)

    def meet(self, posed: Posed, how: How) -> Answer:
        """Warm starts along eps, then what the path says."""
        thin = self.sample(posed, how)
        program = self.programs(thin, how)
        path = _path(program, thin, self.eps, how)
        if path is None:
            return _cut_short(program, thin)
        loosest = replace(path[len(path) - 1].solution, status=Status.NO_BOUND)  # a measurement, no answer
        return replace(answered(program, loosest, thin, math.inf, math.inf, []), path=self.read(thin, path))

    def programs(self, posed: Posed, how: How) -> LayerProgram:
        """That of the loosest eps."""
        raise NotImplementedError

    def read(self, posed: Posed, path: EpsPath) -> tuple[tuple[float, float, int], ...]:
        """The path of the answer."""
        raise NotImplementedError


@dataclass(frozen=True)
class Measure(Measurement):
    """The layer's Pareto path at a few relative eps, to allocate by."""

    eps: tuple[float, ...] = (0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.45, 0.65, 0.9)
    rows: int = 4
    kind: ClassVar[str] = "measure"

    def programs(self, posed: Posed, how: How) -> LayerProgram:
        """That of the loosest eps."""
        return Within(max(self.eps)).programs(posed, replace(how, cascade=False))

    def read(self, posed: Posed, path: EpsPath) -> tuple[tuple[float, float, int], ...]:
        """(eps, error, nonzeros) along it."""
        return tuple(
            (eps, point.error / (posed.size or 1.0), int(point.solution.weights[: posed.rows].count_nonzero()))
            for eps, point in zip(self.eps, path, strict=True)
        )

    def __str__(self) -> str:
        return f"path of {len(self.eps)} eps"
