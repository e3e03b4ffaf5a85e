"""Whether a fit is what docs/fits.md asks for, tried at random outputs."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.arrays import norm
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

_WEIGHTS = (0.02, 1.0, 30.0)  # of a prox
_CHANCE = 2.0  # how far random samples may be from the average
_SECTIONS = 40  # of a line, in search of the highest point: thirds


def check_fit(fit: Any, *, points: int = 6) -> ConformanceReport:
    """Check every member of a fit with a few dozen samples and a few outputs, in float64, at random outputs.

    Raises:
        NotConforming: Some checks failed; the message says which, what was found and what was expected.
    """
    f = fit.map(lambda array: array.to(torch.float64))
    return checked(type(fit).__name__, Draw(f, tuple(f.shape), points), _CHECKS)


def _spread(f: Any) -> float:
    return float(f.anchor.square().mean().sqrt()) or 1.0


def _outputs(draw: Draw) -> list[Tensor]:
    """Outputs near the anchor and far from it."""
    f = draw.subject
    return [f.anchor + size * _spread(f) * draw.normal() for size in draw.sizes()]


def _domain(draw: Draw) -> list[Tensor]:
    """Outputs in the domain of f, of all sizes."""
    return [draw.subject.prox(Z, rho) for Z in _outputs(draw) for rho in (0.1, 10.0)]


def _f(f: Any, Z: Tensor) -> float:
    return float(f.value(f.sums(Z)))


def _far(f: Any, Z: Tensor) -> float:
    return float(f.distance(f.sums(Z)))


def _conjugate(f: Any, L: Tensor) -> float:
    return -float(f.dual_value(f.dual_terms(L), torch.ones(L.shape[1], dtype=torch.float64)))


def _members(f: Any, draw: Draw) -> str:  # noqa: ARG001
    """The targets and what is said of them."""
    expect(tuple(f.Y.shape) == tuple(f.shape), f"shape: found {tuple(f.shape)}, targets are {tuple(f.Y.shape)}")
    same("anchor, by its shape", 0 * f.anchor.expand(f.shape), 0 * f.Y)
    alike("size, against ‖Y‖", f.size, float(norm(f.Y)))
    expect(f.scale > 0, f"scale: found {f.scale:g}, expected a number > 0")
    mask = f.unrestricted()
    expect(mask.dtype == torch.bool, f"unrestricted: expected a boolean mask, found {mask.dtype}")
    expect(tuple(mask.expand(f.shape).shape) == tuple(f.shape), f"unrestricted: found shape {list(mask.shape)}")
    return "shapes and units"


def _rows(f: Any, draw: Draw) -> str:
    """``sums`` and ``dual_terms`` add up over samples; all else is one row at a time, and changes no argument."""
    for Z in _outputs(draw):
        kept, L = Z.clone(), draw.normal()
        sums, terms, V = f.sums(Z), f.dual_terms(f.project_dual(L)), f.prox(Z, 2.0)
        expect(torch.equal(kept, Z), "prox or sums: changed the outputs that were given")
        expect(sums.dtype == terms.dtype == torch.float64, "sums, dual_terms: expected float64")
        halves = (slice(0, None, 2), slice(1, None, 2))
        parts = [(rows, f.map(lambda array, rows=rows: array[rows])) for rows in halves]
        same("sums of two halves, added", sum(p.sums(Z[rows]) for rows, p in parts), sums)
        terms_of = [p.dual_terms(p.project_dual(L[rows])) for rows, p in parts]
        same("dual_terms of two halves, added", terms_of[0] + terms_of[1], terms)
        for rows, p in parts:
            found = p.prox_residual(Z[rows].clone(), sums, 2.0)
            same("prox_residual of some rows, against Z − prox", found, (Z - V)[rows], 1e-6)
            same("residual of some rows", p.residual(Z[rows].clone()), f.residual(Z)[rows])
            same("project_dual of some rows", p.project_dual(L[rows]), f.project_dual(L)[rows])
            mask = f.unrestricted().expand(f.shape)[rows]
            expect(torch.equal(p.unrestricted().expand(mask.shape), mask), "unrestricted: rows do not follow map")
    return "sums add up, rows are apart"


def _prox(f: Any, draw: Draw) -> str:
    """The minimiser of its own definition, in the domain; a projection measures the distance."""
    for Z in _outputs(draw):
        for rho in _WEIGHTS:
            V = f.prox(Z, rho)
            unit = float((Z - V).norm())
            far = _far(f, V)
            expect(far <= ALIKE * (unit + f.scale), f"prox: {far:.3g} away from the domain of f")
            least = _f(f, V) + 0.5 * rho * unit**2
            others = [f.prox(V + s * unit * draw.normal() / math.sqrt(Z.numel()), rho) for s in (1e-3, 0.1, 1.0)]
            others += [T for T in (Z, f.anchor.expand(f.shape)) if _far(f, T) == 0]
            found = [_f(f, T) + 0.5 * rho * float((T - Z).square().sum()) for T in others]
            best_of("prox: its objective", least, found, least)
        outside = _far(f, Z)
        if outside > ALIKE * f.scale:
            nearest = f.prox_residual(Z.clone(), f.sums(Z), math.inf)
            alike("distance, against the length of prox_residual with rho = ∞", outside, float(nearest.norm()))
            best_of("distance", outside, [float((V - Z).norm()) for V in _domain(draw)], outside)
    return "no competitor is better"


def _convex(f: Any, draw: Draw) -> str:
    """Between two points of the domain f is no larger than the mean."""
    points = _domain(draw)
    for A, B in zip(points, reversed(points), strict=True):
        between = (A + B) / 2
        far, slack = _far(f, between), ALIKE * (f.scale + float((A - B).norm()))
        expect(far <= slack, f"distance: {far:.3g} between two points of the domain")
        best_of("value: convex between two points", _f(f, between), [(_f(f, A) + _f(f, B)) / 2], _f(f, A) + _f(f, B))
    return "along segments"


def _project_dual(f: Any, draw: Draw) -> str:
    """It keeps what is in the domain of f*, and leads into it by the shortest way."""
    duals = [rho * (Z - f.prox(Z, rho)) for Z in _outputs(draw) for rho in _WEIGHTS]
    for S in duals:
        same("project_dual: changed a subgradient, at which f* is finite", f.project_dual(S), S)
    for size in draw.sizes():
        L = size * duals[0].norm() / math.sqrt(duals[0].numel()) * draw.normal()
        projected = f.project_dual(L)
        same("project_dual of what was projected", f.project_dual(projected), projected)
        expect(math.isfinite(_conjugate(f, projected)), "dual_value: f* is infinite at multipliers that were projected")
        moved, others = float((projected - L).norm()), [float((S - L).norm()) for S in duals]
        best_of("project_dual: the distance it moves", moved, others, 0.0)
    return "the nearest multipliers where f* is finite"


def _duality(f: Any, draw: Draw) -> str:
    """Fenchel–Young: ⟨t∘Λ, Z⟩ ≤ f(Z) + f*(t∘Λ), with equality at L = rho·(Z − prox), a subgradient at the prox."""
    for Z in _outputs(draw):
        for rho in _WEIGHTS:
            V = f.prox(Z, rho)
            S = rho * (Z - V)
            unit = float((S * V).abs().sum()) + abs(_f(f, V))
            expected = float((S * V).sum()) - _f(f, V)
            alike("f*(Λ) at a subgradient, against ⟨Λ, Z⟩ − f(Z)", _conjugate(f, S), expected, unit)
            for L in (S, f.project_dual(float(S.norm()) * draw.normal() / math.sqrt(S.numel()))):
                terms = f.dual_terms(L)
                for t in (torch.ones_like(terms[0]), f.best_scaling(terms, torch.full_like(terms[0], 1e3))):
                    _below(f, L * t, -float(f.dual_value(terms, t)), draw)
    return "⟨Λ, Z⟩ ≤ f(Z) + f*(Λ), equal at subgradients"


def _below(f: Any, L: Tensor, conjugate: float, draw: Draw) -> None:
    far = f.anchor + 1e3 * _spread(f) * math.sqrt(L.numel()) * L / L.norm().clamp(min=1e-300)
    for V in (*_domain(draw), f.prox(far, 1e-3)):
        product, value = float((L * V).sum()), _f(f, V)
        slack = ALIKE * (float((L * V).abs().sum()) + abs(value) + abs(conjugate))
        found = f"⟨Λ, Z⟩ = {product:.9g} exceeds f(Z) + f*(Λ) = {value + conjugate:.9g}: f* too small"
        expect(
            product <= value + conjugate + slack, f"{found}, or project_dual or best_scaling lets Λ out of its domain"
        )


def _scaling(f: Any, draw: Draw) -> str:
    """t within [0, cap], no worse than any between 0, itself and the caps; ``dual_value`` is −f*(t∘Λ)."""
    for Z in _outputs(draw):
        L = f.project_dual(f.residual(0.5 * Z))
        terms = f.dual_terms(L)
        cap = torch.rand(f.shape[1], generator=draw.generator, dtype=torch.float64)
        unit, scaled = float((terms[0].abs() * cap).sum()), float(f.dual_value(terms, cap))
        alike("dual_value(terms, t), against that of t∘Λ", scaled, -_conjugate(f, L * cap), unit)
        more = torch.cat([terms[:1] + 1, terms[1:]])
        rise = float(f.dual_value(more, cap)) - scaled
        alike("dual_value where terms[0] is 1 more, against Σ t more", rise, float(cap.sum()), unit)
        for top in (cap, torch.full_like(cap, 1.0), torch.full_like(cap, 1e6)):
            t = f.best_scaling(terms, top)
            expect(bool(((t >= 0) & (t <= top * (1 + ALIKE))).all()), "best_scaling: found t outside of [0, cap]")
            top = torch.maximum(t, top.clamp(max=1))  # f* is finite at t and at 1
            others = [-_highest(f, terms, *ends) for ends in ((0 * t, t), (0 * t, top), (t, top))]
            unit = float((terms[0].abs() * t).sum())
            best_of("best_scaling: −dual_value", -float(f.dual_value(terms, t)), others, unit)
    return "within the caps, and no worse"


def _highest(f: Any, terms: Tensor, start: Tensor, end: Tensor) -> float:
    """The largest ``dual_value``, which is concave, on a line."""

    def at(part: float) -> float:
        return float(f.dual_value(terms, torch.lerp(start, end, part)))

    low, high = 0.0, 1.0
    best = max(at(low), at(high))
    for _ in range(_SECTIONS):
        inner, outer = (low + (high - low) * part for part in (1 / 3, 2 / 3))
        a, b = at(inner), at(outer)
        best, (low, high) = max(best, a, b), (low, outer) if a >= b else (inner, high)
    return best


def _units(f: Any, draw: Draw) -> str:
    """``rescaled`` and ``times`` are the fit in other units."""
    c, k = 2.5, 3.0
    outputs, more = f.rescaled(c), f.times(k)
    alike("rescaled(c): size", outputs.size, c * f.size)
    for Z in _outputs(draw):
        V = f.prox(Z, 1.0)
        S = Z - V
        moved = float((S * V).abs().sum())  # rounding of V moves f by a small part of it, also where f is 0
        alike("rescaled(c): value at cZ", _f(outputs, c * V), _f(f, V), moved)
        alike("rescaled(c): distance of cZ", _far(outputs, c * Z), c * _far(f, Z), f.scale)
        same("rescaled(c): prox of cZ with rho/c²", outputs.prox(c * Z, 1 / c**2), c * V)
        alike("times(k): value", _f(more, V), k * _f(f, V), moved)
        alike("times(k): distance", _far(more, Z), _far(f, Z), f.scale)
        same("times(k): prox with k·rho", more.prox(Z, k), V)
        alike("times(k): f* at kΛ", _conjugate(more, k * S), k * _conjugate(f, S), moved)
        alike("rescaled(c): f* at Λ/c", _conjugate(outputs, S / c), _conjugate(f, S), moved)
    return "rescaled and times"


def _sample(f: Any, draw: Draw) -> str:
    """All samples are the fit itself; a third asks as much of each on average, as far as chance tells."""
    whole, rows = f.sample(slice(None)), slice(None, None, 3)
    part = f.sample(rows)
    expect(tuple(part.shape) == (len(f.Y[rows]), f.shape[1]), f"sample: found shape {tuple(part.shape)}")
    same("sample: targets", part.Y, f.Y[rows])
    wide = [f.anchor + 3 * _spread(f) * draw.normal() for _ in range(draw.points)]
    for Z in wide:
        same("sample of all rows: prox", whole.prox(Z, 1.0), f.prox(Z, 1.0))
    for name, measure in (("value", _f), ("distance", _reach)):
        ratio = [measure(part, Z[rows]) / max(measure(f, Z), 1e-300) for Z in wide]
        mean = sum(ratio) / len(ratio)
        if mean > 0:
            found = f"sample: its {name} is {mean:.3g} times that of all rows, expected about 1"
            expect(1 / _CHANCE < mean < _CHANCE, found)
    return "as much of each sample on average"


def _reach(f: Any, Z: Tensor) -> float:
    """How far towards Z the domain reaches, a number; 0 where it reaches Z."""
    if _far(f, Z) == 0:
        return 0.0
    low, high, anchor = 0.0, 1.0, f.anchor
    for _ in range(30):
        middle = (low + high) / 2
        inside = _far(f, anchor + middle * (Z - anchor)) <= 1e-12 * f.scale
        low, high = (middle, high) if inside else (low, middle)
    return low


def _residual(f: Any, draw: Draw) -> str:
    """A multiple ≥ 0 of a subgradient: it does not point to where f is lower."""
    for Z in _outputs(draw):
        S = f.residual(Z)
        expect(S.shape == Z.shape and bool(torch.isfinite(S).all()), "residual: expected finite numbers [P, M]")
        V = f.prox(Z, 1.0)
        down, slack = float((S * (V - Z)).sum()), ALIKE * float(S.norm()) * float(Z.norm())
        expect(down <= slack, f"residual: points the wrong way, ⟨S, V − Z⟩ = {down:g}")
    return "points away from the domain, or up"


def _precision(f: Any, draw: Draw) -> str:
    """``map`` to another dtype; what is given in a dtype comes back in it."""
    Z = _outputs(draw)[len(draw.sizes()) // 2]
    low = f.map(lambda array: array.float())
    for fit, outputs in ((f, Z), (low, Z.float())):
        made = {"prox": fit.prox(outputs, 1.0), "prox_residual": fit.prox_residual(outputs, fit.sums(outputs), 1.0)}
        made |= {"residual": fit.residual(outputs), "project_dual": fit.project_dual(outputs)}
        for name, found in made.items():
            expect(found.dtype == outputs.dtype, f"{name} of {outputs.dtype}: found {found.dtype}")
    same("map to float32: prox", low.prox(Z.float(), 1.0).double(), f.prox(Z, 1.0), 1e-4)
    return "float64 and float32"


def _cvxpy(f: Any, draw: Draw) -> str:
    """The same prox."""
    import cvxpy as cp

    for Z in _outputs(draw)[1 : -1 : max(1, draw.points // 3)]:
        V, X = f.prox(Z, 1.0), cp.Variable(f.shape)
        term, constraints = f.to_cvxpy(X)
        expected = _f(f, V) + 0.5 * float((V - Z).square().sum())
        objective, unit = term + cp.sum_squares(X - Z.numpy()) / 2, 1e-3 * float((Z - f.anchor).square().sum())
        agrees("to_cvxpy: the prox problem", objective, constraints, expected, unit)
    return "the same prox"


_CHECKS: dict[str, Callable[[Any, Draw], str]] = {
    test.__name__.strip("_"): test
    for test in (
        *(_members, _rows, _prox, _convex, _project_dual, _duality, _scaling),
        *(_units, _sample, _residual, _precision, _cvxpy),
    )
}
