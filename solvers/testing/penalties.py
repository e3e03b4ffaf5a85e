"""Whether a penalty is what docs/penalties.md asks for, tried at random weights."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.programs.claims import fenchel_young
from convexprune.solvers.programs.penalties import is_homogeneous
from convexprune.solvers.testing.contract import (
    ALIKE,
    ConformanceReport,
    Draw,
    agrees,
    alike,
    best_of,
    checked,
    expect,
    same,
)

_STEPS = (0.03, 0.5, 20.0)


def check_penalty(penalty: Any, inputs: int, outputs: int, *, points: int = 6) -> ConformanceReport:
    """Check every member of a penalty for weights [inputs, outputs], in float64, at random weights.

    Raises:
        NotConforming: Some checks failed; the message says which, what was found and what was expected.
    """
    shape = (inputs, outputs)
    g = penalty.to(torch.zeros(shape, dtype=torch.float64))
    expect(type(g) is type(penalty), f"to: found {type(g).__name__}, expected {type(penalty).__name__} again")
    checks = _CONVEX if penalty.convex else _BUDGET
    return checked(type(penalty).__name__, Draw(g, shape, points), checks)


def _inside(draw: Draw, size: float = 1.0) -> Tensor:
    """Weights in the domain."""
    return draw.subject.prox(size * draw.normal(), 0.0)  # type: ignore[no-any-return]


def _objective(g: Any, U: Tensor, V: Tensor, step: float) -> float:
    return step * float(g.value(U)) + 0.5 * float((U - V).square().sum())


def _value(g: Any, draw: Draw) -> str:
    """g(0) = 0, g ≥ 0, and along segments g is convex; homogeneous where claimed."""
    zero = torch.zeros(draw.shape, dtype=torch.float64)
    g.check(draw.shape)
    expect(float(g.value(zero)) == 0, f"value(0): found {float(g.value(zero)):g}, expected 0")
    for size in draw.sizes():
        A, B = _inside(draw, size), _inside(draw, size)
        a, b, between = (float(g.value(U)) for U in (A, B, (A + B) / 2))
        expect(min(a, b) >= 0, f"value: found {min(a, b):g}, expected a number ≥ 0")
        best_of("value: convex between two points", between, [(a + b) / 2], max(a, b))
        if is_homogeneous(g):
            for c in (1e-6, 3.0, 1e6):
                alike(f"homogeneous: g({c:g}·U)", float(g.value(c * A)), c * a)
    return "convex, 0 at 0" + (", homogeneous" if is_homogeneous(g) else "")


def _domain(g: Any, draw: Draw) -> str:
    """prox(V, 0) is the nearest point of the domain: it stays where it is, and others are no nearer."""
    for size in draw.sizes():
        V = size * draw.normal()
        kept, P = V.clone(), g.prox(V, 0.0)
        expect(torch.equal(kept, V), "prox: changed its argument")
        same("prox(V, 0) of a point of the domain", g.prox(P, 0.0), P)
        others = [float((_inside(draw, s) - V).norm()) for s in draw.sizes()]
        best_of("prox(V, 0): the distance from V", float((P - V).norm()), others, float(V.norm()))
    return "prox(V, 0) projects on it"


def _prox(g: Any, draw: Draw) -> str:
    """The minimiser of its own definition, against random competitors."""
    for step in _STEPS:
        for size in draw.sizes():
            V = size * draw.normal()
            U = g.prox(V, step)
            same("prox: outside of the domain, by", g.prox(U, 0.0), U)
            moved = [g.prox(U + s * size * draw.normal(), 0.0) for s in (1e-3, 0.1, 1.0)] + [g.prox(0.99 * U, 0.0)]
            others = [_objective(g, T, V, step) for T in moved]
            best_of("prox: its objective", _objective(g, U, V, step), others, float(V.square().sum()))
    return "no competitor is better"


def _duality(g: Any, draw: Draw) -> str:
    """Fenchel–Young: ⟨A, U⟩ ≤ g(U) + g*(A), with equality where A = (V − prox)/step is a subgradient at the prox."""
    free = g.cost(draw.shape) == 0
    for step in _STEPS:
        for size in draw.sizes():
            V = size * draw.normal()
            U = g.prox(V, step)
            S = (V - U) / step
            unit = float((S * U).abs().sum()) + float(g.value(U))
            expect(float(S[free].abs().sum()) <= ALIKE * unit, "cost: 0 where the prox moves an entry: it is not free")
            if is_homogeneous(g):
                most = float(g.dual_norm(S).max())
                expect(most <= 1 + ALIKE, f"dual_norm: found {most:.9g} > 1 at a subgradient, which is dual feasible")
                alike("⟨A, U⟩ at a subgradient A, against g(U)", float((S * U).sum()), float(g.value(U)), unit)
            else:
                within = S * (1 - 1e-9)  # rounding may put S just outside of where g* is finite
                expected = float((S * U).sum() - g.value(U))
                alike("g*(A) at a subgradient", float(g.conjugate(within).sum()), expected, unit)
            A = step * draw.normal()
            for T in (U, _inside(draw, 30 * size), _inside(draw), g.prox(1e3 * A, 0.0)):
                for B in (A, S):
                    left, right = fenchel_young(g, B, T.masked_fill(free, 0.0))
                    slack = ALIKE * (abs(right) + float((B * T).abs().sum()))
                    found = f"⟨A, U⟩ = {left:.9g} exceeds g(U) + g*(A) = {right:.9g}"
                    expect(left <= right + slack, f"{found}: dual_norm or conjugate is too small")
    return "⟨A, U⟩ ≤ g(U) + g*(A), equal at subgradients"


def _dual_norm(g: Any, draw: Draw) -> str:
    """Columns may be scaled by up to 1/s each: then g* is finite, for homogeneous penalties 0."""
    free = g.cost(draw.shape) == 0
    for size in draw.sizes():
        A = size * draw.normal().masked_fill(free, 0.0)
        s = g.dual_norm(A)
        expect(s.shape == (draw.shape[1],), f"dual_norm: found shape {list(s.shape)}, expected [M] = [{draw.shape[1]}]")
        expect(bool((s >= 0).all()), "dual_norm: found a negative number or NaN")
        alike("dual_norm(2A)", float(g.dual_norm(2 * A).max()), 2 * float(s.max()))
        t = torch.rand(draw.shape[1], generator=draw.generator, dtype=torch.float64) / s.clamp(min=1e-3)
        if not is_homogeneous(g):
            lost = g.conjugate(A * t * (1 - ALIKE))
            expect(lost.shape == s.shape and bool((lost >= 0).all()), f"conjugate: expected [M] ≥ 0, found {lost}")
            finite = bool(torch.isfinite(lost).all())
            expect(finite, "conjugate: infinite though columns are scaled to dual norm below 1")
            continue
        for T in [_inside(draw, other) for other in draw.sizes()]:
            product, value = float((A * t * T.masked_fill(free, 0.0)).sum()), float(g.value(T))
            found = f"dual_norm: ⟨A diag(t), U⟩ = {product:.9g} exceeds g(U) = {value:.9g}"
            expect(product <= value * (1 + ALIKE), found)
    return "columns may be scaled one by one"


def _slack(g: Any, draw: Draw) -> str:
    """g(U) + ⟨A, U⟩ ≥ c_ij|u_ij| for each entry."""
    if not hasattr(g, "slack") or not is_homogeneous(g):
        return "not checked: there is none"
    free = g.cost(draw.shape) == 0
    for _ in range(draw.points):
        A = draw.normal().masked_fill(free, 0.0)
        A = A / g.dual_norm(-A).max().clamp(min=1e-300) * float(torch.rand(1, generator=draw.generator))
        c = g.slack(A)
        expect(bool((c >= 0).all()), "slack: found a negative number or NaN")
        for T in (_inside(draw), g.prox(-A, 0.0), *(_single(draw, -A) for _ in range(3))):
            left, right = float(g.value(T)) + float((A * T).sum()), float((c * T.abs()).max())
            expect(left >= right - ALIKE * float(g.value(T)), f"slack: g(U) + ⟨A, U⟩ = {left:.9g} is below {right:.9g}")
    return "bounds single weights"


def _single(draw: Draw, like: Tensor) -> Tensor:
    """One entry alone, of the sign of ``like``'s."""
    place = int(torch.randint(like.numel(), (1,), generator=draw.generator))
    alone = torch.zeros_like(like).reshape(-1)
    alone[place] = like.reshape(-1)[place].sign()
    return draw.subject.prox(alone.reshape(like.shape), 0.0)  # type: ignore[no-any-return]


def _cost(g: Any, draw: Draw) -> str:
    """The price of each entry; 0 exactly where g does not depend on it."""
    cost = g.cost(draw.shape)
    expect(tuple(cost.shape) == draw.shape, f"cost: found shape {list(cost.shape)}, expected {list(draw.shape)}")
    expect(bool((cost >= 0).all()), "cost: found a negative number or NaN")
    U, free = _inside(draw), cost == 0
    far = torch.where(free, 1e3 * draw.normal(), U)
    same("prox(U, 0) of free entries: they have no domain", g.prox(far, 0.0), far)
    alike("value, free entries changed", float(g.value(far)), float(g.value(U)), 1e-6)
    for place in (~free).nonzero().tolist()[: 4 * draw.points]:
        alone = torch.zeros_like(U)
        alone[tuple(place)] = 1.0
        signs = [sign for sign in (1.0, -1.0) if torch.equal(g.prox(sign * alone, 0.0), sign * alone)]
        if is_homogeneous(g) and signs:
            found = max(float(g.value(sign * alone)) for sign in signs)
            alike(f"cost{place}, against g of the entry alone at 1", float(cost[tuple(place)]), found)
        charged = len(signs) < 2 or any(float(g.value(c * s * alone)) > 0 for s in signs for c in (1.0, 1e6))
        charged |= any(not torch.equal(g.prox(c * alone, 0.0), c * alone) for c in (1e12, -1e12))
        expect(charged, f"cost{place}: found a price, yet g does not depend on the entry")
    return f"{int(free.sum())} of {free.numel()} entries are free"


def _units(g: Any, draw: Draw) -> str:
    """``rescaled`` and ``times`` are the penalty in other units: values, proxes and duals follow."""
    d = draw.normal(draw.shape[0], 1).exp()
    scaled = g.rescaled(d)
    for name, made in (("to", g.to(d)), ("rescaled", scaled), ("times", g.times(2.0) if hasattr(g, "times") else g)):
        expect(type(made) is type(g), f"{name}: found {type(made).__name__}, expected {type(g).__name__} again")
    _prox(scaled, draw)
    for size in draw.sizes():
        U, A = _inside(draw, size), size * draw.normal()
        alike("rescaled(d): value at diag(d)U", float(scaled.value(d * U)), float(g.value(U)))
        if g.convex:
            same("rescaled(d): dual_norm of A/d", scaled.dual_norm(A / d), g.dual_norm(A))
            if not is_homogeneous(g):
                same("rescaled(d): conjugate of A/d", scaled.conjugate(A / d), g.conjugate(A))
        if hasattr(g, "times"):
            k = 2.5
            more = g.times(k)
            alike("times(k): value", float(more.value(U)), k * float(g.value(U)))
            same("times(k): prox with step, against that of g with k·step", more.prox(A, 0.3), g.prox(A, 0.3 * k))
            if g.convex and not is_homogeneous(g):
                same("times(k): conjugate of kA", more.conjugate(k * A), k * g.conjugate(A))
    return "rescaled" + (" and times" if hasattr(g, "times") else "")


def _precision(g: Any, draw: Draw) -> str:
    """``to`` another dtype."""
    V = draw.normal()
    low = g.to(V.float())
    found = low.prox(V.float(), 0.3)
    expect(found.dtype == torch.float32, f"to(float32): the prox of float32 weights is in {found.dtype}")
    same("to(float32): prox", found.double(), g.prox(V.float().double(), 0.3), 1e-4)
    return "float32"


def _cvxpy(g: Any, draw: Draw) -> str:
    """The same value, infinite outside of the domain, and the same prox."""
    import cvxpy as cp

    for size in (0.3, 3.0):
        V, step = size * draw.normal(), 0.4
        U, X = g.prox(V, step), cp.Variable(draw.shape)
        objective, unit = step * g.to_cvxpy(X) + cp.sum_squares(X - V.numpy()) / 2, 1e-3 * float(V.square().sum())
        agrees("to_cvxpy: the prox problem", objective, [], _objective(g, U, V, step), unit)
    return "the same prox"


def _budget(g: Any, draw: Draw) -> str:
    """An exact budget: its prox keeps it, and no random point within it is nearer."""
    for size in draw.sizes():
        V = size * draw.normal()
        U = g.prox(V, 1.0)
        expect(float(g.value(U)) == 0, "prox: does not keep the budget")
        expect(bool(((U == V) | (U == 0)).all()), "prox: changed an entry that it keeps")
        others = [float((torch.where(g.prox(draw.normal(), 1.0) != 0, V, 0.0) - V).norm()) for _ in range(draw.points)]
        best_of("prox: the distance from V", float((U - V).norm()), others, float(V.norm()))
    expect(math.isinf(float(g.value(draw.normal()))), "value: expected infinity outside of the budget")
    return "nearest points within the budget"


_CONVEX: dict[str, Callable[[Any, Draw], str]] = {
    test.__name__.strip("_").replace("_", " "): test
    for test in (_value, _domain, _prox, _duality, _dual_norm, _slack, _cost, _units, _precision, _cvxpy)
}
_BUDGET: dict[str, Callable[[Any, Draw], str]] = {"budget": _budget, "precision": _precision}
