"""What a solver makes of each member of the zoo."""

import torch

from convexprune.solvers.certificate.solution import Status
from convexprune.solvers.errors import SolverRefused
from convexprune.solvers.programs.program import LayerProgram
from convexprune.solvers.testing import zoo
from convexprune.solvers.testing.candidate import GOOD, Candidate, expect, told
from convexprune.solvers.testing.member import Member
from convexprune.solvers.testing.report import NotConforming


def refusals(candidate: Candidate) -> str:
    """``refuses`` gives None or a reason for every member of the zoo, and something is taken."""
    members = (*zoo.members(), *zoo.infeasible(), *zoo.budgets())
    taken = 0
    for member in members:
        try:
            reason = candidate.instance.refuses(zoo.program(member.name))
        except SolverRefused as error:
            raise NotConforming(
                f"{member.name}: refuses() raised its reason, expected that it returns it: {error}"
            ) from error
        expect(reason is None or (isinstance(reason, str) and reason.strip() != ""), f"{member.name}: found {reason!r}")
        taken += reason is None
    return f"takes {taken} of {len(members)}, {candidate.easy.name!r} among them"


def solved_or_honest(member: Member, candidate: Candidate) -> str:
    """A feasible convex member is solved to its reference value, or not claimed to be; a plain one is solved."""
    solution = candidate.answer(member)
    c, status, reference = solution.certificate, solution.status, member.reference
    expect(status not in (Status.DIVERGED, Status.INFEASIBLE), f"{status}, but it has a solution: {told(solution)}")
    expect(member.kind != "plain" or status is Status.SOLVED, f"plain members are to be solved: {told(solution)}")
    if reference is not None:
        unit = c.scale if status is Status.SOLVED else abs(reference)
        expect(c.bound <= reference + 1e-6 * unit, f"bound {c.bound:.9g} above the optimum {reference:.9g}")
        near = abs(c.value - reference) <= (2 * candidate.tol + 10 * candidate.feas_tol) * unit
        expect(near or status is not Status.SOLVED, f"value {c.value:.9g}, optimum {reference:.9g}")
    return told(solution)


def impossible(member: Member, candidate: Candidate) -> str:
    """A program without solution is never called solved."""
    solution = candidate.solve(zoo.program(member.name), time_limit=min(0.5, candidate.time_limit))
    expect(solution.status not in GOOD, f"has no solution, yet {told(solution)}")
    return told(solution)


def budget(member: Member, candidate: Candidate) -> str:
    """An exact budget is kept, nothing is claimed to be proven, nothing beats the best support."""
    solution = candidate.answer(member)
    c, best = solution.certificate, member.optimum
    expect(c.bound == -torch.inf and c.gap == torch.inf, f"no bound can be claimed, found {c.bound}")
    expect(c.value < torch.inf, "the budget is broken")
    if best is not None:
        unit = _lost_by_zero(zoo.program(member.name))
        expect(c.value >= best - 1e-6 * unit, f"loss {c.value:.9g} below that of the best support, {best:.9g}")
        near = c.value <= best + 1e-3 * unit
        expect(near or "orthonormal" not in member.name, f"loss {c.value:.6g}, best {best:.6g}: inputs are independent")
    return f"{told(solution)}, loss {c.value:.6g}, best {best:.6g}"


def _lost_by_zero(program: LayerProgram) -> float:
    """What U = 0 loses."""
    return program.fit.value(program.fit.sums(torch.zeros_like(program.fit.Y)))
