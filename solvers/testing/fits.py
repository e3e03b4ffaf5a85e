"""Whether a fit is what docs/fits.md asks for, tried at random outputs."""

import math
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.arrays import norm
from convexprune.solvers.programs.duality import Convex, of_fit
from convexprune.solvers.testing import functions
from convexprune.solvers.testing.contract import ALIKE, ConformanceReport, best_of, expect, same
from convexprune.solvers.testing.functions import STEPS, Draw

_CHANCE = 2.0  # how far random samples may be from the average


def check_fit(fit: Any, *, points: int = 6) -> ConformanceReport:
    """Check every member of a fit with a few dozen samples and a few outputs, in float64, at random outputs.

    Raises:
        NotConforming: Some checks failed; the message says which, what was found and what was expected.
    """
    f = fit.map(lambda array: array.to(torch.float64))
    return functions.report_of(Draw(of_fit(f), points), _CHECKS)


def _members(draw: Draw) -> None:
    """The targets and what is said of them."""
    f: Any = draw.function.subject
    expect(tuple(f.Y.shape) == tuple(f.shape), f"shape: found {tuple(f.shape)}, targets are {tuple(f.Y.shape)}")
    same("anchor, by its shape", 0 * f.anchor.expand(f.shape), 0 * f.Y)
    same("size, against ‖Y‖", f.size, float(norm(f.Y)))
    expect(f.scale > 0, f"scale: found {f.scale:g}, expected a number > 0")
    mask = f.unrestricted()
    expect(mask.dtype == torch.bool, f"unrestricted: expected a boolean mask, found {mask.dtype}")
    expect(tuple(mask.expand(f.shape).shape) == tuple(f.shape), f"unrestricted: found shape {list(mask.shape)}")


def _rows(draw: Draw) -> None:
    """``sums`` and ``dual_terms`` add up over samples; all else is one row at a time."""
    f: Any = draw.function.subject
    parts = [(rows, f.map(lambda a, rows=rows: a[rows])) for rows in (slice(0, None, 2), slice(1, None, 2))]
    for Z in draw.anywhere():
        kept, L = Z.clone(), draw.normal()
        sums, V, projected = f.sums(Z), f.prox(Z, 2.0), f.project_dual(L)
        terms = f.dual_terms(projected)
        expect(torch.equal(kept, Z), "prox or sums: changed the outputs that were given")
        expect(sums.dtype == terms.dtype == torch.float64, "sums, dual_terms: expected float64")
        same("sums of two halves, added", sum(part.sums(Z[rows]) for rows, part in parts), sums)
        same("dual_terms of two halves, added", sum(part.dual_terms(projected[rows]) for rows, part in parts), terms)
        for rows, part in parts:
            found = part.prox_residual(Z[rows].clone(), sums, 2.0)
            same("prox_residual of some rows, against Z − prox", found, (Z - V)[rows], rtol=1e-6)
            same("residual of some rows", part.residual(Z[rows].clone()), f.residual(Z)[rows])
            same("project_dual of some rows", part.project_dual(L[rows]), projected[rows])
            mask = f.unrestricted().expand(f.shape)[rows]
            expect(torch.equal(part.unrestricted().expand(mask.shape), mask), "unrestricted: rows do not follow map")


def _distance(draw: Draw) -> None:
    """What a projection moves by, which no point of the domain is nearer than."""
    f, points = draw.function, draw.inside()
    for Z in draw.anywhere():
        far = f.far(Z)
        if far > ALIKE * f.subject.scale:
            nearest = f.subject.prox_residual(Z.clone(), f.subject.sums(Z), math.inf)
            same("distance, against the length of prox_residual with rho = ∞", far, float(nearest.norm()))
            best_of("distance", far, [float((V - Z).norm()) for V in points], far)


def _project_dual(draw: Draw) -> None:
    """It keeps what is in the domain of f*, and leads into it by the shortest way."""
    f = draw.function.subject
    duals = [(Z - draw.function.prox(Z, step)) / step for Z in draw.anywhere() for step in STEPS]
    for S in duals:
        same("project_dual: changed a subgradient, at which f* is finite", f.project_dual(S), S)
    for size in draw.sizes():
        L = size * duals[0].norm() / math.sqrt(duals[0].numel()) * draw.normal()
        projected, conjugate = next(draw.function.duals(L))
        same("project_dual of what was projected", f.project_dual(projected), projected)
        expect(math.isfinite(conjugate), "dual_value: f* is infinite at multipliers that were projected")
        moved, others = float((projected - L).norm()), [float((S - L).norm()) for S in duals]
        best_of("project_dual: the distance it moves", moved, others, 0.0)


def _scaling(draw: Draw) -> None:
    """t within [0, cap], no worse than any between 0, itself and the caps; ``dual_value`` is −f*(t∘Λ)."""
    f: Any = draw.function.subject
    for Z in draw.anywhere():
        L = f.project_dual(f.residual(0.5 * Z))
        terms, cap = f.dual_terms(L), draw.uniform(f.shape[1])
        unit, scaled = float((terms[0].abs() * cap).sum()), float(f.dual_value(terms, cap))
        expected = float(f.dual_value(f.dual_terms(L * cap), torch.ones_like(cap)))
        same("dual_value(terms, t), against that of t∘Λ", scaled, expected, unit)
        more = torch.cat([terms[:1] + 1, terms[1:]])
        rise = float(f.dual_value(more, cap)) - scaled
        same("dual_value where terms[0] is 1 more, against Σ t more", rise, float(cap.sum()), unit)
        for top in (cap, torch.full_like(cap, 1.0), torch.full_like(cap, 1e6)):
            t = f.best_scaling(terms, top)
            expect(bool(((t >= 0) & (t <= top * (1 + ALIKE))).all()), "best_scaling: found t outside of [0, cap]")
            top = torch.maximum(t, top.clamp(max=1))  # f* is finite at t and at 1
            lines = [torch.lerp(a, b, part) for a, b in ((0 * t, t), (0 * t, top), (t, top)) for part in _PARTS]
            others = [-float(f.dual_value(terms, between)) for between in lines]
            unit = float((terms[0].abs() * t).sum())
            best_of("best_scaling: −dual_value", -float(f.dual_value(terms, t)), others, unit)


_PARTS = [k / 50 for k in range(51)]


def _units(draw: Draw) -> None:
    """``rescaled`` and ``times`` are the fit in other units."""
    f, c, k = draw.function, 2.5, 3.0
    outputs, more = f.subject.rescaled(c), f.subject.times(k)
    functions.in_units(draw, of_fit(outputs), c, "rescaled(c)")
    functions.in_units(draw, of_fit(more), 1.0, "times(k)", k)
    same("rescaled(c): size", outputs.size, c * f.subject.size)
    for Z in draw.anywhere():
        V, far = f.prox(Z, 1.0), f.far(Z)
        same("rescaled(c): distance of cZ", outputs.distance(outputs.sums(c * Z)), c * far, f.subject.scale)
        same("rescaled(c): prox of cZ with rho/c²", outputs.prox(c * Z, 1 / c**2), c * V)
        same("times(k): distance", more.distance(more.sums(Z)), far, f.subject.scale)
        same("times(k): prox with k·rho", more.prox(Z, k), V)


def _sample(draw: Draw) -> None:
    """All samples are the fit itself; a third asks as much of each on average, as far as chance tells."""
    f, rows = draw.function, slice(None, None, 3)
    whole, third = f.subject.sample(slice(None)), f.subject.sample(rows)
    expect(tuple(third.shape) == (len(f.subject.Y[rows]), f.shape[1]), f"sample: found shape {tuple(third.shape)}")
    same("sample: targets", third.Y, f.subject.Y[rows])
    wide, part = [draw.at(3.0) for _ in range(draw.points)], of_fit(third)
    for Z in wide:
        same("sample of all rows: prox", whole.prox(Z, 1.0), f.prox(Z, 1.0))
    for name, measure in (("value", lambda g, Z: g.value(Z)), ("set", _reach)):
        ratio = [measure(part, Z[rows]) / max(measure(f, Z), 1e-300) for Z in wide]
        mean = sum(ratio) / len(ratio)
        expect(
            mean <= 0 or 1 / _CHANCE < mean < _CHANCE,
            f"sample: its {name} is {mean:.3g} times that of all rows, expected about 1",
        )


def _reach(f: Convex, Z: Tensor) -> float:
    """How far from the centre the domain reaches on the side of Z."""
    return float((f.inside(Z) - f.centre).norm() / (Z - f.centre).norm())


def _residual(draw: Draw) -> None:
    """A multiple ≥ 0 of a subgradient: it does not point to where f is lower."""
    for Z in draw.anywhere():
        S = draw.function.subject.residual(Z)
        expect(S.shape == Z.shape and bool(torch.isfinite(S).all()), "residual: expected finite numbers [P, M]")
        down = float((S * (draw.function.prox(Z, 1.0) - Z)).sum())
        room = ALIKE * float(S.norm()) * float(Z.norm())
        expect(down <= room, f"residual: points the wrong way, ⟨S, V − Z⟩ = {down:g}")


def _precision(draw: Draw) -> None:
    """``map`` to another dtype; what is given in a dtype comes back in it."""
    f, low = draw.function.subject, draw.function.subject.map(lambda array: array.float())
    for fit, Z in ((f, draw.at(1.0)), (low, draw.at(1.0).float())):
        made = {"prox_residual": fit.prox_residual(Z.clone(), fit.sums(Z), 1.0), "residual": fit.residual(Z)}
        for name, found in (made | {"project_dual": fit.project_dual(Z)}).items():
            expect(found.dtype == Z.dtype, f"{name} of {Z.dtype}: found {found.dtype}")
    functions.precision(draw, of_fit(low).prox)


_CHECKS = (
    *(_members, _rows, functions.convex, functions.prox, _distance, _project_dual, functions.duality),
    *(_scaling, _units, _sample, _residual, _precision, functions.cvxpy),
)
