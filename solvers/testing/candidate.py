"""A solver under test: every answer of it is judged again, and kept for the checks that ask for the same."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.certificate.certificate import certify
from convexprune.solvers.certificate.solution import Solution, Status
from convexprune.solvers.errors import SolverRefused
from convexprune.solvers.methods.interface import Solver
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.methods.solve import solve
from convexprune.solvers.programs.program import LayerProgram
from convexprune.solvers.testing import zoo
from convexprune.solvers.testing.member import Member
from convexprune.solvers.testing.report import NotConforming

GOOD = (Status.SOLVED, Status.NO_BOUND)
"""What a solver is content with: proven, or within a budget about which nothing can be proven."""


def expect(condition: bool, message: str) -> None:
    """Raise NotConforming with the message unless the condition holds."""
    if not condition:
        raise NotConforming(message)


def told(solution: Solution) -> str:
    """The solution in a line."""
    c, seconds = solution.certificate, solution.seconds.total
    head = f"{solution.status}, {solution.iterations} iterations, {seconds:.2f} s"
    return f"{head}, gap {c.gap:.1e}, violation {c.violation:.1e}"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A solver under test, with the limits of its runs.

    Args:
        solver: A registered name or an instance.
        tol, feas_tol, time_limit: As in ``solve``, for every run that does not test them.
    """

    solver: str | Solver
    tol: float = 1e-4
    feas_tol: float = 1e-5
    time_limit: float = 10.0
    answers: dict[str, Solution] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def name(self) -> str:
        """Its registered name, or that of its class."""
        return make_solver(self.solver, {})[0]

    @cached_property
    def instance(self) -> Solver:
        """The solver itself."""
        return make_solver(self.solver, {})[1]

    def solve(self, program: LayerProgram, **limits: Any) -> Solution:
        """Its answer, which is checked to be judged as it deserves.

        Raises:
            SolverRefused: It does not take the program. NotConforming: The status is not the certificate's.
        """
        limits = {"tol": self.tol, "feas_tol": self.feas_tol, "time_limit": self.time_limit} | limits
        reason = self.instance.refuses(program)
        if reason:
            raise SolverRefused(reason)
        solution = solve(program, self.instance, **limits)
        _judged_rightly(program, solution, limits["tol"], limits["feas_tol"])
        return solution

    def answer(self, member: Member) -> Solution:
        """Its answer to a member of the zoo, computed once."""
        if member.name not in self.answers:
            self.answers[member.name] = self.solve(zoo.program(member.name))
        return self.answers[member.name]

    def takes(self, member: Member) -> bool:
        """Whether it does not refuse the member."""
        return self.instance.refuses(zoo.program(member.name)) is None

    @cached_property
    def easy(self) -> Member:
        """The first plain member that it takes, or budget where it takes budgets only."""
        for member in (*zoo.members("plain"), *zoo.budgets(), *zoo.members()):
            if self.takes(member):
                return member
        raise NotConforming("it refuses the whole zoo: expected that it takes at least one program")


def _judged_rightly(program: LayerProgram, solution: Solution, tol: float, feas_tol: float) -> None:
    U, L = solution.weights, solution.multipliers
    expect(U.dtype in (torch.float32, torch.float64), f"weights: expected float32 or float64, found {U.dtype}")
    expect(U.device == program.inputs.device, f"weights are on {U.device}, expected {program.inputs.device}")
    if not all(_finite(array) for array in (U, L) if array is not None):
        expect(solution.status not in GOOD, f"weights or multipliers are not finite, yet called {solution.status}")
        return
    certificate = certify(program, U, L)
    expect(certificate == solution.certificate, f"certificate: found {solution.certificate}, expected {certificate}")
    meets = certificate.meets(tol, feas_tol)
    expect(meets == (solution.status is Status.SOLVED), f"status {solution.status}, but meets the tolerances: {meets}")


def _finite(array: Tensor) -> bool:
    return bool(torch.isfinite(array).all())
