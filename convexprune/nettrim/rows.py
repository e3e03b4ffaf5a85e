"""A layer that Net-Trim has solved, as a row of the report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from convexprune.nettrim.goals import KEPT, REFITTED, Answer, Goal, Within
from convexprune.nettrim.sites import Site
from convexprune.report.report import LayerReport
from convexprune.solvers import Status

_ROUNDING = 1e-9
_ORIGINAL = "fitted to the original network's inputs, as in parallel mode: in the pruned network other rows reach it"
_PROVEN, _BUDGET = str(Status.SOLVED), str(Status.NO_BOUND)


@dataclass(frozen=True)
class NetTrimLayer(LayerReport):
    """One pruned layer; figures are of the weights as written into the model.

    Attributes:
        fit: What was kept.
        norm: The BatchNorm that is part of the program, or None.
        goal: What was asked: an eps, or a budget.
        eps: The radius relative to ‖Y‖_F; infinity for a budget.
        eps_asked: The eps that was asked for, which cascade may raise; None for a budget.
        returned: Weights that were zero before and are not any more.
        promised: What ``output_error`` is promised to be at most; infinity for a budget.
        value, bound, gap, violation: The certificate, groups of a layer added up.
        output_error: ‖ŷ − Y‖_F/‖Y‖_F on the calibration data, after the ReLU where the fit stands before one.
        iterations: The solver's (the most that a group took).
        seconds: Set-up, solve and certificate.
        status: How the solve ended ("solved": certified within the tolerances; "refitted": within
            the set on a certified support; "no bound": a budget, kept; "rounded":
            certified, but no longer after rounding to the module's dtype; "as trained": the
            trained weights, which keep the promise, for nothing better was found).
        notes: What a reader should know.
    """

    fit: str
    norm: str | None
    goal: str
    eps: float
    promised: float
    value: float
    bound: float
    gap: float
    violation: float
    iterations: int
    notes: tuple[str, ...] = ()
    eps_asked: float | None = None
    returned: int = 0

    columns: ClassVar[tuple[tuple[str, bool], ...]] = (
        ("layer", True),
        ("shape", False),
        ("fit", False),
        ("nonzeros", False),
        ("kept", True),
        ("ℓ1 value", False),
        ("gap", True),
        ("violation", True),
        ("error", True),
        ("its", False),
        ("seconds", True),
        ("status", True),
    )

    @property
    def certified(self) -> bool:
        """Whether the certificate closed, refitted or trained weights are in the set, or the budget is kept."""
        return self.status in (_PROVEN, _BUDGET, REFITTED, KEPT)

    @property
    def proven(self) -> bool:
        """Whether an error was promised, and weights were found that keep it; of a budget nothing is."""
        return self.status in (_PROVEN, REFITTED)

    @property
    def raised(self) -> tuple[float, float] | None:
        """The eps asked for and the one kept, where they differ by more than rounding."""
        if self.eps_asked is None or self.eps <= self.eps_asked * (1 + _ROUNDING):
            return None
        return self.eps_asked, self.eps

    @property
    def came_back(self) -> int:
        """Weights that were zero before and are not any more."""
        return self.returned

    @property
    def empty_allowed(self) -> bool:
        """Whether eps is so large that no weights at all keep the promise: ‖0 − Y‖_F ≤ eps·‖Y‖_F from 1 on."""
        return self.eps_asked is not None and self.eps_asked >= 1

    def cells(self) -> list[str]:
        """One text for each of the columns."""
        budget = math.isinf(self.eps)
        return [
            self.name,
            "×".join(map(str, self.shape)),
            f"{self.fit} {self.goal}",
            f"{self.nonzeros:,}",
            self.kept,
            "–" if budget else f"{self.value:.6g}",
            "–" if math.isinf(self.gap) else f"{self.gap:.1e}",
            "–" if budget else f"{self.violation:.1e}",
            f"{self.output_error:.4f}",
            f"{self.iterations}",
            f"{self.seconds:.1f}",
            self.status if self.certified else f"[red]{self.status}[/red]",
        ]

    def remarks(self) -> tuple[str, ...]:
        """The norm that is part of the program, and the notes."""
        folded = () if self.norm is None else (f"{self.norm} is part of its program, and takes the bias",)
        return (*folded, *self.notes)

    def with_remark(self, text: str) -> Self:
        """The row with one note more."""
        return replace(self, notes=(*self.notes, text))


def layer_row(site: Site, goal: Goal, answers: Sequence[Answer]) -> NetTrimLayer:
    """The row of a layer from its groups' answers."""
    figures = layer_figures(goal, answers)
    figures["notes"] = (*site.notes, *figures["notes"])
    return NetTrimLayer(name=site.name, shape=site.shape, fit=site.fit, norm=site.norm_name, **figures)


def answer_notes(answer: Answer) -> tuple[str, ...]:
    """What a reader should know of a group."""
    return (_ORIGINAL, *answer.notes) if answer.original else answer.notes


def layer_figures(goal: Goal, answers: Sequence[Answer]) -> dict[str, Any]:
    """All of a row that follows from the answers alone."""
    certificates = [answer.solution.certificate for answer in answers]
    value, bound = sum(c.value for c in certificates), sum(c.bound for c in certificates)
    radii = [answer.radius for answer in answers]
    size = math.hypot(*(answer.size for answer in answers)) or 1.0
    scales = [answer.radius or answer.size for answer in answers]
    outside = math.hypot(*(c.violation * scale for c, scale in zip(certificates, scales, strict=True) if c.violation))
    statuses = [answer.status for answer in answers]
    return {
        "samples": answers[0].samples,
        "nonzeros_before": sum(answer.before for answer in answers),
        "nonzeros": sum(answer.nonzeros for answer in answers),
        "output_error": math.hypot(*(answer.error for answer in answers)) / size,
        "seconds": sum(answer.solution.seconds.total for answer in answers),
        "status": next((status for status in statuses if status not in (_PROVEN, _BUDGET, REFITTED)), statuses[0]),
        "goal": str(goal),
        "eps": math.hypot(*radii) / size,
        "promised": math.hypot(*(answer.promised for answer in answers)) / size,
        "value": value,
        "bound": bound,
        "gap": max(0.0, value - bound) / (sum(c.scale for c in certificates) or 1.0),
        "violation": 0.0 if not outside else outside / (math.hypot(*scales) or 1.0),
        "iterations": max(answer.solution.iterations for answer in answers),
        "notes": tuple(dict.fromkeys(note for answer in answers for note in answer_notes(answer))),
        "returned": sum(answer.returned for answer in answers),
        "eps_asked": goal.eps if isinstance(goal, Within) else None,
    }
