"""An entry of a run directory judged again: what it claims, beside what its weights and multipliers come to.

Whoever goes on with a run and whoever verifies one ask here, so that both take the same entries.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from convexprune.nettrim.goals import KEPT, REFITTED, Answer, Goal, KeepInputs, Measurement, Within
from convexprune.nettrim.posed import How, Posed
from convexprune.nettrim.rows import layer_row
from convexprune.nettrim.sites import Site
from convexprune.nettrim.verification import VerifiedLayer
from convexprune.solvers import Gram, LayerProgram, Status, certify
from convexprune.solvers.certificate import Certificate
from convexprune.solvers.errors import ConvexPruneError

# Certificates are sums in float64. What they are made of is not: a layer's inputs come from a forward in the model's
# dtype, and another device or number of threads adds these up in another order. So figures agree to many roundings of
# that dtype, and exactly where nothing was different.
_AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-5}
_HALF = 1e-3


def agreement(dtype: torch.dtype) -> float:
    """How far figures of one model may be apart, relative to what they are differences of."""
    return _AGREEMENT.get(dtype, _HALF)


def judged(site: Site, posed: Sequence[Posed], how: How, goal: Goal, answers: Sequence[Answer]) -> VerifiedLayer:
    """The recorded answers of a layer judged on its data, without a solver.

    Recomputed are the certificate of the stored weights with the stored multipliers (value, bound, gap, violation), the
    radius and the output error, whether the status follows from these, and whether budgets and patterns are kept. Of
    measured paths, by which eps and budgets are allocated, the weights that are kept are judged without bound and gap.

    Args:
        site: The layer.
        posed: Its data now, a group each.
        how: As it was solved.
        goal: What the answers are to.
        answers: As recorded, a group each.

    Returns:
        Both rows, and all that differs between them by more than rounding.
    """
    name, recorded = site.name, layer_row(site, goal, answers)
    if reason := _misfit(answers, posed):
        return VerifiedLayer(name, str(goal), recorded, None, (reason,))
    try:
        again = [_again(answer, goal, group, how) for answer, group in zip(answers, posed, strict=True)]
    except ConvexPruneError as error:  # multipliers of another program, a budget that this layer cannot have
        return VerifiedLayer(name, str(goal), recorded, None, (str(error),))
    # Of a measured path no multipliers are kept, so what proved its bound is gone; nothing is promised of it.
    left_out = ("bound", "gap") if isinstance(goal, Measurement) else ()
    return VerifiedLayer(
        name, str(goal), recorded, layer_row(site, goal, again), _differences(answers, again, left_out)
    )


def _misfit(answers: Sequence[Answer], posed: Sequence[Posed]) -> str | None:
    found = [(answer.stored.dtype, list(answer.stored.shape)) for answer in answers]
    expected = [(group.stored.dtype, list(group.stored.shape)) for group in posed]
    return None if found == expected else f"its weights are {found}, those of the layer {expected}"


def _again(answer: Answer, goal: Goal, posed: Posed, how: How) -> Answer:
    """The answer with everything that can be recomputed."""
    if isinstance(goal, Measurement):
        posed = goal.sample(posed, how)
    program = goal.programs(posed, how)
    U = posed.fold.apply(answer.stored.to(posed.dtype))
    certificate = _certificate(program, posed, U, answer)
    radius, promised = math.inf, math.inf
    if isinstance(goal, Within):
        fit, promised = posed.within(goal.eps, how)
        radius = float(fit.eps)
    status = _status(answer, goal, posed, how, certificate)
    judged = replace(answer.solution, weights=U, certificate=certificate)
    return replace(Answer.of(judged, answer.stored, posed, radius, promised, status, answer.notes), path=answer.path)


def _certificate(program: LayerProgram, posed: Posed, U: Tensor, answer: Answer) -> Certificate:
    found, claim = certify(program, U, answer.solution.multipliers), answer.solution.certificate
    if isinstance(posed.X, Gram) and found.bound < claim.bound:
        # Multipliers of a Gram belong to a root of XᵀX, which other roundings may turn; the residual turns with it.
        own = certify(program, U)
        bound = min(own.bound, claim.bound)  # what is below a proven bound is proven
        if bound > found.bound:
            gap = max(0.0, own.value - bound) / own.scale if own.scale > 0 else 0.0
            return replace(own, bound=bound, gap=gap)
    return found


def _status(answer: Answer, goal: Goal, posed: Posed, how: How, certificate: Certificate) -> str:
    """The recorded status where it promises nothing, or what it promises is found to hold."""
    slack = _slack(answer, certificate)
    tol, feas_tol = float(how.options["tol"]), float(how.options["feas_tol"])
    support = posed.support(how)
    filled = support is not None and bool(answer.stored[~support].any())
    inside = certificate.violation <= feas_tol + slack["violation"] and not filled
    holds = {
        str(Status.SOLVED): isinstance(goal, Within) and inside and certificate.gap <= tol + slack["gap"],
        REFITTED: isinstance(goal, Within) and how.refit and inside,
        KEPT: isinstance(goal, Within) and torch.equal(answer.stored, posed.stored),
        str(Status.NO_BOUND): not isinstance(goal, Within) and inside and _kept(goal, posed, how, answer, certificate),
    }
    if isinstance(goal, Measurement) or holds.get(answer.status, True):
        return answer.status
    return f"not {answer.status}"


def _kept(goal: Goal, posed: Posed, how: How, answer: Answer, certificate: Certificate) -> bool:
    """Whether a budget is; a broken one has an infinite value."""
    inside = not isinstance(goal, KeepInputs) or not bool(answer.stored[~goal.support(posed, how)].any())
    return inside and math.isfinite(certificate.value)


def _slack(answer: Answer, certificate: Certificate) -> dict[str, float]:
    """How far each recorded figure may be from the one recomputed."""
    r = agreement(answer.stored.dtype)
    size, radius, c = answer.size, answer.radius, certificate
    relative = size / radius if 0 < radius < math.inf else 1.0
    # A loss is a square: its rounding goes with the outputs and not with what little they miss by.
    loss = size * max(answer.error, r * size) if math.isinf(radius) else 0.0
    value = r * (abs(c.value) + 4 * loss) if math.isfinite(c.value) else 0.0
    bound = 4 * r * max(abs(c.value), abs(c.bound)) if math.isfinite(c.bound) else 0.0
    return {
        "value": value,
        "bound": bound,
        "scale": value + r * c.scale,
        "gap": (value + bound) * (1 + c.gap) / c.scale if c.scale > 0 and math.isfinite(c.gap) else 0.0,
        "violation": 2 * r * (1 + relative),
        "size": r * size,
        "error": 2 * r * size,
        "radius": 2 * r * size,
        "promised": 4 * r * size,
    }


def _differences(recorded: Sequence[Answer], again: Sequence[Answer], left_out: Sequence[str] = ()) -> tuple[str, ...]:
    found = []
    for number, (told, known) in enumerate(zip(recorded, again, strict=True)):
        where = f" (group {number})" if len(recorded) > 1 else ""
        slack, claims, facts = _slack(known, known.solution.certificate), _figures(told), _figures(known)
        for name, claim in claims.items():
            if name not in left_out and not _agree(claim, facts[name], slack.get(name, 0.0)):
                found.append(f"{name}{where}: recorded {claim}, recomputed {facts[name]}")
    return tuple(found)


def _figures(answer: Answer) -> dict[str, Any]:
    names = ("radius", "promised", "size", "error", "samples", "before", "nonzeros", "returned", "status", "original")
    return answer.solution.certificate.to_dict() | {name: getattr(answer, name) for name in names}


def _agree(one: Any, other: Any, slack: float) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return one == other or abs(one - other) <= slack
    return bool(one == other)
