"""One solver on one problem: what it says, and what the certificate says of it on data built afresh."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from profiles import Answer

from convexprune.solvers import LayerProgram, Solution, certify, solve
from convexprune.solvers.methods import IterativeSolver, Proposal, Start
from convexprune.solvers.methods.interface import Excess, Limits, Solver, Watch

__all__ = ["attempt", "fastest"]

Build = Callable[[], LayerProgram]


@dataclass(frozen=True)
class _Overheard:
    """A solver whose own claims are noted: was it certified what it showed first as solved by its own rule?"""

    solver: Solver
    claims: list[bool] = field(default_factory=list)

    def refuses(self, program: LayerProgram) -> str | None:
        return self.solver.refuses(program)

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        def hear(iteration: int, proposal: Callable[[], Proposal], residuals: Mapping[str, float]) -> Excess:
            excess = watch(iteration, proposal, residuals)
            if self._claims(proposal()):
                self.claims.append(max(excess) <= 1)
            return excess

        final = self.solver.run(program, limits, start, hear)
        if final.ended == "own rule":
            self.claims.append(True)  # what is returned is judged later
        return final

    def _claims(self, shown: Proposal) -> bool:
        # The loop of iterative methods asks the watch first and names their own rule afterwards.
        own = isinstance(self.solver, IterativeSolver) and shown.state is not None and self.solver.done(shown.state)
        return own or shown.ended == "own rule"


def fastest(build: Build, solver: Solver, tol: float, limit: float, repeats: int) -> Answer:
    """The fastest of some attempts, those that solved first."""
    tries = (attempt(build, solver, tol, limit) for _ in range(repeats))
    return min(tries, key=lambda a: (not a.solved, a.seconds))


def attempt(build: Build, solver: Solver, tol: float, limit: float) -> Answer:
    """One answer at a gap of ``tol`` and a violation of a tenth of it; raising is a failure like others."""
    blank, program, heard = Answer("", "", tol, "refused"), build(), _Overheard(solver)
    began = time.perf_counter()
    try:
        reason = solver.refuses(program)
        if reason is not None:
            return replace(blank, message=reason)
        solution = solve(program, heard, tol=tol, feas_tol=tol / 10, time_limit=limit)
    except Exception as error:  # noqa: BLE001 - a solver may raise anything, and that it does is the finding
        waited = time.perf_counter() - began
        return replace(blank, status="raised", message=f"{type(error).__name__}: {error}", seconds=waited)
    answer = _judged(blank, build(), solution)
    return replace(
        answer,
        claimed=bool(heard.claims),
        true=bool(heard.claims) and heard.claims[0] and answer.certified,
        solved=answer.certified and answer.seconds <= limit,
    )


def _judged(blank: Answer, program: LayerProgram, solution: Solution) -> Answer:
    """The answer as the certificate sees it; ``program`` is built afresh, whatever the solver did to its own."""
    seconds, told = solution.seconds, solution.provenance
    answer = replace(
        blank,
        status=str(solution.status),
        message=str(told["message"]),
        seconds=seconds.total,
        setup=seconds.setup,
        certify=seconds.certify,
        iterations=solution.iterations,
    )
    arrays = [array for array in (solution.weights, solution.multipliers) if array is not None]
    if not all(bool(torch.isfinite(array).all()) for array in arrays):
        return answer
    c = certify(program, solution.weights, solution.multipliers)
    return replace(
        answer,
        certified=c.within(blank.tol, blank.tol / 10),
        value=c.value,
        bound=c.bound,
        gap=c.gap,
        violation=c.violation,
        nonzeros=solution.nonzeros,
    )
