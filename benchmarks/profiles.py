"""The arithmetic of comparing solvers: performance profiles, shifted geometric means, and whose word was true.

Source: E. D. Dolan and J. J. Moré, Benchmarking optimization software with performance profiles, 2002.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Answer", "Standing", "plot_profile", "profile", "ratios", "shifted_geometric_mean", "standings", "times"]

Times = Mapping[str, Mapping[str, float]]
"""Seconds by solver, then by problem; inf where the solver did not get there."""


@dataclass(frozen=True)
class Answer:
    """What became of one problem in the hands of one solver, judged anew.

    Attributes:
        status: The certificate's, or "refused" or "raised", with the reason in ``message``.
        claimed: Whether the solver showed weights as solved by its own rule.
        true: Whether those that it showed first were certified. It may have gone on, and be certified at the end.
        certified: Whether gap and violation are within the tolerances.
        solved: Certified, and within the time limit.
        seconds: All of it: building, solving, and each judging that the call asked for.
        setup, certify: Of these, before the first iteration, and in the judging.
    """

    problem: str
    solver: str
    tol: float
    status: str
    message: str = ""
    claimed: bool = False
    true: bool = False
    certified: bool = False
    solved: bool = False
    seconds: float = math.inf
    setup: float = 0.0
    certify: float = 0.0
    value: float = math.inf
    bound: float = 0.0
    gap: float = math.inf
    violation: float = math.inf
    nonzeros: int = 0
    iterations: int = 0

    @property
    def taken(self) -> bool:
        """Not refused."""
        return self.status != "refused"


def times(answers: Iterable[Answer]) -> dict[str, dict[str, float]]:
    """Seconds to the certificate; failures and refusals are infinite."""
    found: dict[str, dict[str, float]] = {}
    for a in answers:
        found.setdefault(a.solver, {})[a.problem] = a.seconds if a.solved else math.inf
    return found


def best(table: Times) -> dict[str, float]:
    """The least time any solver took for each problem."""
    problems = {problem for row in table.values() for problem in row}
    return {problem: min(row.get(problem, math.inf) for row in table.values()) for problem in problems}


def ratios(table: Times) -> dict[str, dict[str, float]]:
    """r_ps = t_ps / min over solvers of t_ps, infinite where the solver, or every solver, failed."""
    least = best(table)
    return {
        solver: {p: t / least[p] if math.isfinite(t) else math.inf for p, t in row.items()}
        for solver, row in table.items()
    }


def profile(ratio: Iterable[float], tau: float, problems: int) -> float:
    """ρ(τ): the share of all problems with r ≤ τ."""
    return sum(r <= tau for r in ratio) / problems


def shifted_geometric_mean(values: Sequence[float], shift: float) -> float:
    """exp(mean of log(v + shift)) − shift: blind to differences far below the shift."""
    if not values:
        return math.nan
    return math.exp(sum(math.log(v + shift) for v in values) / len(values)) - shift


@dataclass(frozen=True)
class Standing:
    """A solver over all problems.

    Attributes:
        taken, solved: How many problems it did not refuse, and how many of these it solved in time.
        fastest: On how many it was.
        claims, true: How often it claimed to be done by its own rule, and how often the certificate agreed at once.
        mean: Shifted geometric mean of seconds over what it takes; a failure costs the time limit.
        ratio: That, relative to the same mean of the best solver on each of these problems.
        setup, certify: The share of its time before the first iteration, and in the judging.
    """

    solver: str
    taken: int
    solved: int
    fastest: int
    claims: int
    true: int
    mean: float
    ratio: float
    setup: float
    certify: float


def standings(answers: Sequence[Answer], limit: float, shift: float) -> list[Standing]:
    """One for each solver, those that solve most first; answers are of one tolerance."""
    table = times(answers)
    least, relative = best(table), ratios(table)
    rows = []
    for solver in table:
        taken = [a for a in answers if a.solver == solver and a.taken]
        spent = [a for a in taken if math.isfinite(a.seconds)]
        total = sum(a.seconds for a in spent) or math.inf
        mean = shifted_geometric_mean([a.seconds if a.solved else limit for a in taken], shift)
        rival = shifted_geometric_mean([min(least[a.problem], limit) for a in taken], shift)
        rows.append(
            Standing(
                solver=solver,
                taken=len(taken),
                solved=sum(a.solved for a in taken),
                fastest=sum(r == 1 for r in relative[solver].values()),
                claims=sum(a.claimed for a in taken),
                true=sum(a.true for a in taken),
                mean=mean,
                ratio=mean / rival if taken else math.nan,
                setup=sum(a.setup for a in spent) / total,
                certify=sum(a.certify for a in spent) / total,
            )
        )
    return sorted(rows, key=lambda row: (-row.solved, row.mean))


def plot_profile(tables: Mapping[float, Times], path: Path) -> Path:
    """A panel a tolerance: the share of problems solved within τ times the best solver's time, against τ."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 5.5 * len(tables), 4), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axes, (tol, table) in zip(panels, tables.items(), strict=True):
        relative, problems = ratios(table), len(best(table))
        largest = max([r for row in relative.values() for r in row.values() if math.isfinite(r)], default=1.0)
        ordered = sorted(relative, key=lambda solver: -sum(map(math.isfinite, relative[solver].values())))
        for number, solver in enumerate(ordered):
            finite = sorted(r for r in relative[solver].values() if math.isfinite(r))
            x = [1.0, *finite, 1.3 * largest]
            y = [100 * profile(finite, tau, problems) for tau in x]
            axes.step(x, y, where="post", label=solver, linestyle=("-", "--", "-.", ":")[number % 4])
        axes.set(xscale="log", xlim=(1, 1.3 * largest + 1e-9), ylim=(0, 102), title=f"gap ≤ {tol:g}")
        axes.set(xlabel="time relative to the best solver, τ")
        axes.grid(which="both", alpha=0.3)
    panels[0].set(ylabel=f"% of {problems} problems, certified")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
