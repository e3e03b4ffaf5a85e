"""Several solvers on one program, all judged alike."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from convexprune.solvers.errors import MissingExtra, SolverRefused
from convexprune.solvers.methods.interface import Solver
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.methods.solve import solve
from convexprune.solvers.programs.program import LayerProgram


@dataclass(frozen=True)
class CrosscheckRow:
    """One solver's certified answer.

    Attributes:
        status: How the solve ended. "refused: …" or "missing: …" with the reason where there was none; the figures are
            then infinite, or 0.
    """

    solver: str
    status: str
    value: float = math.inf
    bound: float = 0.0
    gap: float = math.inf
    violation: float = math.inf
    scale: float = math.inf
    nonzeros: int = 0
    iterations: int = 0
    seconds: float = math.inf

    @property
    def ran(self) -> bool:
        """Whether the solver ran at all."""
        return not self.status.startswith((_REFUSED, _MISSING))


_REFUSED, _MISSING = "refused: ", "missing: "


@dataclass(frozen=True)
class Crosscheck:
    """A row a solver; ``str()`` gives a table of those that ran, and below it why others did not.

    Attributes:
        rows: In the order asked for.
        disagreement: The largest difference of certified values between two rows that are "solved", relative to the
            certificates' scale; inf where fewer than two are.
    """

    rows: tuple[CrosscheckRow, ...]

    @property
    def disagreement(self) -> float:
        """max |v_a − v_b| / max(scale_a, scale_b) over pairs of solved rows."""
        solved = [row for row in self.rows if row.status == "solved"]
        pairs = [abs(a.value - b.value) / (max(a.scale, b.scale) or 1.0) for a, b in combinations(solved, 2)]
        return max(pairs, default=math.inf)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"rows": [asdict(row) for row in self.rows], "disagreement": self.disagreement}

    def __str__(self) -> str:
        head = f"{'solver':<12}{'value':>14}{'bound':>14}{'gap':>10}{'violation':>11}{'seconds':>9}  status"
        ran = [row for row in self.rows if row.ran]
        lines = [
            f"{r.solver:<12}{r.value:>14.6g}{r.bound:>14.6g}{r.gap:>10.1e}{r.violation:>11.1e}{r.seconds:>9.3f}  "
            f"{r.status}"
            for r in ran
        ]
        if math.isinf(self.disagreement):
            lines.append("no disagreement to tell: fewer than two solvers ended solved")
        else:
            lines.append(f"largest disagreement {self.disagreement:.1e}")
        lines += [f"{row.solver}: {row.status}" for row in self.rows if not row.ran]
        return "\n".join([head, *lines] if ran else lines)


def crosscheck(
    program: LayerProgram, solvers: Sequence[str | Solver] = ("admm", "clarabel", "scs"), **limits: Any
) -> Crosscheck:
    """Solve with several solvers and compare what is certified.

    Args:
        program: What to solve.
        solvers: Names or instances.
        **limits: ``tol``, ``feas_tol``, ``max_iter``, ``time_limit``, as in ``solve``.

    Returns:
        A row a solver. One that refuses the program, or lacks its package, has a row that says so.
    """
    return Crosscheck(tuple(_row(program, solver, limits) for solver in solvers))


def _row(program: LayerProgram, solver: str | Solver, limits: dict[str, Any]) -> CrosscheckRow:
    name, _ = make_solver(solver, {})
    try:
        solution = solve(program, solver, **limits)
    except SolverRefused as error:
        return CrosscheckRow(name, f"{_REFUSED}{error}")
    except MissingExtra as error:
        return CrosscheckRow(name, f"{_MISSING}{error}")
    c = solution.certificate
    figures = (
        c.value,
        c.bound,
        c.gap,
        c.violation,
        c.scale,
        solution.nonzeros,
        solution.iterations,
        solution.seconds.total,
    )
    return CrosscheckRow(name, str(solution.status), *figures)
