"""What each error would cost: paths measured to allocate by, and numbers of weights split over layers."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from convexprune.errors import PruningFailed
from convexprune.options import Options
from convexprune.pruners.allocation import Curve, allocate_eps, allocate_nonzeros
from convexprune.runs.answer import Answer, Goal, answered, judged, set_solver, unproven
from convexprune.runs.problem import Problem, StoppingRule
from convexprune.runs.run import Run
from convexprune.solvers.certificate import Status
from convexprune.solvers.methods import EpsPath, solve_path
from convexprune.solvers.programs import GroupL2, LayerProgram, Penalty

_MOST = 0.999  # an eps at which nothing is left; what it costs is finite, for counts that are small as well


class Measurement(Goal):
    """Base of goals that are read off a path, at a gap of 1e-2, from a random choice of at most ``rows``·N samples.

    The weights are those of the loosest eps; nothing is promised of them.
    """

    measured: ClassVar[bool] = True
    eps: tuple[float, ...]
    rows: int

    def solve_group(self, problem: Problem, options: Options, watch: StoppingRule) -> Answer:
        """Warm starts along eps, then what the path says; the trained weights if that was cut short."""
        sample = problem.sample(self.rows * len(problem.stored), options.seed)
        program = self.program(sample, options)
        grouped = isinstance(getattr(program.penalty, "penalty", program.penalty), GroupL2)
        solver = options.solver or "admm" if grouped else set_solver(sample, options)
        limits = {"tol": 1e-2, "feas_tol": 1e-3, "max_iter": options.max_iter} | dict(options.solver_options or {})
        radii = [value * sample.size for value in self.eps]
        path = solve_path(program, radii, solver, callback=watch.show, stop=watch, **limits)  # type: ignore[arg-type]
        if watch.ended:
            ended = Status.STOPPED
            return unproven(sample.stored, sample, "none", 0.0, options, str(ended), ended=ended)
        loosest = replace(path[len(path) - 1].solution, status=Status.NO_BOUND)  # a measurement, no answer
        return replace(answered(program, loosest, sample), path=self.read(sample, path))

    def judge_group(self, answer: Answer, problem: Problem, options: Options) -> Answer:
        """The weights that are kept, without bound and gap: no multipliers prove these any more."""
        sample = problem.sample(self.rows * len(problem.stored), options.seed)
        return judged(answer, sample, self.program(sample, options))

    def program(self, problem: Problem, options: Options) -> LayerProgram:
        """That of the loosest eps."""
        fit, _, _ = problem.within(max(self.eps), replace(options, mode="parallel"))
        return problem.program(fit, self.penalty(problem, options))

    def penalty(self, problem: Problem, options: Options) -> Penalty:
        """What is least along the path: that of the options."""
        return problem.penalty(options)

    def read(self, problem: Problem, path: EpsPath) -> tuple[tuple[float, float, int], ...]:
        """The path of the answer."""
        raise NotImplementedError


@dataclass(frozen=True)
class Measure(Measurement):
    """The layer's Pareto path at a few relative eps, to allocate by."""

    eps: tuple[float, ...] = (0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.45, 0.65, 0.9)
    rows: int = 4
    kind: ClassVar[str] = "measure"

    def read(self, problem: Problem, path: EpsPath) -> tuple[tuple[float, float, int], ...]:
        """(eps, error, nonzeros) along it."""
        return tuple(
            (eps, point.error / (problem.size or 1.0), int(point.solution.weights[: problem.rows].count_nonzero()))
            for eps, point in zip(self.eps, path, strict=True)
        )

    def __str__(self) -> str:
        return f"path of {len(self.eps)} eps"


class Stopped(Exception):
    """The run ended before all paths were measured: nothing is shared, and nothing written."""


def measured(run: Run, goals: Mapping[str, Measurement]) -> dict[str, tuple[Answer, ...]]:
    """The paths of these layers on the trained network's inputs.

    Raises:
        Stopped: The run was.
        PruningFailed: One was cut short, by its own time limit or by the caller's callback.
    """
    found = dict(run.solve(goals))
    if run.stopped is not None:
        raise Stopped
    for name, answers in found.items():
        if not all(answer.path for answer in answers):
            raise PruningFailed(
                f"layer {name!r}: its path was cut short by layer_time_limit or the callback, and without it weights "
                "cannot be shared among layers; give it more time. The model is unchanged"
            )
    return {name: found[name] for name in goals}


def curves(run: Run, names: Collection[str]) -> dict[str, list[tuple[float, float]]]:
    """Points (eps, nonzeros of all groups) of these layers, from nothing removed to everything."""
    found = measured(run, {name: Measure() for name in run.layers if name in names})
    inner = {
        name: [
            (float(points[0][0]), float(sum(int(n) for _, _, n in points)))
            for points in zip(*(answer.path for answer in answers), strict=True)
        ]
        for name, answers in found.items()
    }
    return {name: [(0.0, float(nonzeros(run, name))), *points, (1.0, 0.0)] for name, points in inner.items()}


def split_counts(run: Run, found: Mapping[str, Curve], count: int) -> dict[str, int]:
    """How many of so many weights each layer keeps, so that the outputs keep their correlation with the old ones.

    Least squares leave ‖Y‖² = ‖Ŷ‖² + ‖Ŷ − Y‖², so a layer of relative error eps keeps the squared correlation 1 − eps².
    Those of the layers are taken to multiply: this maximises Π (1 − eps_l(n_l)²), where eps_l is the layer's path. No
    layer is given up: its factor would be 0.
    """
    least = {name: run.layers[name].groups for name in found}
    lost = {name: [(correlation_lost(eps), max(n, least[name])) for eps, n in curve] for name, curve in found.items()}
    split = allocate_nonzeros(lost, dict.fromkeys(lost, 1.0), count).values
    return {name: max(least[name], int(split[name] + 1e-9)) for name in found}


def fewest_weights(run: Run) -> Callable[[float], Mapping[str, float]]:
    """From a level to each layer's eps: those that leave the fewest weights on the layers' measured paths.

    Together they lose as much correlation, Σ −log(1 − eps²), as the level in each layer would.
    """
    found = curves(run, run.layers)
    costs = {name: [(correlation_lost(eps), n) for eps, n in curve] for name, curve in found.items()}

    def shares(level: float) -> Mapping[str, float]:
        split = allocate_eps(costs, dict.fromkeys(costs, 1.0), len(costs) * correlation_lost(level)).values
        return {name: math.sqrt(-math.expm1(-lost)) for name, lost in split.items()}

    return shares


def correlation_lost(eps: float) -> float:
    """−log of the squared correlation with the old outputs that an error of eps leaves."""
    return -math.log1p(-(min(eps, _MOST) ** 2))


def nonzeros(run: Run, name: str) -> int:
    """Trained weights of a layer that are not zero, biases not counted."""
    biased = run.layers[name].biased
    return sum(int(W[: len(W) - biased].count_nonzero()) for W in run.trained[name])
