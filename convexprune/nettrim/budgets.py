"""A number of weights allowed: the best ones."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from convexprune.nettrim.answers import Answer, Plain, answered, refitted, solver_for
from convexprune.nettrim.posed import How, Posed
from convexprune.nettrim.stopping import Until
from convexprune.nettrim.tolerance import Within
from convexprune.solvers import LayerProgram, Status, TopK, solve
from convexprune.solvers.methods import smallest_eps
from convexprune.solvers.programs import NM


@dataclass(frozen=True)
class Keep(Plain):
    """The best weights of which at most ``count`` are not zero, the bias not counted."""

    count: int
    kind: ClassVar[str] = "keep"

    def programs(self, posed: Posed, how: How) -> LayerProgram:
        """The loss within the budget."""
        return posed.program(posed.loss(), _most(self.count, posed, how))

    def meet(self, posed: Posed, how: How) -> Answer:
        """Continuation, refit and exchanges."""
        return _budgeted(self.programs(posed, how), posed, how)

    def __str__(self) -> str:
        return f"keep {self.count:,}"


@dataclass(frozen=True)
class Pattern(Plain):
    """The best weights of which at most n of m inputs in a row are not zero."""

    n: int
    m: int
    kind: ClassVar[str] = "pattern"

    def programs(self, posed: Posed, how: How) -> LayerProgram:
        """The loss within the pattern."""
        return posed.program(posed.loss(), NM(self.n, self.m, rows=posed.rows, within=posed.support(how)))

    def meet(self, posed: Posed, how: How) -> Answer:
        """Continuation, refit and exchanges."""
        return _budgeted(self.programs(posed, how), posed, how)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class KeepByPath(Plain):
    """The support of the ℓ1 program at the least eps that leaves at most ``count`` weights, fitted again."""

    count: int
    kind: ClassVar[str] = "keep-by-path"

    def programs(self, posed: Posed, how: How) -> LayerProgram:
        """The loss within the budget, which is what the answer is judged by."""
        return posed.program(posed.loss(), _most(self.count, posed, how))

    def meet(self, posed: Posed, how: How) -> Answer:
        """A search along eps, then a refit."""
        path = Within(0.1).programs(posed, how)  # in cascade from an eps at which the trained weights are feasible
        free = posed.stored.shape[1] if posed.biased else 0  # the bias is never a zero
        options = {name: value for name, value in how.options.items() if name != "time_limit"}
        over = Until(how)
        count = posed.portion(self.count) + free
        point = smallest_eps(path, count, solver_for(posed, how), callback=over.seen, stop=over, **options)
        program = self.programs(posed, how)
        cut = point.solution.status is Status.STOPPED  # within a point, before any had few enough: of no use
        found = replace(point.solution, weights=_within_budget(program, posed.W if cut else point.solution.weights))
        found = replace(refitted(program, found, over), status=over.ended or Status.NO_BOUND)
        ended = "" if point.solution.status is Status.SOLVED else f", whose solve ended {point.solution.status}"
        note = f"support of eps {point.eps / (posed.size or 1.0):.4g}{ended}"
        note = "ended early: the support is that of the largest trained weights" if cut else note
        return answered(program, found, posed, math.inf, math.inf, [note])

    def __str__(self) -> str:
        return f"path to {self.count:,}"


def _most(count: int, posed: Posed, how: How) -> TopK:
    """At most the group's part of so many weights."""
    return TopK(posed.portion(count), rows=posed.rows, within=posed.support(how))


def _budgeted(program: LayerProgram, posed: Posed, how: How) -> Answer:
    # The tolerances are those of a certificate, which a budget has not.
    limits: dict[str, Any] = {name: how.options.get(name) for name in ("max_iter", "time_limit")}
    own = {name: value for name, value in how.options.items() if name not in ("tol", "feas_tol", *limits)}
    solver = "continuation" if how.solver is None else how.solver
    solution = solve(program, solver, start=posed.W, callback=how.callback, stop=how.stop, **limits, **own)
    return answered(program, solution, posed, math.inf, math.inf, [])


def _within_budget(program: LayerProgram, U: Tensor) -> Tensor:
    """The largest entries: a bias that happens to be 0 leaves room for one weight more in a count."""
    return program.penalty.prox(U, 1.0)
