"""Which fits and penalties are the package's own, and cheap checks of what other ones claim when a program is built.

A bound rests on those claims. ``convexprune.solvers.testing.check_fit`` and ``check_penalty`` check the whole contract.
"""

from collections.abc import Hashable, Iterator
from functools import cache
from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs.fits import Fit
from convexprune.solvers.programs.geometries import Ball, NetTrimLoss, NetTrimSet, ReluBall, ReluLoss, SquaredLoss
from convexprune.solvers.programs.penalties import L1, GroupL2, Penalty, is_homogeneous
from convexprune.solvers.programs.supports import NM, TopK

SETS = (Ball, ReluBall, NetTrimSet)
LOSSES = (SquaredLoss, ReluLoss, NetTrimLoss)
FITS = (*SETS, *LOSSES)
NORMS = (L1, GroupL2)
BUDGETS = (TopK, NM)
_SLACK = 1e-6  # relative error granted to what should be equal
_SAMPLES = 32  # of the fit, enough to see a wrong formula
_FACTORS = (1e-6, 2.0, 1e6)  # at which g(cU) = c·g(U) is tried


def is_plain(instance: object, kinds: tuple[type, ...]) -> bool:
    """Whether it is of one of the kinds, and no subclass redefines a member: only then may its formulas be assumed."""
    cls: Any = type(instance)
    return any(isinstance(instance, kind) and not _redefined(cls, kind) for kind in kinds)


@cache
def _redefined(cls: Hashable, kind: Hashable) -> bool:
    names = (name for name in dir(kind) if not name.startswith("__") and name != "_abc_impl")
    return any(getattr_static(cls, name) is not getattr_static(kind, name) for name in names)


def check_penalty_claims(penalty: Penalty, shape: tuple[int, int]) -> None:
    """Raise InvalidInput if a convex penalty is not homogeneous and does not say so, or its dual is too small."""
    if is_plain(penalty, (*NORMS, *BUDGETS)) or not penalty.convex:
        return
    name, own = type(penalty).__name__, _noise(shape, 0)
    g: Any = penalty.to(own)
    inside = g.prox(own, 0.0)
    _expect(bool(torch.isfinite(inside).all()), f"penalty {name}: prox(V, 0), the nearest point of its domain, is NaN")
    if is_homogeneous(penalty):
        for c in _FACTORS:
            scaled, should = float(g.value(c * inside)), c * float(g.value(inside))
            _expect(
                abs(scaled - should) <= _SLACK * abs(should),
                f"penalty {name}: g({c:g}·U) = {scaled:.6g} is not {c:g}·g(U) = {should:.6g}, so it is not positively "
                "homogeneous. Give it homogeneous = False, conjugate(A) and times(k)",
            )
    else:
        missing = [member for member in ("conjugate", "times") if not hasattr(g, member)]
        _expect(not missing, f"penalty {name}: what is not homogeneous needs {' and '.join(missing)} too")
    for step in (0.1, 10.0):
        U = g.prox(own, step)
        S = (own - U) / step  # a subgradient
        product, most = fenchel_young(g, S, U)
        _expect(
            product <= most + _SLACK * (abs(most) + float((S * U).abs().sum())),
            f"penalty {name}: ⟨A, U⟩ = {product:.6g} exceeds g(U) + g*(A) = {most:.6g} at a subgradient A of g at U, "
            "so that its dual_norm or conjugate is too small, or its prox is none",
        )


def fenchel_young(penalty: Penalty, A: Tensor, U: Tensor) -> tuple[float, float]:
    """⟨A, U⟩ and g(U) + g*(A), free entries left out; of a homogeneous penalty for A scaled to dual norm 1."""
    g: Any = penalty
    A = torch.where(g.cost((U.shape[0], U.shape[1])).to(A) == 0, 0.0, A)
    if is_homogeneous(penalty):
        norm = g.dual_norm(A)
        A, conjugate = A * torch.where(norm > 0, 1 / norm, 0.0), 0.0
    else:
        conjugate = float(g.conjugate(A).sum())
    return float((A * U).sum()), float(g.value(U)) + conjugate


def check_fit_claims(fit: Fit) -> None:
    """Raise InvalidInput if ⟨Λ, Z⟩ exceeds f(Z) + f*(Λ) somewhere: then the bound would be a false one."""
    if is_plain(fit, FITS):
        return
    part = fit.map(lambda array: array[:_SAMPLES].to(torch.float64))
    anchor = part.anchor.to(torch.float64)
    spread, shape = float(anchor.square().mean().sqrt()) or 1.0, (anchor.shape[0], anchor.shape[1])
    # Outputs near the anchor and far from it, and a weight of their prox.
    points = [
        (anchor + size * spread * _noise(shape, k).to(anchor.device), rho)
        for k, (size, rho) in enumerate(((1.0, 1.0), (0.1, 10.0), (10.0, 0.1), (1e3, 1.0)))
    ]
    for L in _multipliers(part, anchor, points[:3]):
        terms = part.dual_terms(L)
        for t in (torch.ones_like(terms[0]), part.best_scaling(terms, torch.full_like(terms[0], 1e3))):
            conjugate, far = -part.dual_value(terms, t), part.anchor.to(L) + 1e3 * L * t
            for V in (*(part.prox(at, weight) for at, weight in points), part.prox(far, 1e-3)):
                product, value = float((t * L * V).sum()), part.value(part.sums(V))
                size = float((t * L * V).abs().sum()) + abs(value) + abs(conjugate)
                _expect(
                    product <= value + conjugate + _SLACK * size,
                    f"fit {type(fit).__name__}: ⟨Λ, Z⟩ = {product:.6g} exceeds f(Z) + f*(Λ) = {value + conjugate:.6g}, "
                    "so that its project_dual, dual_terms, dual_value or best_scaling lets Λ out of the domain of f*, "
                    "or f* is too small",
                )


def _multipliers(fit: Fit, anchor: Tensor, points: list[tuple[Tensor, float]]) -> Iterator[Tensor]:
    """Subgradients, and projections of far larger ones; and some that favour the bound, of all entries or few."""
    for Z, rho in points:
        S = rho * (Z - fit.prox(Z, rho))
        large = 30 * float(S.abs().max())
        peak = -anchor.sign() * (anchor.abs() == anchor.abs().amax(0))
        for L in (S, large * torch.roll(S.sign(), 1, 0), -large * anchor.sign(), large * peak):
            yield fit.project_dual(L)


def _noise(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidInput(f"{message} (docs/penalties.md, docs/fits.md; convexprune.solvers.testing checks the rest)")
