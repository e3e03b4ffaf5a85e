"""The goal of an error: the least ℓ1 norm within it, certified."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.options import Options
from convexprune.pruners.budget import watched, zeros_stayed
from convexprune.runs.answer import (
    KEPT,
    REFITTED,
    ROUNDED,
    Answer,
    Goal,
    answered,
    judged,
    refitted,
    set_solver,
    solve_limits,
)
from convexprune.runs.problem import Problem, StoppingRule
from convexprune.runs.records import slack
from convexprune.solvers.certificate import Status, certify
from convexprune.solvers.programs import LayerProgram

_ROUNDED = 1e-2  # the violation up to which weights that only rounding moved out are better than trained ones
_SMALLER = 0.5  # of its radius, by which a set may be smaller so that weights are inside the whole one once rounded


@dataclass(frozen=True)
class Within(Goal):
    """The least penalty with an output error of at most eps·‖Y‖_F."""

    eps: float
    kind: ClassVar[str] = "within"

    @property
    def allowed(self) -> float | None:
        """eps."""
        return self.eps

    def program(self, problem: Problem, options: Options) -> LayerProgram:
        """The penalty on the fit's set."""
        return problem.program(problem.within(self.eps, options)[0], problem.penalty(options))

    def solve_group(self, problem: Problem, options: Options, watch: StoppingRule) -> Answer:
        """Solve; where that finds no better weights that keep the promise, the trained ones stay."""
        fit, radius, promised = problem.within(self.eps, options)
        program, promise = problem.program(fit, problem.penalty(options)), {"radius": radius, "promised": promised}
        # No start: ADMM's own, a ridge solution, needs 10 to 25 % fewer iterations than the trained weights.
        solver, limits = set_solver(problem, options), solve_limits(options, watch)
        solution, notes = watched(program, solver, watch, **limits), []
        if radius > self.eps * problem.size * (1 + 1e-12):
            notes.append(
                f"eps raised from {self.eps:g} to {radius / (problem.size or 1.0):.4g}: on the pruned network's inputs "
                "the trained weights themselves miss by that much"
            )
        kept = solution.certificate.violation <= options.feas_tol
        if solution.status in (Status.STOPPED, Status.TIME_LIMIT) and kept:
            notes.append("ended early: the best feasible weights so far")
        if options.refit and solution.status is Status.SOLVED:
            fitted = refitted(program, solution, watch)
            if watch.ended:
                notes.append("ended early: before the refit")
                return answered(program, replace(solution, status=watch.ended), problem, notes, **promise)
            solution = fitted
        answer = answered(program, solution, problem, notes, **promise)
        if options.refit and solution.status is Status.SOLVED and _violation(answer) <= options.feas_tol:
            return replace(answer, status=REFITTED)
        if answer.status == ROUNDED and options.feas_tol < _violation(answer) < _SMALLER / 2:
            # Rounding moved the weights out of the set: those of a smaller one, if rounded they are solved.
            with_eps = getattr(fit, "with_eps", None) or partial(problem.fit.within, problem.given)
            smaller = problem.program(with_eps(radius * (1 - 2 * _violation(answer))), program.penalty)
            again = watched(smaller, solver, watch, start=answer.solution, **solve_limits(options, watch))
            proven = replace(again, certificate=certify(program, again.weights, _finite(again.multipliers)))
            second = answered(program, proven, problem, answer.notes, **promise)
            answer = second if second.status == str(Status.SOLVED) else answer
        if answer.status == str(Status.SOLVED):
            return answer
        return _or_trained(program, answer, problem, options, promised)

    def judge_group(self, answer: Answer, problem: Problem, options: Options) -> Answer:
        """The recorded status where it promises nothing, or what it promises is found to hold."""
        fit, radius, promised = problem.within(self.eps, options)
        program = problem.program(fit, problem.penalty(options))
        again = judged(answer, problem, program, radius=radius, promised=promised)
        certificate, allowed = again.solution.certificate, slack(again)
        inside = certificate.violation <= options.feas_tol + allowed["violation"]
        inside &= zeros_stayed(answer, problem, options)
        holds = {
            str(Status.SOLVED): inside and certificate.gap <= options.tol + allowed["gap"],
            REFITTED: options.refit and inside,
            KEPT: torch.equal(answer.stored, problem.stored),
            str(Status.NO_BOUND): False,
        }
        return again if holds.get(answer.status, True) else replace(again, status=f"not {answer.status}")

    def __str__(self) -> str:
        return f"{self.eps:g}"


def _or_trained(program: LayerProgram, answer: Answer, problem: Problem, options: Options, promised: float) -> Answer:
    """The answer, unless the trained weights keep the promise and it does not, or not at a lower price."""
    found, tolerance = answer.solution.certificate, options.feas_tol
    trained = certify(program, problem.W, _finite(answer.solution.multipliers))
    keeps = found.violation <= (_ROUNDED if answer.status == ROUNDED else tolerance)
    if keeps:
        better = trained.violation <= tolerance and trained.value < found.value
    else:
        # Targets are computed in the precision of the weights, which may be coarser than a small eps.
        nearest = 0.0 if answer.solution.status is Status.INFEASIBLE else found.violation
        rounding = 4 * torch.finfo(problem.dtype).eps * math.sqrt(len(problem.stored)) * problem.size
        better = trained.violation <= max(tolerance, float(rounding / program.fit.scale), nearest)
    if not better:
        return answer
    solution, ended = answer.solution, str(answer.solution.status)
    ending = f"{ended}, but not as rounded to {str(problem.stored.dtype)[6:]}" if answer.status == ROUNDED else ended
    solution = replace(solution, weights=problem.W, certificate=trained)
    note = f"no better weights were found that keep the promise (the solve ended {ending}): the trained ones stay"
    status = ended if ended == str(Status.STOPPED) else KEPT
    return Answer.of(
        solution, problem.stored, problem, status, [*answer.notes, note], radius=answer.radius, promised=promised
    )


def _violation(answer: Answer) -> float:
    return answer.solution.certificate.violation


def _finite(multipliers: Tensor | None) -> Tensor | None:
    return multipliers if multipliers is not None and bool(multipliers.isfinite().all()) else None
