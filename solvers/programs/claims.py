"""Which fits and penalties are the package's own, and cheap checks of what other ones claim when a program is built.

A bound rests on those claims. ``convexprune.solvers.testing.check_fit`` and ``check_penalty`` check the whole contract.
"""

from collections.abc import Hashable
from functools import cache
from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs.duality import of_fit, of_penalty
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
    g, own = of_penalty(penalty, shape), _noise(shape, 0)
    inside = g.inside(own)
    _expect(bool(torch.isfinite(inside).all()), penalty, "prox(V, 0), the nearest point of its domain, is NaN")
    if is_homogeneous(penalty):
        for c in _FACTORS:
            scaled, should = g.value(c * inside), c * g.value(inside)
            _expect(
                abs(scaled - should) <= _SLACK * abs(should),
                penalty,
                f"g({c:g}·U) = {scaled:.6g} is not {c:g}·g(U) = {should:.6g}, so it is not positively homogeneous. "
                "Give it homogeneous = False, conjugate(A) and times(k)",
            )
    else:
        missing = [member for member in ("conjugate", "times") if not hasattr(penalty, member)]
        _expect(not missing, penalty, f"what is not homogeneous needs {' and '.join(missing)} too")
    excess = g.exceeded([(own, 0.1), (own, 10.0)], _SLACK)
    _expect(not excess, penalty, excess)


def check_fit_claims(fit: Fit) -> None:
    """Raise InvalidInput if ⟨Λ, Z⟩ exceeds f(Z) + f*(Λ) somewhere: then the bound would be a false one."""
    if is_plain(fit, FITS):
        return
    f = of_fit(fit.map(lambda array: array[:_SAMPLES].to(torch.float64)))
    # Outputs near the anchor and far from it, and a step of their prox.
    pairs = enumerate(((1.0, 1.0), (0.1, 0.1), (10.0, 10.0), (1e3, 1.0)))
    points = [(f.centre + size * f.unit * _noise(f.shape, k).to(f.centre.device), step) for k, (size, step) in pairs]
    excess = f.exceeded(points, _SLACK)
    _expect(not excess, fit, excess)


def _noise(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _expect(condition: bool, subject: Fit | Penalty, message: str) -> None:
    if not condition:
        kind = "fit" if hasattr(subject, "project_dual") else "penalty"
        raise InvalidInput(
            f"{kind} {type(subject).__name__}: {message} (docs/penalties.md, docs/fits.md; "
            "convexprune.solvers.testing checks the rest)"
        )
