"""A layer that Net-Trim has solved, as a row of the report."""

import math
from collections.abc import Sequence
from typing import Any

from convexprune.nettrim.goals import REFITTED, Answer, Goal, Within
from convexprune.nettrim.sites import Site
from convexprune.report.report import LayerReport
from convexprune.solvers import Status

_ORIGINAL = "fitted to the original network's inputs, as in parallel mode: in the pruned network other rows reach it"
_PROVEN, _BUDGET = str(Status.SOLVED), str(Status.NO_BOUND)


def layer_row(site: Site, goal: Goal, answers: Sequence[Answer]) -> LayerReport:
    """The row of a layer from its groups' answers."""
    figures = layer_figures(goal, answers)
    figures["notes"] = (*site.notes, *figures["notes"])
    return LayerReport(name=site.name, shape=site.shape, fit=site.fit, norm=site.norm_name, **figures)


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
