"""The conformance kit: every promise of the solver protocol, checked on the zoo."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from convexprune.solvers.errors import MissingExtra, SolverRefused
from convexprune.solvers.methods.interface import Solver
from convexprune.solvers.testing import checks as _checks
from convexprune.solvers.testing import promises, zoo
from convexprune.solvers.testing.candidate import Candidate
from convexprune.solvers.testing.member import Member
from convexprune.solvers.testing.report import NotConforming, Report, Result


@dataclass(frozen=True)
class Check:
    """One check by name; call it with a solver, or with a ``Candidate``, which keeps answers for other checks."""

    name: str
    test: Callable[[Candidate], str]

    def __call__(self, solver: str | Solver | Candidate) -> str:
        """What was seen, or why the solver does not take the program.

        Raises:
            NotConforming: The check failed, or the solver raised.
        """
        result = self.result(solver if isinstance(solver, Candidate) else Candidate(solver))
        if not result.passed:
            raise NotConforming(f"{self.name}: {result.detail}")
        return result.detail

    def result(self, candidate: Candidate) -> Result:
        """The same as data."""
        try:
            return Result(self.name, True, self.test(candidate))
        except MissingExtra:
            raise
        except SolverRefused as error:
            return Result(self.name, True, str(error), taken=False)
        except NotConforming as error:
            return Result(self.name, False, str(error))
        except Exception as error:  # noqa: BLE001 - a solver may raise anything, and that it does is the finding
            return Result(self.name, False, f"raised {type(error).__name__}: {error}")

    def __str__(self) -> str:
        return self.name


_PROTOCOL = {
    "refuses with a reason": _checks.refusals,
    "iteration limit": promises.iteration_limit,
    "time limit": promises.time_limit,
    "determinism": promises.determinism,
    "inputs untouched": promises.inputs_untouched,
    "precisions": promises.precisions,
    "starts": promises.starts,
    "multipliers": promises.multipliers,
    "a lie is not called solved": promises.lies,
}


def checks(members: Iterable[Member] | None = None) -> list[Check]:
    """The kit as a list, for ``@pytest.mark.parametrize("check", testing.checks(), ids=str)``.

    Args:
        members: Feasible convex programs to be solved; the whole zoo if None. Impossible programs and exact budgets
            are always among the checks.
    """
    chosen = zoo.members() if members is None else tuple(members)
    return [
        *(Check(name, test) for name, test in _PROTOCOL.items()),
        *(Check(member.name, partial(_checks.solved_or_honest, member)) for member in chosen),
        *(Check(member.name, partial(_checks.impossible, member)) for member in zoo.infeasible()),
        *(Check(member.name, partial(_checks.budget, member)) for member in zoo.budgets()),
    ]


def check(
    solver: str | Solver,
    members: Iterable[Member] | None = None,
    *,
    tol: float = 1e-4,
    feas_tol: float = 1e-5,
    time_limit: float = 10.0,
) -> Report:
    """Run the conformance kit on a solver.

    A solver conforms if it keeps the protocol: what it takes it solves or says honestly that it did not, plain members
    it does solve. How much of the awkward rest it solves is in the details.

    Args:
        solver: A registered name or an instance.
        members: Feasible convex programs to be solved; the whole zoo if None, ``zoo.representative()`` for slow ones.
        tol: Certified relative gap to reach.
        feas_tol: Violation to reach.
        time_limit: Seconds for each program.

    Raises:
        UnknownSolver, InvalidInput: No such solver, or nothing like one.
        MissingExtra: The solver's package is not installed.
    """
    candidate = Candidate(solver, tol, feas_tol, time_limit)
    return Report(candidate.name, tuple(each.result(candidate) for each in checks(members)))
