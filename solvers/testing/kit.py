"""The conformance kit: every promise of the solver protocol, checked on the zoo.

Each check is a function of a ``Candidate`` that says what it saw or raises NotConforming.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.certificate import Solution, Status, certify
from convexprune.solvers.errors import MissingExtra, SolverRefused
from convexprune.solvers.methods.interface import Limits, Proposal, Solver, Start, Watch
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.methods.solve import solve
from convexprune.solvers.programs import LayerProgram
from convexprune.solvers.testing import zoo
from convexprune.solvers.testing.contract import ConformanceReport, NotConforming, Result, expect, result_of
from convexprune.solvers.testing.layers import FITS
from convexprune.solvers.testing.zoo import Member

_GOOD = (Status.SOLVED, Status.NO_BOUND)  # proven, or within a budget about which nothing can be proven
_GRACE = 2.0  # seconds beyond a time limit: for the set-up, the iteration under way and one judging
_ROUNDED = {torch.float64: 1e-3, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, eq=False)
class Candidate:
    """A solver under test, by name or instance, with the limits of its runs; answers are kept for other checks."""

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
        """Its answer. SolverRefused: it does not take the program. NotConforming: the status is not as certified."""
        limits = {"tol": self.tol, "feas_tol": self.feas_tol, "time_limit": self.time_limit} | limits
        solution = solve(program, self.instance, **limits)
        U, L = solution.weights, solution.multipliers
        expect(U.dtype in (torch.float32, torch.float64), f"weights: expected float32 or float64, found {U.dtype}")
        expect(U.device == program.inputs.device, f"weights are on {U.device}, expected {program.inputs.device}")
        if not all(bool(torch.isfinite(array).all()) for array in (U, L) if array is not None):
            expect(solution.status not in _GOOD, f"weights or multipliers are not finite, yet called {solution.status}")
            return solution
        c = certify(program, U, L)
        expect(c == solution.certificate, f"certificate: found {solution.certificate}, expected {c}")
        within = c.within(limits["tol"], limits["feas_tol"])
        right = within == (solution.status is Status.SOLVED)
        expect(right, f"status {solution.status}, but within the tolerances: {within}")
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

    @property
    def easy_program(self) -> LayerProgram:
        """That member's program."""
        return zoo.program(self.easy.name)

    def start(self) -> Start:
        """A copy of its answer to that."""
        U, L = self.answer(self.easy).weights, self.answer(self.easy).multipliers
        return Start(U.clone(), None if L is None else L.clone())


def _summary(solution: Solution) -> str:
    c, seconds = solution.certificate, solution.seconds.total
    head = f"{solution.status}, {solution.iterations} iterations, {seconds:.2f} s"
    return f"{head}, gap {c.gap:.1e}, violation {c.violation:.1e}"


def _refuses_with_a_reason(candidate: Candidate) -> str:
    """``refuses`` gives None or a reason for every member of the zoo, and something is taken."""
    members = (*zoo.members(), *zoo.infeasible(), *zoo.budgets())
    taken = 0
    for member in members:
        try:
            reason = candidate.instance.refuses(zoo.program(member.name))
        except SolverRefused as error:
            message = f"{member.name}: refuses() raised its reason, expected that it returns it: {error}"
            raise NotConforming(message) from error
        expect(reason is None or (isinstance(reason, str) and reason.strip() != ""), f"{member.name}: found {reason!r}")
        taken += reason is None
    return f"takes {taken} of {len(members)}, {candidate.easy.name!r} among them"


def _iteration_limit(candidate: Candidate) -> str:
    """No more iterations than allowed, though the tolerances cannot be met."""
    done = []
    for limit in (1, 5):
        solution = candidate.solve(candidate.easy_program, tol=0.0, feas_tol=0.0, max_iter=limit)
        expect(solution.iterations <= limit, f"max_iter={limit}: found {solution.iterations} iterations")
        done.append(str(solution.iterations))
    return f"{' and '.join(done)} iterations of 1 and 5"


def _time_limit(candidate: Candidate) -> str:
    """Back soon after the time is up, though the tolerances cannot be met."""
    candidate.answer(candidate.easy)  # so that imports do not count
    large = [m for m in zoo.members("plain") if "500x20" in m.name and candidate.takes(m)]
    program = zoo.program((large or [candidate.easy])[0].name)
    began = time.perf_counter()
    solution = candidate.solve(program, tol=0.0, feas_tol=0.0, max_iter=100_000, time_limit=0.2)
    took = time.perf_counter() - began
    expect(took <= 0.2 + _GRACE, f"time_limit=0.2: came back after {took:.1f} s, expected at most {0.2 + _GRACE:.1f} s")
    return f"{solution.status} after {took:.2f} s of 0.2 s"


def _determinism(candidate: Candidate) -> str:
    """Two runs give the same bits."""
    first, second = (candidate.solve(candidate.easy_program) for _ in range(2))
    for name in ("weights", "multipliers"):
        a, b = getattr(first, name), getattr(second, name)
        expect(a is b if a is None or b is None else torch.equal(a, b), f"{name} differ between two runs")
    return f"{first.iterations} iterations twice"


def _inputs_unchanged(candidate: Candidate) -> str:
    """Inputs, targets and start are as before, and the answer shares no memory with them."""
    mine = candidate.easy_program
    program = LayerProgram(mine.inputs.clone(), mine.fit.map(torch.clone), mine.penalty)
    start = candidate.start()
    arrays = [a for a in (program.inputs, program.fit.Y, start.weights, start.multipliers) if a is not None]
    before = [array.clone() for array in arrays]
    solution = candidate.solve(program, start=start)
    expect(all(map(torch.equal, arrays, before)), "inputs, targets or start were changed")
    theirs = {array.data_ptr() for array in arrays}
    shared = [a for a in (solution.weights, solution.multipliers) if a is not None and a.data_ptr() in theirs]
    expect(not shared, "the answer shares memory with inputs, targets or start")
    return "unchanged"


def _precisions(candidate: Candidate) -> str:
    """Data in float64, float32, float16 and bfloat16 are taken, the answers are close to one another."""
    program, reference = candidate.easy_program, candidate.answer(candidate.easy).certificate
    tol, feas_tol = max(candidate.tol, 1e-4), max(candidate.feas_tol, 1e-5)
    for dtype, error in _ROUNDED.items():
        solution = candidate.solve(program.to(dtype), tol=tol, feas_tol=feas_tol)
        expect(solution.status in _GOOD, f"{dtype}: {_summary(solution)}")
        value = solution.certificate.value
        near = abs(value - reference.value) <= error * max(reference.scale, 1e-300)
        expect(near, f"{dtype}: value {value:.6g}, in the program's precision {reference.value:.6g}")
    return "all four solved"


def _starts(candidate: Candidate) -> str:
    """Weights, weights with multipliers, and a solution are accepted as starts; none stands in the way."""
    program, solution = candidate.easy_program, candidate.answer(candidate.easy)
    zeros = torch.zeros(program.shape, dtype=torch.float64)
    counts = []
    for name, start in (("zeros", zeros), ("weights", candidate.start()), ("solution", solution)):
        found = candidate.solve(program, start=start)
        expect(found.status in _GOOD, f"started from {name}: {_summary(found)}")
        counts.append(f"{name} {found.iterations}")
    return f"iterations from {', '.join(counts)}"


def _multipliers(candidate: Candidate) -> str:
    """Λ has the signs and the scale of g(U) + f(Z) + ⟨Λ, XU − Z⟩: XᵀΛ of dual norm 1, and −Λ proves far less."""
    seen = []
    for member in (zoo.member(f"{fit} plain 20x8x5") for fit in FITS):
        if not candidate.takes(member):
            continue
        program, solution, name = zoo.program(member.name), candidate.answer(member), member.name
        if solution.multipliers is None:
            seen.append(f"{name}: none")
            continue
        L64, bound = solution.multipliers.double(), solution.certificate.bound
        flipped = certify(program, solution.weights, -L64).bound
        expect(flipped <= bound / 2, f"{name}: −Λ proves {flipped:.4g}, Λ proves {bound:.4g}; is the sign right?")
        projected = program.fit.map(lambda array: array.double()).project_dual(L64)
        off = float((projected - L64).norm() / L64.norm().clamp(min=1e-300))
        expect(off <= 1e-2, f"{name}: Λ must be ≥ 0 where outputs are one-sided; {off:.1%} of its length is not")
        size = float(program.penalty.dual_norm(-program.inputs.double().T @ L64).max())
        expect(abs(size - 1) <= 0.1, f"{name}: dual norm of XᵀΛ {size:.3g}, expected 1; are the units the caller's?")
        seen.append(name.split()[0])
    if not seen:
        raise SolverRefused("it takes no convex plain member")
    return ", ".join(seen)


@dataclass(frozen=True, eq=False)
class _Liar:
    """Runs a solver and hands back other weights in its name."""

    solver: Solver
    weights: Tensor

    def refuses(self, program: LayerProgram) -> str | None:
        return self.solver.refuses(program)

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        honest = self.solver.run(program, limits, start, watch)
        return replace(honest, weights=self.weights.clone(), ended="own rule", message="optimal")


def _a_lie_is_not_called_solved(candidate: Candidate) -> str:
    """Wrong weights with the solver's own multipliers and word are not called solved."""
    program = candidate.easy_program
    wrong = torch.zeros(program.shape) if program.penalty.convex else torch.ones(program.shape)
    liar = Candidate(_Liar(candidate.instance, wrong), candidate.tol, candidate.feas_tol, candidate.time_limit)
    solution = liar.solve(program)
    expect(solution.status not in _GOOD, f"wrong weights were called {solution.status}")
    return f"wrong weights are {solution.status}"


def _feasible(member: Member, candidate: Candidate) -> str:
    """A feasible convex member is solved to its reference value, or not claimed to be; a plain one is solved."""
    solution = candidate.answer(member)
    c, status, reference = solution.certificate, solution.status, member.reference
    summary = _summary(solution)
    expect(status not in (Status.DIVERGED, Status.INFEASIBLE), f"{status}, but it has a solution: {summary}")
    expect(member.kind != "plain" or status is Status.SOLVED, f"plain members are to be solved: {summary}")
    if reference is not None:
        unit = c.scale if status is Status.SOLVED else abs(reference)
        expect(c.bound <= reference + 1e-6 * unit, f"bound {c.bound:.9g} above the optimum {reference:.9g}")
        near = abs(c.value - reference) <= (2 * candidate.tol + 10 * candidate.feas_tol) * unit
        expect(near or status is not Status.SOLVED, f"value {c.value:.9g}, optimum {reference:.9g}")
    return summary


def _infeasible(member: Member, candidate: Candidate) -> str:
    """A program without solution is never called solved."""
    solution = candidate.solve(zoo.program(member.name), time_limit=min(0.5, candidate.time_limit))
    expect(solution.status not in _GOOD, f"has no solution, yet {_summary(solution)}")
    return _summary(solution)


def _budget(member: Member, candidate: Candidate) -> str:
    """An exact budget is kept, nothing is claimed to be proven, nothing beats the best support."""
    solution, fit = candidate.answer(member), zoo.program(member.name).fit
    c, best = solution.certificate, member.optimum
    expect(c.bound == -torch.inf and c.gap == torch.inf, f"no bound can be claimed, found {c.bound}")
    expect(c.value < torch.inf, "the budget is broken")
    if best is not None:
        unit = fit.value(fit.sums(torch.zeros_like(fit.Y)))  # the loss of U = 0
        expect(c.value >= best - 1e-6 * unit, f"loss {c.value:.9g} below that of the best support, {best:.9g}")
        near = c.value <= best + 1e-3 * unit
        expect(near or "orthonormal" not in member.name, f"loss {c.value:.6g}, best {best:.6g}: inputs are independent")
    return f"{_summary(solution)}, loss {c.value:.6g}, best {best:.6g}"


@dataclass(frozen=True)
class Check:
    """One check by name; call it with a solver, or with a ``Candidate``, which keeps answers for other checks."""

    name: str
    test: Callable[[Candidate], str]

    def __call__(self, solver: str | Solver | Candidate) -> str:
        """What was seen, or why the solver does not take the program; NotConforming if the check failed."""
        result = self.result(solver if isinstance(solver, Candidate) else Candidate(solver))
        if not result.passed:
            raise NotConforming(f"{self.name}: {result.detail}")
        return result.detail

    def result(self, candidate: Candidate) -> Result:
        """The same as data."""
        try:
            return result_of(self.name, self.test, candidate, (MissingExtra, SolverRefused))
        except SolverRefused as error:
            return Result(self.name, True, str(error), taken=False)

    def __str__(self) -> str:
        return self.name


_PROTOCOL = (
    *(_refuses_with_a_reason, _iteration_limit, _time_limit, _determinism, _inputs_unchanged, _precisions, _starts),
    *(_multipliers, _a_lie_is_not_called_solved),
)


def checks(members: Iterable[Member] | None = None) -> list[Check]:
    """The kit as a list, for ``@pytest.mark.parametrize("check", testing.checks(), ids=str)``.

    ``members`` are feasible convex programs to be solved, the whole zoo if None. Impossible programs and exact budgets
    are always among the checks.
    """
    chosen = zoo.members() if members is None else tuple(members)
    groups = ((_feasible, chosen), (_infeasible, zoo.infeasible()), (_budget, zoo.budgets()))
    on_members = [Check(member.name, partial(test, member)) for test, group in groups for member in group]
    return [*(Check(test.__name__.strip("_").replace("_", " "), test) for test in _PROTOCOL), *on_members]


def check(
    solver: str | Solver,
    members: Iterable[Member] | None = None,
    *,
    tol: float = 1e-4,
    feas_tol: float = 1e-5,
    time_limit: float = 10.0,
) -> ConformanceReport:
    """Run the conformance kit on a solver.

    A solver conforms if it keeps the protocol: what it takes it solves or says honestly that it did not, plain members
    it does solve. How much of the awkward rest it solves is in the details. For slow ones ``members`` may be
    ``zoo.representative()``. Tolerances and the time limit in seconds are those of ``solve`` for each program.

    Raises:
        UnknownSolver, InvalidInput: No such solver, or nothing like one.
        MissingExtra: The solver's package is not installed.
    """
    candidate = Candidate(solver, tol, feas_tol, time_limit)
    return ConformanceReport(candidate.name, tuple(each.result(candidate) for each in checks(members)))
