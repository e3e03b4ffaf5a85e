"""An error allowed: the least ℓ1 norm within it."""

from dataclasses import dataclass, replace
from typing import ClassVar

from convexprune.nettrim.answers import REFITTED, Answer, Plain, answered, refitted, solver_for
from convexprune.nettrim.posed import How, Posed
from convexprune.nettrim.stopping import Until
from convexprune.solvers import LayerProgram, Solution, Status, certify, solve

__all__ = ["Within"]


@dataclass(frozen=True)
class Within(Plain):
    """The least ℓ1 norm with an output error of at most eps·‖Y‖_F."""

    eps: float
    kind: ClassVar[str] = "within"

    def programs(self, posed: Posed, how: How) -> LayerProgram:
        """ℓ1 on the fit's set."""
        return posed.program(posed.within(self.eps, how)[0], posed.penalty(how))

    def meet(self, posed: Posed, how: How) -> Answer:
        """Solve; if it was stopped before any weights were in the set, the trained weights stay."""
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
        if solution.status in (Status.STOPPED, Status.TIME_LIMIT):
            solution, note = _inside(program, solution, posed)
            notes += [note] if note else []
        elif how.refit and solution.status is Status.SOLVED:
            over = Until(how)
            fitted = refitted(program, solution, over)
            if over.ended:
                notes.append("ended early: before the refit")
                return answered(program, replace(solution, status=over.ended), posed, radius, promised, notes)
            solution = fitted
            kept = solution.certificate.violation <= solution.provenance["limits"]["feas_tol"]
            answer = answered(program, solution, posed, radius, promised, notes)
            return replace(answer, status=REFITTED if kept else answer.status)
        return answered(program, solution, posed, radius, promised, notes)

    def __str__(self) -> str:
        return f"{self.eps:g}"


def _inside(program: LayerProgram, solution: Solution, posed: Posed) -> tuple[Solution, str]:
    """Of a solve that was stopped: weights that keep the promise."""
    tolerance = solution.provenance["limits"]["feas_tol"]
    if solution.certificate.violation <= tolerance:
        return solution, "ended early: the best feasible weights so far"
    W = posed.W
    trained = replace(solution, weights=W, certificate=certify(program, W, solution.multipliers))
    return trained, "ended before any weights kept the promise: the trained ones stay"
