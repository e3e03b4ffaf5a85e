"""Whether a penalty is what docs/penalties.md asks for, tried at random weights."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.programs.duality import of_penalty
from convexprune.solvers.programs.penalties import is_homogeneous
from convexprune.solvers.testing import functions
from convexprune.solvers.testing.contract import ALIKE, ConformanceReport, best_of, expect, same
from convexprune.solvers.testing.functions import STEPS, Draw


def check_penalty(penalty: Any, inputs: int, outputs: int, *, points: int = 6) -> ConformanceReport:
    """Check every member of a penalty for weights [inputs, outputs], in float64, at random weights.

    Raises:
        NotConforming: Some checks failed; the message says which, what was found and what was expected.
    """
    g = of_penalty(penalty, (inputs, outputs))
    expect(type(g.subject) is type(penalty), f"to: found {type(g.subject).__name__}, expected the same class")
    return functions.report_of(Draw(g, points), _CONVEX if penalty.convex else _BUDGET)


def _free(draw: Draw) -> Tensor:
    """[N, M]: the entries that g does not depend on."""
    return draw.function.subject.cost(draw.function.shape) == 0  # type: ignore[no-any-return]


def _value(draw: Draw) -> None:
    """g(0) = 0 and g ≥ 0; homogeneous where claimed."""
    g = draw.function
    g.subject.check(g.shape)
    expect(g.value(g.centre) == 0, f"value(0): found {g.value(g.centre):g}, expected 0")
    for U in draw.inside():
        value = g.value(U)
        expect(value >= 0, f"value: found {value:g}, expected a number ≥ 0")
        for c in (1e-6, 3.0, 1e6) if is_homogeneous(g.subject) else ():
            same(f"homogeneous: g({c:g}·U)", g.value(c * U), c * value)


def _prox(draw: Draw) -> None:
    """The minimiser of its own definition, against random competitors; prox(V, 0) is the nearest in the domain."""
    functions.prox(draw, (0.0, *STEPS))


def _dual_norm(draw: Draw) -> None:
    """Columns may be scaled by up to 1/s each: then g* is finite, for homogeneous penalties 0."""
    g, free = draw.function.subject, _free(draw)
    for V in draw.anywhere():
        A = V.masked_fill(free, 0.0)
        s = g.dual_norm(A)
        expect(s.shape == A.shape[1:], f"dual_norm: found shape {list(s.shape)}, expected [M] = [{A.shape[1]}]")
        expect(bool((s >= 0).all()), "dual_norm: found a negative number or NaN")
        same("dual_norm(2A)", g.dual_norm(2 * A).max(), 2 * s.max())
        t = draw.uniform(len(s)) / s.clamp(min=1e-3)
        if is_homogeneous(g):
            for U in draw.inside():
                product, value = float((A * t * U).sum()), float(g.value(U))
                found = f"dual_norm: ⟨A diag(t), U⟩ = {product:.9g} exceeds g(U) = {value:.9g}"
                expect(product <= value * (1 + ALIKE), found)
            continue
        lost = g.conjugate(A * t * (1 - ALIKE))
        expect(lost.shape == s.shape and bool((lost >= 0).all()), f"conjugate: expected [M] ≥ 0, found {lost}")
        finite = bool(torch.isfinite(lost).all())
        expect(finite, "conjugate: infinite though columns are scaled to dual norm below 1")


def _slack(draw: Draw) -> None:
    """g(U) + ⟨A, U⟩ ≥ c_ij|u_ij| for each entry."""
    g: Any = draw.function.subject
    if not hasattr(g, "slack") or not is_homogeneous(g):
        return
    for _ in range(draw.points):
        A = draw.normal().masked_fill(_free(draw), 0.0)
        A = A / g.dual_norm(-A).max().clamp(min=1e-300) * draw.uniform(1)
        c = g.slack(A)
        expect(bool((c >= 0).all()), "slack: found a negative number or NaN")
        places = torch.randint(A.numel(), (3,), generator=draw.generator).tolist()
        alone = [torch.zeros_like(A).flatten().scatter(0, torch.tensor(k), 1.0).view_as(A) for k in places]
        for U in (*draw.inside(), g.prox(-A, 0.0), *(g.prox(-A.sign() * one, 0.0) for one in alone)):
            left, right = float(g.value(U) + (A * U).sum()), float((c * U.abs()).max())
            expect(left >= right - ALIKE * float(g.value(U)), f"slack: g(U) + ⟨A, U⟩ = {left:.9g} is below {right:.9g}")


def _cost(draw: Draw) -> None:
    """The price of each entry; 0 exactly where g does not depend on it."""
    g, cost, free = draw.function, draw.function.subject.cost(draw.function.shape), _free(draw)
    expect(tuple(cost.shape) == g.shape, f"cost: found shape {list(cost.shape)}, expected {list(g.shape)}")
    expect(bool((cost >= 0).all()), "cost: found a negative number or NaN")
    U = g.inside(draw.normal())
    far = torch.where(free, 1e3 * draw.normal(), U)
    same("prox(U, 0) of free entries: they have no domain", g.inside(far), far)
    same("value, free entries changed", g.value(far), g.value(U), 1e-6)
    same("prox of free entries: priced at 0, yet it moves them", torch.where(free, g.prox(far, 0.5), far), far)
    for place in (~free).nonzero().tolist()[: 4 * draw.points]:
        alone = torch.zeros_like(U)
        alone[tuple(place)] = 1.0
        signs = [sign for sign in (1.0, -1.0) if g.far(sign * alone) == 0]
        if is_homogeneous(g.subject) and signs:
            found = max(g.value(sign * alone) for sign in signs)
            same(f"cost{place}, against g of the entry alone at 1", float(cost[tuple(place)]), found)
        charged = len(signs) < 2 or any(g.value(c * s * alone) > 0 for s in signs for c in (1.0, 1e6))
        charged |= any(g.far(c * alone) > 0 for c in (1e12, -1e12))
        expect(charged, f"cost{place}: found a price, yet g does not depend on the entry")


def _units(draw: Draw) -> None:
    """``rescaled`` and ``times`` are the penalty in other units."""
    g, d, k = draw.function, draw.normal(draw.function.shape[0], 1).exp(), 2.5
    scaled = of_penalty(g.subject.rescaled(d), g.shape)
    functions.in_units(draw, scaled, d, "rescaled(d)")
    functions.prox(replace(draw, function=scaled))
    if hasattr(g.subject, "times"):
        more = of_penalty(g.subject.times(k), g.shape)
        functions.in_units(draw, more, 1.0, "times(k)", k)
        for V in draw.anywhere():
            same("times(k): prox with step, against that of g with k·step", more.prox(V, 0.3), g.prox(V, 0.3 * k))


def _precision(draw: Draw) -> None:
    """``to`` another dtype."""
    low = draw.function.subject.to(draw.function.centre.float())
    functions.precision(draw, low.prox)


def _budget(draw: Draw) -> None:
    """An exact budget: its prox keeps it, and no random point within it is nearer."""
    g = draw.function.subject
    for V in draw.anywhere():
        U = g.prox(V, 1.0)
        expect(float(g.value(U)) == 0, "prox: does not keep the budget")
        expect(bool(((U == V) | (U == 0)).all()), "prox: changed an entry that it keeps")
        others = [float((torch.where(g.prox(draw.normal(), 1.0) != 0, V, 0.0) - V).norm()) for _ in range(draw.points)]
        best_of("prox: the distance from V", float((U - V).norm()), others, float(V.norm()))
    expect(math.isinf(float(g.value(draw.normal()))), "value: expected infinity outside of the budget")


_CONVEX = (
    _value,
    functions.convex,
    _prox,
    functions.duality,
    _dual_norm,
    _slack,
    _cost,
    _units,
    _precision,
    functions.cvxpy,
)
_BUDGET = (_budget, _precision)
