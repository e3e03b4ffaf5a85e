"""What every solver promises whatever the program, checked on one that it takes.

Each check is a function of a candidate that says what it saw or raises NotConforming.
"""

import dataclasses
import time

import torch
from torch import Tensor

from convexprune.solvers.certificate.certificate import certify
from convexprune.solvers.certificate.solution import Solution
from convexprune.solvers.errors import SolverRefused
from convexprune.solvers.methods.interface import Limits, Proposal, Solver, Start, Watch
from convexprune.solvers.programs.program import LayerProgram
from convexprune.solvers.testing import zoo
from convexprune.solvers.testing.candidate import GOOD, Candidate, expect, told
from convexprune.solvers.testing.layers import FITS

_GRACE = 2.0  # seconds beyond a time limit: for the set-up, the iteration under way and one judging
_ROUNDED = {torch.float64: 1e-3, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def iteration_limit(candidate: Candidate) -> str:
    """No more iterations than asked for, though the tolerances cannot be met."""
    done = []
    for limit in (1, 5):
        solution = candidate.solve(zoo.program(candidate.easy.name), tol=0.0, feas_tol=0.0, max_iter=limit)
        expect(solution.iterations <= limit, f"max_iter={limit}: found {solution.iterations} iterations")
        done.append(str(solution.iterations))
    return f"{' and '.join(done)} iterations of 1 and 5"


def time_limit(candidate: Candidate) -> str:
    """Back soon after the time is up, though the tolerances cannot be met."""
    candidate.answer(candidate.easy)  # so that imports do not count
    large = [m for m in zoo.members("plain") if "500x20" in m.name and candidate.takes(m)]
    program = zoo.program((large or [candidate.easy])[0].name)
    began = time.perf_counter()
    solution = candidate.solve(program, tol=0.0, feas_tol=0.0, max_iter=100_000, time_limit=0.2)
    took = time.perf_counter() - began
    expect(took <= 0.2 + _GRACE, f"time_limit=0.2: came back after {took:.1f} s, expected at most {0.2 + _GRACE:.1f} s")
    return f"{solution.status} after {took:.2f} s of 0.2 s"


def determinism(candidate: Candidate) -> str:
    """Two runs give the same bits."""
    program = zoo.program(candidate.easy.name)
    first, second = (candidate.solve(program) for _ in range(2))
    expect(_same(first.weights, second.weights), "weights differ between two runs")
    expect(_same(first.multipliers, second.multipliers), "multipliers differ between two runs")
    return f"{first.iterations} iterations twice"


def inputs_untouched(candidate: Candidate) -> str:
    """Inputs, targets and start are as before, and the answer shares no memory with them."""
    mine = zoo.program(candidate.easy.name)
    program = LayerProgram(mine.inputs.clone(), mine.fit.map(torch.clone), mine.penalty)
    start = _start(candidate.answer(candidate.easy))
    arrays = [a for a in (program.inputs, program.fit.Y, start.weights, start.multipliers) if a is not None]
    before = [array.clone() for array in arrays]
    solution = candidate.solve(program, start=start)
    expect(all(map(torch.equal, arrays, before)), "inputs, targets or start were changed")
    theirs = {array.data_ptr() for array in arrays}
    shared = [a for a in (solution.weights, solution.multipliers) if a is not None and a.data_ptr() in theirs]
    expect(not shared, "the answer shares memory with inputs, targets or start")
    return "unchanged"


def precisions(candidate: Candidate) -> str:
    """Data in float64, float32, float16 and bfloat16 are taken, the answers are close to one another."""
    program, reference = zoo.program(candidate.easy.name), candidate.answer(candidate.easy)
    for dtype, error in _ROUNDED.items():
        solution = candidate.solve(
            program.to(dtype), tol=max(candidate.tol, 1e-4), feas_tol=max(candidate.feas_tol, 1e-5)
        )
        expect(solution.status in GOOD, f"{dtype}: {told(solution)}")
        value = solution.certificate.value
        off = abs(value - reference.certificate.value) / max(reference.certificate.scale, 1e-300)
        expect(
            off <= error, f"{dtype}: value {value:.6g}, in the program's precision {reference.certificate.value:.6g}"
        )
    return "all four solved"


def starts(candidate: Candidate) -> str:
    """Weights, weights with multipliers, and a solution are accepted as starts; none stands in the way."""
    program, solution = zoo.program(candidate.easy.name), candidate.answer(candidate.easy)
    zeros = torch.zeros(program.shape, dtype=torch.float64)
    counts = []
    for name, start in (("zeros", zeros), ("weights", _start(solution)), ("solution", solution)):
        found = candidate.solve(program, start=start)
        expect(found.status in GOOD, f"started from {name}: {told(found)}")
        counts.append(f"{name} {found.iterations}")
    return f"iterations from {', '.join(counts)}"


def multipliers(candidate: Candidate) -> str:
    """Λ has the signs and the scale of g(U) + f(Z) + ⟨Λ, XU − Z⟩: XᵀΛ of dual norm 1, and −Λ proves far less."""
    seen = []
    for member in (zoo.member(f"{fit} plain 20x8x5") for fit in FITS):
        if not candidate.takes(member):
            continue
        program, solution = zoo.program(member.name), candidate.answer(member)
        L = solution.multipliers
        if L is None:
            seen.append(f"{member.name}: none")
            continue
        _signs(member.name, program, solution, L)
        seen.append(member.name.split()[0])
    if not seen:
        raise SolverRefused("it takes no convex plain member")
    return ", ".join(seen)


def _signs(name: str, program: LayerProgram, solution: Solution, L: Tensor) -> None:
    L64, fit = L.double(), program.fit.map(lambda array: array.double())
    bound = solution.certificate.bound
    flipped = certify(program, solution.weights, -L64).bound
    expect(flipped <= bound / 2, f"{name}: −Λ proves {flipped:.4g}, Λ proves {bound:.4g}; is the sign right?")
    off = float((fit.curb(L64) - L64).norm() / L64.norm().clamp(min=1e-300))
    expect(off <= 1e-2, f"{name}: Λ must be ≥ 0 where outputs are one-sided; {off:.1%} of its length is not")
    size = float(program.penalty.dual_norm(-program.inputs.double().T @ L64).max())
    expect(abs(size - 1) <= 0.1, f"{name}: dual norm of XᵀΛ {size:.3g}, expected 1; are the units the caller's?")


@dataclasses.dataclass(frozen=True, eq=False)
class _Liar:
    """Runs a solver and hands back other weights in its name."""

    solver: Solver
    weights: Tensor

    def refuses(self, program: LayerProgram) -> str | None:
        return self.solver.refuses(program)

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        told = self.solver.run(program, limits, start, watch)
        return dataclasses.replace(told, weights=self.weights.clone(), ended="own rule", message="optimal")


def lies(candidate: Candidate) -> str:
    """Wrong weights with the solver's own multipliers and word are not called solved."""
    program = zoo.program(candidate.easy.name)
    wrong = torch.zeros(program.shape) if program.penalty.convex else torch.ones(program.shape)
    liar = Candidate(_Liar(candidate.instance, wrong), candidate.tol, candidate.feas_tol, candidate.time_limit)
    solution = liar.solve(program)
    expect(solution.status not in GOOD, f"wrong weights were called {solution.status}")
    return f"wrong weights are {solution.status}"


def _start(solution: Solution) -> Start:
    L = solution.multipliers
    return Start(solution.weights.clone(), None if L is None else L.clone())


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
