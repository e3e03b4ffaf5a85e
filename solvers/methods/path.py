"""The Pareto curve of a set program: what each output error costs, by warm starts along eps."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from convexprune.solvers.arrays import blocks_of, checked_count, checked_positive
from convexprune.solvers.certificate import Solution, Status
from convexprune.solvers.errors import Infeasible, InvalidInput, InvalidTolerance, MissingExtra
from convexprune.solvers.methods.interface import Limits, Solver, Start
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.methods.solve import attempt, default_solver
from convexprune.solvers.programs import LayerProgram
from convexprune.solvers.programs.claims import SETS, is_plain
from convexprune.solvers.programs.fits import SetFit

_UNCONVERGED = 0.01  # a violation, relative to eps, of what did not converge


@dataclass(frozen=True, eq=False)
class PathPoint:
    """The certified answer at one eps, without multipliers; ``error`` is ‖h(XU)‖_F. Both in the units of Y."""

    eps: float
    error: float
    solution: Solution

    @property
    def nonzeros(self) -> int:
        """How many weights are not zero."""
        return self.solution.nonzeros

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, as plain data."""
        return {"eps": self.eps, "error": self.error} | self.solution.to_dict()


@dataclass(frozen=True, eq=False)
class EpsPath:
    """Points of the Pareto curve, one for each eps, in their order; ``size`` is ‖Y‖_F, the unit of relative errors."""

    points: tuple[PathPoint, ...]
    size: float

    def __iter__(self) -> Iterator[PathPoint]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> PathPoint:
        return self.points[index]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"size": self.size, "points": [point.to_dict() for point in self.points]}

    def plot(self, axes: Any = None) -> Any:
        """Nonzeros and value, with the range between bound and value, against the relative output error.

        The nonzeros are on the matplotlib axes given, or on new ones; the values get a second scale on the right.
        MissingExtra is raised where matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            message = 'plots need matplotlib, which is not installed: pip install "convexprune[demo]"'
            raise MissingExtra(message) from error
        axes = plt.subplots()[1] if axes is None else axes
        points = sorted(self.points, key=lambda point: point.error)
        errors = [point.error / (self.size or 1.0) for point in points]
        certificates, right = [point.solution.certificate for point in points], axes.twinx()
        values = [certificate.value for certificate in certificates]
        axes.plot(errors, [point.nonzeros for point in points], "o-", color="tab:blue")
        axes.set_xlabel("output error relative to ‖Y‖")
        axes.set_ylabel("nonzeros", color="tab:blue")
        right.plot(errors, values, color="tab:orange")
        right.fill_between(errors, [c.bound for c in certificates], values, alpha=0.3, color="tab:orange")
        right.set_ylabel("value and bound", color="tab:orange")
        return axes


def solve_path(
    program: LayerProgram,
    eps: Sequence[float],
    solver: str | Solver | None = None,
    *,
    order: Literal["tighten", "loosen"] = "loosen",
    tol: float = 1e-4,
    feas_tol: float = 1e-5,
    max_iter: int | None = None,
    time_limit: float | None = None,
    callback: Callable[[PathPoint], bool | None] | None = None,
    stop: Callable[[], bool] | None = None,
    **options: Any,
) -> EpsPath:
    """Solve a set program for several eps, each from the answer to the one before.

    A solver that can (``admm``) goes on from its own state: XᵀX is formed once, and factorised again only where its
    penalties change. Others start from the weights and multipliers. Any set program with one ball can be given, its own
    eps is not used. ``eps`` are the radii, in the units of Y, in any order; they are gone through from tight to loose
    ("loosen") or back ("tighten"). A true answer of ``callback``, called with each point, ends the path there; the
    point that ``stop`` ends, the last, is ``STOPPED``. All else is as in ``solve``, for each point. What comes back are
    the points that were solved, in the order of ``eps``.

    Raises:
        InvalidInput: No eps, or a program whose fit has no single radius.
        UnknownSolver, UnknownOption, SolverRefused, InvalidTolerance: As in ``solve``.
    """
    if order not in ("tighten", "loosen"):
        raise InvalidInput(f'order: expected "tighten" or "loosen", found {order!r}')
    walk = _Walk(program, solver, options, Limits(tol, feas_tol, max_iter, time_limit, stop))
    radii = [float(radius) for radius in eps]
    if not radii:
        raise InvalidInput("eps: expected at least one radius, found none")
    points: dict[int, PathPoint] = {}
    for index in sorted(range(len(radii)), key=radii.__getitem__, reverse=order == "tighten"):
        points[index] = walk.to(radii[index])
        if (callback is not None and callback(points[index])) or points[index].solution.status is Status.STOPPED:
            break
    return EpsPath(tuple(points[index] for index in sorted(points)), program.fit.size)


def smallest_eps(
    program: LayerProgram,
    nonzeros: int,
    solver: str | Solver | None = None,
    *,
    rtol: float = 1e-2,
    tol: float = 1e-3,
    feas_tol: float = 1e-4,
    max_iter: int | None = None,
    callback: Callable[[PathPoint], bool | None] | None = None,
    stop: Callable[[], bool] | None = None,
    **options: Any,
) -> PathPoint:
    """The smallest eps at which the layer has at most so many nonzeros, by a search along the path.

    The search narrows an interval of log eps; the number of nonzeros need not fall everywhere as eps grows, so the
    answer is the end of an interval below which a point with more nonzeros was found. An eps that is proven infeasible
    counts as one with too many. The search starts at the program's own eps, if positive, and ends where the interval
    is as narrow as ``rtol``, relative, or with the best point so far at a true answer of ``callback``, called with each
    point, or of ``stop``. All else is as in ``solve``, for each point.

    Returns:
        A point with at most so many nonzeros; if the search was ended before there was one, the last point.

    Raises:
        InvalidInput: As in ``solve_path``, or a number of nonzeros that is not a whole number ≥ 0.
        Infeasible: Not even eps = ‖Y‖ allows so few: the fit's ceiling needs more.
    """
    checked_count("nonzeros", nonzeros, least=0)
    checked_positive("rtol", rtol)
    walk = _Walk(program, solver, options, Limits(tol, feas_tol, max_iter, None, stop))
    size = program.fit.size or 1.0
    eps = min(float(program.fit.eps) or 0.1 * size, size)  # type: ignore[attr-defined]
    largest = size * (1 + rtol)  # at ‖Y‖ itself rounding decides whether U = 0 is inside
    low = 0.0  # where there are too many nonzeros
    best: PathPoint | None = None  # where there are few enough
    while True:
        point = walk.to(eps)
        if point.solution.status is Status.STOPPED:
            return best or point
        if not point.solution.certificate.infeasible and point.nonzeros <= nonzeros:
            best = point
        else:
            low = point.eps
        if callback is not None and callback(point):
            return best or point
        if best is None:
            if point.eps >= largest:
                raise Infeasible(f"nonzeros: expected a number that eps = ‖Y‖ = {size:g} allows, found {nonzeros}")
            eps = min(2 * point.eps, largest)
        elif low == 0.0:
            if best.eps < 1e-6 * size:
                return best
            eps = best.eps / 2
        elif best.eps > low * (1 + rtol):
            eps = math.sqrt(low * best.eps)
        else:
            return best


class _Walk:
    """Goes from eps to eps with one solver, keeping what it left behind."""

    def __init__(
        self, program: LayerProgram, solver: str | Solver | None, options: dict[str, Any], limits: Limits
    ) -> None:
        fit = program.fit
        if not isinstance(fit, SetFit) or not is_plain(fit, SETS) or isinstance(fit.eps, torch.Tensor):
            expected = "Ball, ReluBall or NetTrimSet with one eps for the layer"
            raise InvalidInput(f"fit: expected {expected}, found {type(fit).__name__}")
        self.program, self.fit, self.limits = program, fit, limits
        self.name, self.method = make_solver(default_solver(program) if solver is None else solver, options)
        self.start: Start | None = None

    def to(self, eps: float) -> PathPoint:
        if not (math.isfinite(eps) and eps >= 0):
            raise InvalidTolerance(f"eps: expected finite numbers ≥ 0, found {eps}")
        program = replace(self.program, fit=self.fit.with_eps(eps))
        solution, state = attempt(program, self.name, self.method, self.limits, self.start, None)
        certificate = solution.certificate
        if certificate.infeasible or certificate.violation > _UNCONVERGED:
            self.start = None  # multipliers that grew without end are no place to start from
        elif bool(torch.isfinite(solution.weights).all()):
            expected = 10
            if self.start is not None and self.start.state is not None:
                expected = min(100, max(5, round(0.7 * solution.iterations)))  # the next point takes about as many
            self.start = Start(solution.weights, solution.multipliers, state, expected)
        U, total = solution.weights.to(program.dtype), 0.0
        for rows in blocks_of(program.inputs, program.shape[1]):
            fit = program.fit.map(lambda array, rows=rows: array[rows].to(program.dtype))  # type: ignore[misc]
            total += float(fit.sums(program.inputs[rows].to(U) @ U)[0].sum())
        return PathPoint(eps, math.sqrt(total), replace(solution, multipliers=None))
