"""What a solve returns: status, certificate, trace, provenance."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from convexprune.solvers.certificate.certificate import Certificate


class Status(Enum):
    """How a solve ended. Set from the certificate, never from a solver's word; ``advice`` says what to do."""

    SOLVED = "solved"
    NO_BOUND = "no bound"
    ITERATION_LIMIT = "iteration limit"
    TIME_LIMIT = "time limit"
    STOPPED = "stopped"
    UNCERTIFIED = "uncertified"
    INFEASIBLE = "infeasible"
    DIVERGED = "diverged"
    FAILED = "failed"

    @property
    def advice(self) -> str:
        """What the status means and what to do about it."""
        return _ADVICE[self]

    def __str__(self) -> str:
        return self.value


_ADVICE = {
    Status.SOLVED: "Certified: gap and violation are within the tolerances. Nothing to do.",
    Status.NO_BOUND: "The weights keep the budget and the fit's set. Budgets are not convex, so nothing is proven of "
    "how good they are: compare with another start or solver.",
    Status.ITERATION_LIMIT: "The iterations ran out before the certificate closed. The bound holds; raise max_iter, "
    "loosen tol or feas_tol, or pass this solution as start.",
    Status.TIME_LIMIT: "The time ran out before the certificate closed. The bound holds; raise time_limit, loosen tol "
    "or feas_tol, or pass this solution as start.",
    Status.STOPPED: "It was stopped before it was done. Given as start, it is where a solve goes on.",
    Status.UNCERTIFIED: "The solver was content or could get no further, the certificate asks for more: tighten the "
    "solver's own tolerances, work in float64, or try another solver.",
    Status.INFEASIBLE: "No weights of a sensible size satisfy the fit: the bound proves that any would cost many "
    "thousand times more than those returned, which do not satisfy it. Raise eps or the ceiling.",
    Status.DIVERGED: "An iterate became NaN or infinite. Work in float64 (dtype=torch.float64), rescale X, or try "
    "another solver.",
    Status.FAILED: "The backend returned no weights; its message is in the provenance. Try another solver.",
}


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds: the solver's set-up, its iterations, and the library's judging of what came back."""

    setup: float = 0.0
    solve: float = 0.0
    certify: float = 0.0

    @property
    def total(self) -> float:
        """All three together."""
        return self.setup + self.solve + self.certify


@dataclass(frozen=True)
class TracePoint:
    """The state of a solve at one iteration.

    Attributes:
        iteration: Iterations done.
        seconds: Set-up and iterations so far, without the judging.
        value, bound, gap, violation: As in ``Certificate``.
        residuals: The solver's own relative residuals by name.
        stage: The precision or method that the solve had passed on to; "" where it had not.
    """

    iteration: int
    seconds: float
    value: float
    bound: float
    gap: float
    violation: float
    residuals: Mapping[str, float]
    stage: str = ""


@dataclass(frozen=True, eq=False)
class Solution:
    """The answer to a program, judged.

    Attributes:
        weights: U [N, M] on the program's device; exact zeros are zeros.
        multipliers: Λ [P, M] as the solver left them, or None where it gives none.
        status: How it ended; ``status.advice`` says what to do.
        certificate: What is proven about ``weights``.
        trace: One point for each time the solve was judged.
        iterations: The solver's iterations.
        seconds: Set-up, solve and judging apart.
        provenance: Solver, options in force, tolerances, dtype, device, threads, versions, the solver's own message.
    """

    weights: Tensor
    multipliers: Tensor | None
    status: Status
    certificate: Certificate
    trace: tuple[TracePoint, ...]
    iterations: int
    seconds: Seconds
    provenance: Mapping[str, Any]

    @property
    def nonzeros(self) -> int:
        """How many entries of ``weights`` are not zero."""
        return int(self.weights.count_nonzero())

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, as plain data."""
        return {
            "status": str(self.status),
            "advice": self.status.advice,
            "certificate": self.certificate.to_dict(),
            "nonzeros": self.nonzeros,
            "shape": list(self.weights.shape),
            "iterations": self.iterations,
            "seconds": asdict(self.seconds),
            "trace": [asdict(point) for point in self.trace],
            "provenance": dict(self.provenance),
        }
