"""An error allowed: the least ℓ1 norm within it."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.nettrim.answers import KEPT, REFITTED, Answer, Plain, answered, refitted, solver_for
from convexprune.nettrim.posed import How, Posed
from convexprune.nettrim.stopping import Until
from convexprune.solvers import LayerProgram, Solution, Status, certify, solve
from convexprune.solvers.programs.fits.base import SetFit

_ROUNDED = (
    1e-2  # the violation up to which weights that only rounding moved out of the set are better than trained ones
)
_SMALLER = 0.5  # of its radius, by which a set may be smaller so that weights are inside the whole one once rounded


@dataclass(frozen=True)
class Within(Plain):
    """The least ℓ1 norm with an output error of at most eps·‖Y‖_F."""

    eps: float
    kind: ClassVar[str] = "within"

    def programs(self, posed: Posed, how: How) -> LayerProgram:
        """ℓ1 on the fit's set."""
        return posed.program(posed.within(self.eps, how)[0], posed.penalty(how))

    def meet(self, posed: Posed, how: How) -> Answer:
        """Solve; where that finds no better weights that keep the promise, the trained ones stay."""
        fit, promised = posed.within(self.eps, how)
        program = posed.program(fit, posed.penalty(how))
        # No start: ADMM's own, a ridge solution, needs 10 to 25 % fewer iterations than the trained weights.
        solution = solve(program, solver_for(posed, how), callback=how.callback, stop=how.stop, **how.options)
        radius = float(fit.eps)
        notes = []
        if radius > self.eps * posed.size * (1 + 1e-12):
            notes.append(
                f"eps raised from {self.eps:g} to {radius / (posed.size or 1.0):.4g}: on the pruned network's inputs "
                "the trained weights themselves miss by that much"
            )
        kept = solution.certificate.violation <= _tolerance(solution)
        if solution.status in (Status.STOPPED, Status.TIME_LIMIT) and kept:
            notes.append("ended early: the best feasible weights so far")
        refit = how.refit and solution.status is Status.SOLVED
        if refit:
            over = Until(how)
            fitted = refitted(program, solution, over)
            if over.ended:
                notes.append("ended early: before the refit")
                return answered(program, replace(solution, status=over.ended), posed, radius, promised, notes)
            solution = fitted
        answer = answered(program, solution, posed, radius, promised, notes)
        if refit and answer.solution.certificate.violation <= _tolerance(solution):
            return replace(answer, status=REFITTED)
        if answer.status == "rounded":
            answer = _inside(program, answer, posed, how, promised)
        return answer if answer.status == str(Status.SOLVED) else _or_trained(program, answer, posed, promised)

    def __str__(self) -> str:
        return f"{self.eps:g}"


def _tolerance(solution: Solution) -> float:
    return float(solution.provenance["limits"]["feas_tol"])


def _inside(program: LayerProgram, answer: Answer, posed: Posed, how: How, promised: float) -> Answer:
    """Where rounding moved the weights out of the set: those of a smaller set, if they are solved after rounding."""
    fit, violation = program.fit, answer.solution.certificate.violation
    assert isinstance(fit, SetFit)  # noqa: S101 - ``within`` made it
    if not _tolerance(answer.solution) < violation < _SMALLER / 2:
        return answer
    smaller = replace(program, X=posed.X, fit=fit.with_eps(float(fit.eps) * (1 - 2 * violation)))
    again = solve(smaller, solver_for(posed, how), start=answer.solution, stop=how.stop, **how.options)
    judged = replace(again, certificate=certify(program, again.weights, _finite(again.multipliers)))
    second = answered(program, judged, posed, answer.radius, promised, answer.notes)
    return second if second.status == str(Status.SOLVED) else answer


def _or_trained(program: LayerProgram, answer: Answer, posed: Posed, promised: float) -> Answer:
    """The answer, unless the trained weights keep the promise and it does not, or not at a lower price."""
    found, tolerance = answer.solution.certificate, _tolerance(answer.solution)
    trained = certify(program, posed.W, _finite(answer.solution.multipliers))
    keeps = found.violation <= (_ROUNDED if answer.status == "rounded" else tolerance)
    if keeps:
        better = trained.violation <= tolerance and trained.value < found.value
    else:
        # Targets are computed in the precision of the weights, which may be coarser than a small eps.
        nearest = 0.0 if answer.solution.status is Status.INFEASIBLE else found.violation
        better = trained.violation <= max(tolerance, _rounding(program, posed), nearest)
    if not better:
        return answer
    solution, ended = answer.solution, str(answer.solution.status)
    how = f"{ended}, but not as rounded to {str(posed.stored.dtype)[6:]}" if answer.status == "rounded" else ended
    solution = replace(solution, weights=posed.W, certificate=trained)
    note = f"no better weights were found that keep the promise (the solve ended {how}): the trained ones stay"
    status = ended if ended == str(Status.STOPPED) else KEPT
    return Answer.of(solution, posed.stored, posed, answer.radius, promised, status, [*answer.notes, note])


def _rounding(program: LayerProgram, posed: Posed) -> float:
    """A violation of trained weights that the rounding of their own outputs explains."""
    relative = 4 * torch.finfo(posed.dtype).eps * math.sqrt(len(posed.stored))
    return relative * posed.size / program.fit.scale


def _finite(multipliers: Tensor | None) -> Tensor | None:
    return multipliers if multipliers is not None and bool(multipliers.isfinite().all()) else None
