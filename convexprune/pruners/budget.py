"""Exact budgets: the best weights of which at most so many are not zero, by continuation, refit and exchanges."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from convexprune.options import Options
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.solving import Solving
from convexprune.runs.answer import Answer, Goal, answered, judged, solve_limits
from convexprune.runs.problem import Problem, StoppingRule
from convexprune.solvers.certificate import Solution, Status
from convexprune.solvers.methods import solve
from convexprune.solvers.programs import NM, LayerProgram, Penalty, TopK
from convexprune.targets import Sparsity, Target


class BudgetGoal(Goal):
    """Base of goals that minimise a layer's loss within a budget; write ``penalty``. Not convex, so without bound."""

    def penalty(self, problem: Problem, options: Options) -> Penalty:
        """The budget."""
        raise NotImplementedError

    def program(self, problem: Problem, options: Options) -> LayerProgram:
        """The loss within the budget."""
        return problem.program(problem.loss(), self.penalty(problem, options))

    def solve_group(self, problem: Problem, options: Options, watch: StoppingRule) -> Answer:
        """Continuation, refit and exchanges."""
        program, limits = self.program(problem, options), solve_limits(options, watch)
        del limits["tol"], limits["feas_tol"]  # those of a certificate, which a budget has not
        solver = "continuation" if options.solver is None else options.solver
        return answered(program, watched(program, solver, watch, start=problem.W, **limits), problem)

    def judge_group(self, answer: Answer, problem: Problem, options: Options) -> Answer:
        """Whether the budget is kept: a broken one has an infinite value."""
        again = judged(answer, problem, self.program(problem, options))
        return kept_or_not(again, problem, options, math.isfinite(again.solution.certificate.value))


def watched(program: LayerProgram, solver: object, watch: StoppingRule, **options: object) -> Solution:
    """``solve``, ended when the watch says so."""
    return solve(program, solver, callback=watch.callback, stop=watch.interrupted, **options)  # type: ignore[arg-type]


def zeros_stayed(answer: Answer, problem: Problem, options: Options) -> bool:
    """Whether no weight is stored where the options allow none."""
    support = problem.support(options)
    return support is None or not bool(answer.stored[~support].any())


def kept_or_not(again: Answer, problem: Problem, options: Options, kept: bool) -> Answer:
    """The answer; of a budget that is not kept, or of zeros that did not stay, with a status that says so."""
    holds = again.status != str(Status.NO_BOUND) or (kept and zeros_stayed(again, problem, options))
    return again if holds else replace(again, status=f"not {again.status}")


@dataclass(frozen=True)
class Keep(BudgetGoal):
    """At most ``count`` weights of a layer that are not zero, the bias not counted."""

    count: int
    kind: ClassVar[str] = "keep"

    def penalty(self, problem: Problem, options: Options) -> Penalty:
        """At most the group's part of so many weights."""
        return TopK(problem.portion(self.count), rows=problem.rows, within=problem.support(options))

    def __str__(self) -> str:
        return f"keep {self.count:,}"


@dataclass(frozen=True)
class Pattern(BudgetGoal):
    """At most n of m inputs in a row that are not zero."""

    n: int
    m: int
    kind: ClassVar[str] = "pattern"

    def penalty(self, problem: Problem, options: Options) -> Penalty:
        """The pattern."""
        return NM(self.n, self.m, rows=problem.rows, within=problem.support(options))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@register_pruner("budget")
@dataclass(frozen=True)
class Budget(Solving):
    """Exact budgets: the best weights of a given number or pattern, fitted to what the layer computes on the data."""

    targets: ClassVar[tuple[type[Target], ...]] = (Sparsity,)

    def budget(self, count: int) -> Goal:
        """At most so many weights."""
        return Keep(count)

    def pattern(self, n: int, m: int) -> Goal:
        """At most n of m."""
        return Pattern(n, m)
