"""Random small programs of every kind: how many a solver leaves unsolved, by family and dtype, and what must never be.

Each is drawn with weights that were meant to satisfy it; answers are checked against these and against a reference.

python benchmarks/fuzz.py --programs 300
"""

import argparse
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.certificate import Solution, Status, certify
from convexprune.solvers.errors import ConvexPruneError
from convexprune.solvers.methods.interface import Solver
from convexprune.solvers.methods.solve import solve
from convexprune.solvers.programs import L1, Fit, GroupL2, LayerProgram, NetTrimSet, Penalty
from convexprune.solvers.testing.layers import FITS, LOSSES, SETS, blocks, critical_weight, targets_of

EPS = (0.0, 1e-9, 1e-6, 1e-3, 1e-2, 0.1, 0.5)
"""Radii relative to ‖Y‖_F; of a loss, the critical weight relative to the weight."""
FAMILIES = ("eps ≥ 1e-3", "losses", "l1 weights over six decades", *(f"eps {eps:g}" for eps in EPS if eps < 1e-3))
"""The rows of a fuzzer's table."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_MOST = 40  # samples, inputs and outputs
_DECADES = 6.0  # units of X and of W, and weights of an ℓ1 norm, lie within this many of 1
SETTLED = (Status.SOLVED, Status.INFEASIBLE)
"""Both are proven."""
_ROUNDING = 1e-6  # what a bound may exceed the value of other weights by, relative to that value
_FEAS_TOL = 1e-5


@dataclass(frozen=True, eq=False)
class Drawn:
    """A random program, with the names of its fit's and penalty's kinds."""

    seed: int
    program: LayerProgram
    W: Tensor  # [N, M] float64, the weights that the targets were made from
    fit: str
    penalty: str
    eps: float  # of EPS

    @property
    def family(self) -> str:
        """That of ``FAMILIES`` which it counts in."""
        if self.penalty == "wide l1":
            return "l1 weights over six decades"
        if self.fit in LOSSES or self.eps >= 1e-3:
            return "losses" if self.fit in LOSSES else "eps ≥ 1e-3"
        return f"eps {self.eps:g}"

    def reached(self, feas_tol: float = 1e-5) -> float | None:
        """What W costs, or None where rounding of the targets leaves W outside."""
        certificate = certify(self.program, self.W)
        return certificate.value if certificate.violation <= feas_tol else None


def draw(seed: int) -> Drawn:
    """The random program of this seed: the same on every machine."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    torch_rng = torch.Generator().manual_seed(seed)
    P, N, M = (round(_MOST ** rng.random()) for _ in range(3))
    fit, dtype = rng.choice(FITS), rng.choice(DTYPES)
    eps = rng.choice(EPS[3:] if fit in LOSSES else EPS)
    X = _inputs(rng, torch_rng, P, N).to(dtype)
    normal = partial(torch.randn, generator=torch_rng, dtype=torch.float64)
    W = normal(N, M) * 10 ** rng.uniform(-_DECADES, _DECADES)
    W[normal(N, M) > rng.choice((0.0, 1.0, 9.0))] = 0
    single = torch.promote_types(dtype, torch.float32)
    W = W.to(single).double()
    Y = targets_of(fit, X.to(single) @ W.to(single))
    kind, penalty = _penalty(rng, torch_rng, N, M)
    return Drawn(seed, LayerProgram(X, _fit(rng, fit, X, W, Y, eps, penalty), penalty), W, fit, kind, eps)


def _inputs(rng: random.Random, torch_rng: torch.Generator, P: int, N: int) -> Tensor:
    """[P, N], of both signs or not, with dead, duplicate and nearly equal columns, in units of any size."""
    normal = partial(torch.randn, generator=torch_rng, dtype=torch.float64)
    X = normal(P, N)
    X = X.clamp(min=0) if rng.random() < 0.6 else X
    for _ in range(rng.choice((0, 0, 1, 3))):
        j, k = rng.randrange(N), rng.randrange(N)
        change = rng.choice(("dead", "duplicate", "nearly", "nearly"))
        nearly = X[:, k] + 10 ** rng.uniform(-9, -2) * normal(P)
        X[:, j] = {"dead": torch.zeros(P), "duplicate": X[:, k], "nearly": nearly}[change]
    if rng.random() < 0.3:
        X *= 10 ** (normal(N) * rng.choice((0.5, 2.0)))
    X *= 10 ** rng.uniform(-_DECADES, _DECADES)
    if rng.random() < 0.5:
        X[:, -1] = 1
    return X


def _penalty(rng: random.Random, torch_rng: torch.Generator, N: int, M: int) -> tuple[str, Penalty]:
    kind = rng.choice(("l1", "l1", "free bias", "weighted l1", "wide l1", "rows", "columns", "blocks"))
    if kind == "free bias" and N > 1:
        return kind, L1.free_bias(N)
    if kind == "weighted l1":
        weights = torch.rand(N, M, generator=torch_rng, dtype=torch.float64) * 3
        weights[weights < rng.choice((0.0, 0.0, 0.3))] = 0
        return kind, L1(weights) if bool((weights > 0).any()) else L1()
    if kind == "wide l1":
        exponents = _DECADES * (torch.rand(N, rng.choice((1, M)), generator=torch_rng, dtype=torch.float64) - 0.5)
        return kind, L1(10**exponents)
    if kind in ("rows", "columns"):
        return kind, GroupL2(kind)  # type: ignore[arg-type]
    if kind == "blocks":
        return kind, GroupL2(blocks(N, M))
    return "l1", L1()


def _fit(rng: random.Random, fit: str, X: Tensor, W: Tensor, Y: Tensor, eps: float, penalty: Penalty) -> Fit:
    if fit in LOSSES:
        return LOSSES[fit](Y, critical_weight(X.double(), Y.double(), penalty) / eps)
    each = rng.random() < 0.2
    radius = eps * (Y.double().norm(dim=0) if each else float(Y.double().norm()))
    if fit == "net-trim" and rng.random() < 0.3:
        # The ceiling of a cascade: what the weights reach, and a little more.
        Z = X.to(Y) @ W.to(Y)
        return NetTrimSet(Y, radius, torch.where(Y > 0, 0.0, Z + 1e-3 * Z.abs()))
    return SETS[fit](Y, radius)


@dataclass(frozen=True, eq=False)
class FuzzedProgram:
    """A solver's answer to a random program, None where an exception took its place."""

    drawn: Drawn
    outcome: str  # the status, or the name of the exception
    faults: tuple[str, ...]  # what must never be: each one a sentence
    solution: Solution | None

    @property
    def settled(self) -> bool:
        """Whether it is solved, or proven to have no solution."""
        return self.outcome in map(str, SETTLED)


def try_on(drawn: Drawn, solver: str | Solver | None = None, *, judge: bool = False) -> FuzzedProgram:
    """Solve a random program at the default settings and look for faults; cvxpy, too, to ``judge`` bound and value."""
    try:
        solution = solve(drawn.program, solver)
    except ConvexPruneError as error:
        return FuzzedProgram(drawn, type(error).__name__, (), None)
    except Exception as error:  # noqa: BLE001 - that there is none is what is tested
        return FuzzedProgram(drawn, type(error).__name__, (f"an exception of another package: {error}",), None)
    return FuzzedProgram(drawn, str(solution.status), tuple(_faults(drawn, solution, judge)), solution)


def _faults(drawn: Drawn, solution: Solution, judge: bool) -> Iterable[str]:
    inside, reached = drawn.reached(0.0), drawn.reached(_FEAS_TOL)
    c, status = solution.certificate, solution.status
    if inside is not None and c.bound > inside * (1 + _ROUNDING):
        yield f"the bound {c.bound:.8g} is above {inside:.8g}, which the weights behind the targets reach"
    if reached is not None and status in (Status.DIVERGED, Status.FAILED, Status.INFEASIBLE):
        yield f"{status}, though the weights behind the targets satisfy the program"
    again = certify(drawn.program, solution.weights, solution.multipliers) if status is Status.SOLVED else c
    if again != c:
        yield f"called solved by {c}; judged again, it is {again}"
    if judge:
        yield from _judged(drawn, solution)


def _judged(drawn: Drawn, solution: Solution) -> Iterable[str]:
    """Against cvxpy's answer, where that one satisfies the program."""
    program, own = drawn.program, solution.certificate
    other = solve(program, "cvxpy").certificate
    slack = 1e-4 * max(other.scale, own.scale)
    if other.violation <= _FEAS_TOL and own.bound > other.value + slack:
        yield f"the bound {own.bound:.8g} is above the reference's value {other.value:.8g}"
    if solution.status is Status.SOLVED and own.value < other.bound - slack:
        # What is tolerated of a violation may save much of the penalty, most of all at eps = 0. Ceilings get a part of
        # what a set is raised by, and all of the violation may be at one of them.
        wide = program.to(torch.float64)
        fit: Any = wide.fit
        wide = replace(wide, fit=fit.relaxed((2 * fit.Y.numel()) ** 0.5 * _FEAS_TOL * fit.scale))
        least = solve(wide, "cvxpy").certificate.bound
        if own.value < least - slack:
            yield f"solved at {own.value:.8g}, below the reference's bound {least:.8g} for what is tolerated"


def table(trials: Iterable[FuzzedProgram]) -> str:
    """A row for each family and dtype: programs, those not settled in per cent and by outcome, and faults.

    "reached" are those not settled that the weights behind their targets satisfy.
    """
    groups: dict[tuple[str, str], list[FuzzedProgram]] = {}
    for trial in trials:
        dtype = str(trial.drawn.program.inputs.dtype).removeprefix("torch.")
        for key in ((trial.drawn.family, dtype), (trial.drawn.family, "all")):
            groups.setdefault(key, []).append(trial)
    rows = [f"{'family':<28} {'dtype':<9} {'programs':>8} {'unsolved':>9} {'reached':>7} {'faults':>6}  outcomes"]
    for (family, dtype), members in sorted(groups.items()):
        left = [trial for trial in members if not trial.settled]
        reached = sum(trial.drawn.reached(_FEAS_TOL) is not None for trial in left)
        faults = sum(bool(trial.faults) for trial in members)
        outcomes = ", ".join(f"{n} {name}" for name, n in Counter(trial.outcome for trial in members).most_common())
        share = f"{100 * len(left) / len(members):.1f} %"
        rows.append(f"{family:<28} {dtype:<9} {len(members):>8} {share:>9} {reached:>7} {faults:>6}  {outcomes}")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=300, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--family", choices=FAMILIES, help="only programs of this row of the table")
    parser.add_argument("--solver", help="a registered name (default: that of solve)")
    parser.add_argument("--judge", type=int, default=0, metavar="K", help="let cvxpy judge every K-th (0: none)")
    parser.add_argument("--list", action="store_true", help="name each program that is left unsolved")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    trials, began = [], time.perf_counter()
    drawn = (one for one in map(draw, count(given.seed)) if given.family in (None, one.family))
    for number, one in enumerate(islice(drawn, given.programs)):
        trial = try_on(one, given.solver, judge=given.judge > 0 and number % given.judge == 0)
        trials.append(trial)
        for fault in trial.faults:
            print(f"seed {trial.drawn.seed}: {fault}")
        if given.list and not trial.settled:
            print(described(trial))
    print(table(trials))
    print(f"{given.programs} programs, {time.perf_counter() - began:.0f} s")


def described(trial: FuzzedProgram) -> str:
    """An unsolved program in a line."""
    drawn, solution = trial.drawn, trial.solution
    (N, M), P, dtype = drawn.program.shape, drawn.program.samples, drawn.program.inputs.dtype
    line = f"seed {drawn.seed}: {trial.outcome}, {drawn.fit}, {drawn.penalty}, eps {drawn.eps:g}, {P}x{N}x{M}, {dtype}"
    if solution is None:
        return line
    return f"{line}, gap {solution.certificate.gap:.1e}, violation {solution.certificate.violation:.1e}"


if __name__ == "__main__":
    main()
