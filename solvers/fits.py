"""Fits f(Z): what the layer's outputs Z = X U must keep."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from convexprune.solvers.arrays import (
    ArrayLike,
    as_matrix,
    as_number,
    check_finite,
    check_shape,
    checked_radius,
    norm,
    working_dtype,
)
from convexprune.solvers.errors import InvalidInput

__all__ = ["Ball", "Fit", "NetTrimSet", "ReluBall"]

_BLOCK_ENTRIES = 2**20  # of an array that a projection handles at a time


@runtime_checkable
class Fit(Protocol):
    """A closed convex f on outputs Z [P, M], as solvers and the certificate see it.

    ``squares`` and ``dual_terms`` are sums over samples, so that the certificate can walk through them in blocks.
    """

    @property
    def Y(self) -> Tensor:
        """The targets [P, M]."""

    @property
    def shape(self) -> tuple[int, int]:
        """[P, M]."""

    @property
    def scale(self) -> float:
        """The unit that distances are reported in: eps, or ‖Y‖_F where eps = 0."""

    @property
    def size(self) -> float:
        """‖Y‖_F."""

    @property
    def anchor(self) -> Tensor:
        """Outputs [P, M] that the fit is about: a point to start from."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same fit with each of its [P, M] arrays replaced by ``change`` of it: a row slice, a dtype, a device."""

    def rescaled(self, c: float) -> Self:
        """The same fit of c·Z, c > 0."""

    def prox(self, Z: Tensor, rho: float) -> Tensor:
        """argmin over V of f(V) + ½rho‖V − Z‖²; for a set, the projection."""

    def squares(self, Z: Tensor) -> Tensor:
        """[K, M] sums over samples from which ``distance`` is computed."""

    def distance(self, squares: Tensor) -> float:
        """The Frobenius distance of Z from the set, in the units of Y."""

    def residual(self, Z: Tensor) -> Tensor:
        """A multiple of a subgradient of f at a boundary point Z: the multipliers that Z itself suggests."""

    def curb(self, L: Tensor) -> Tensor:
        """The nearest multipliers at which the conjugate f* is finite."""

    def unrestricted(self) -> Tensor:
        """[P, M]: where a multiplier may take either sign."""

    def dual_terms(self, L: Tensor) -> Tensor:
        """[2, M] sums over samples, a and b², from which −f*(t∘Λ) is computed for any t [M] ≥ 0."""

    def best_scaling(self, terms: Tensor, cap: Tensor) -> Tensor:
        """t [M] in [0, cap] maximising −f*(t∘Λ)."""

    def dual_value(self, terms: Tensor, t: Tensor) -> float:
        """−f*(t∘Λ)."""

    def to_cvxpy(self, Z: Any) -> tuple[Any, list[Any]]:
        """(objective term, constraints) of f as cvxpy expressions of Z."""


@dataclass(frozen=True, eq=False)
class _BallFit(ABC):
    """{Z : ‖h(Z)‖_F ≤ eps and e(Z) = 0}: one ball over the whole layer, with one-sided bounds beside it.

    h is ``residual``, e is ``excess``; the support function is ⟨Λ, anchor⟩ + eps·‖Λ on the ball's entries‖_F.
    """

    targets: ArrayLike
    eps: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", as_matrix("targets Y", self.targets))
        object.__setattr__(self, "eps", checked_radius("eps", self.eps))

    @property
    def Y(self) -> Tensor:
        """The targets as a tensor [P, M]."""
        assert isinstance(self.targets, Tensor)  # noqa: S101 - __post_init__ made it one
        return self.targets

    @property
    def shape(self) -> tuple[int, int]:
        """[P, M]."""
        return (self.Y.shape[0], self.Y.shape[1])

    @property
    def scale(self) -> float:
        """eps, or ‖Y‖_F where eps = 0 (1 where both are)."""
        return self.eps or self.size or 1.0

    @property
    def size(self) -> float:
        """‖Y‖_F."""
        return float(norm(self.Y.to(working_dtype(self.Y.dtype))))

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same fit with ``change`` applied to its targets."""
        return self._with(targets=change(self.Y))

    def rescaled(self, c: float) -> Self:
        """Targets and eps multiplied by c."""
        return self.map(lambda array: array * c)._with(eps=self.eps * c)

    def _with(self, **changes: object) -> Self:
        """A copy with some fields changed, not checked again: the certificate makes one for each block of rows."""
        new = copy(self)
        for name, value in changes.items():
            object.__setattr__(new, name, value)
        return new

    @abstractmethod
    def residual(self, Z: Tensor) -> Tensor:
        """h(Z)."""

    def excess(self, Z: Tensor) -> Tensor | None:  # noqa: ARG002 - none unless a subclass has bounds
        """e(Z), or None where the set has no bounds beside the ball."""
        return None

    @property
    def anchor(self) -> Tensor:
        """The point [P, M] that the support function is linear about."""
        return self.Y

    def on_ball(self, L: Tensor) -> Tensor:
        """The multipliers of the entries that the ball sees, zero elsewhere."""
        return L

    def prox(self, Z: Tensor, rho: float) -> Tensor:  # noqa: ARG002 - an indicator has no scale
        """Projection: h shrinks to length eps, e to 0."""
        # By blocks of rows and without fresh temporaries: those, not the arithmetic, would take most of the time.
        rows = min(len(Z), max(1, _BLOCK_ENTRIES // Z.shape[1]))
        V, scratch = torch.empty_like(Z), Z.new_empty(rows, Z.shape[1])
        parts = [slice(first, first + rows) for first in range(0, len(Z), rows)]
        fits = [self.map(lambda array, part=part: array[part]) for part in parts]  # type: ignore[misc]
        lengths = [norm(fit.residual_(Z[part], V[part], scratch)) for fit, part in zip(fits, parts, strict=True)]
        length = torch.linalg.vector_norm(torch.stack(lengths))
        shrink = (1 - self.eps / length.clamp(min=1e-300)).clamp(min=0).to(Z)
        torch.addcmul(Z, V, shrink, value=-1, out=V)
        for fit, part in zip(fits, parts, strict=True):
            e = fit.excess(Z[part])
            if e is not None:
                V[part] -= e
        return V

    def residual_(self, Z: Tensor, out: Tensor, scratch: Tensor) -> Tensor:  # noqa: ARG002
        """h(Z), written to ``out``; ``scratch`` has at least as many rows and may be overwritten."""
        return out.copy_(self.residual(Z))

    def squares(self, Z: Tensor) -> Tensor:
        """Columnwise ‖h‖² and ‖e‖²."""
        h, e = self.residual(Z).square().sum(0), self.excess(Z)
        return torch.stack([h, torch.zeros_like(h) if e is None else e.square().sum(0)])

    def distance(self, squares: Tensor) -> float:
        """√((‖h‖ − eps)₊² + ‖e‖²)."""
        outside = max(0.0, float(squares[0].sum().sqrt()) - self.eps)
        return float((outside**2 + squares[1].sum()).sqrt())

    def curb(self, L: Tensor) -> Tensor:
        """Λ itself: every sign is allowed."""
        return L

    def unrestricted(self) -> Tensor:
        """Everywhere."""
        return torch.ones_like(self.Y, dtype=torch.bool)

    def dual_terms(self, L: Tensor) -> Tensor:
        """a = −⟨λ_m, anchor_m⟩ and b² = ‖λ_m on the ball‖²."""
        return torch.stack([-(L * self.anchor).sum(0), self.on_ball(L).square().sum(0)])

    def best_scaling(self, terms: Tensor, cap: Tensor) -> Tensor:
        """The maximiser of Σ a_m t_m − eps·√Σ b_m² t_m² over 0 ≤ t ≤ cap, exact up to rounding.

        It satisfies t_m = min(S a_m/(eps b_m²), cap_m) with S = ‖t∘b‖. Columns reach their cap in the order of
        S_m = eps b_m² cap_m/a_m, so S follows from the number k of columns at their cap; the best k is taken.
        """
        if self.eps == 0:
            return torch.where(terms[0] > 0, cap, 0.0)
        a, b2 = terms[0].clamp(min=0), terms[1]
        reach = torch.where(a > 0, self.eps * b2 * cap / a, torch.inf)
        order = reach.argsort()
        a, b2, top, reach = a[order], b2[order], cap[order], reach[order]
        # Columns that reach S at once (no ball term) are at their cap whatever S is.
        slope = torch.where(b2 > 0, a.square() / b2.clamp(min=1e-300), 0.0) / self.eps**2
        capped = torch.cumsum(top.square() * b2, 0)
        rest = 1 - (slope.sum() - torch.cumsum(slope, 0))
        S = torch.where(rest > 0, (capped / rest.clamp(min=1e-300)).sqrt(), torch.inf)
        following = torch.cat([reach[1:], reach.new_tensor([torch.inf])])
        consistent = (S >= reach * (1 - 1e-9)) & (S <= following * (1 + 1e-9)) & (a > 0)
        if not bool(consistent.any()):
            return torch.zeros_like(cap)
        best = S[consistent].min()
        t = torch.where(reach <= best, top, best * a / (self.eps * b2).clamp(min=1e-300))
        t = torch.where(a > 0, torch.minimum(t, top), 0.0)
        return torch.zeros_like(cap).scatter(0, order, t)

    def dual_value(self, terms: Tensor, t: Tensor) -> float:
        """Σ a_m t_m − eps·√Σ b_m² t_m²."""
        return float((terms[0] * t).sum() - self.eps * (terms[1] * t.square()).sum().sqrt())

    def to_cvxpy(self, Z: Any) -> tuple[Any, list[Any]]:
        """The set as cvxpy constraints on Z."""
        import cvxpy as cp

        on, Y = self._cvxpy_masks(), self.Y.double().cpu().numpy()
        parts: list[Any] = []
        constraints: list[Any] = []
        if on.any():
            parts.append(Z[on] - Y[on])
        if not on.all():
            part, constraints = self._off_cvxpy(Z[~on], ~on)
            parts.extend(part)
        ball = [cp.norm(cp.hstack(parts), 2) <= self.eps] if parts else []
        return 0.0, ball + constraints

    def _cvxpy_masks(self) -> Any:
        return self.unrestricted().cpu().numpy()

    def _off_cvxpy(self, Z: Any, off: Any) -> tuple[list[Any], list[Any]]:  # noqa: ARG002
        return [], []


@dataclass(frozen=True, eq=False)
class Ball(_BallFit):
    """{Z : ‖Z − Y‖_F ≤ eps}: a linear layer, logits, or any Lipschitz activation.

    Args:
        targets: Y [P, M].
        eps: The radius, in the units of Y.
    """

    def residual(self, Z: Tensor) -> Tensor:
        """Z − Y."""
        return Z - self.Y


class _ReluFit(_BallFit):
    """What the two fits in front of a ReLU share: Ω = {Y > 0}, and Λ ≥ 0 on its complement Ωᶜ."""

    def curb(self, L: Tensor) -> Tensor:
        """Λ clipped to ≥ 0 on Ωᶜ."""
        return torch.where(self.Y > 0, L, L.clamp(min=0))

    def unrestricted(self) -> Tensor:
        """Ω."""
        return self.Y > 0


@dataclass(frozen=True, eq=False)
class ReluBall(_ReluFit):
    """{Z : ‖h(Z)‖_F ≤ eps}, h = Z − Y on Ω = {Y > 0} and Z₊ elsewhere.

    Every Z in it has ‖ReLU(Z) − Y‖_F ≤ eps for Y ≥ 0, and it contains the Net-Trim set of the same Y and eps with
    ceiling 0 (docs/program.md). Entries Y ≤ 0 all mean an inactive output.

    Args:
        targets: Y [P, M], the outputs after the ReLU.
        eps: The radius, in the units of Y.
    """

    def residual(self, Z: Tensor) -> Tensor:
        """h(Z)."""
        return torch.where(self.Y > 0, Z - self.Y, Z.clamp(min=0))

    def residual_(self, Z: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
        """h = max(Z − Y₊, floor), floor 0 where Y ≤ 0 and very low elsewhere: 6 times as fast as ``where`` on a CPU."""
        floor = torch.clamp(self.Y, min=0, out=scratch[: len(Z)])
        torch.sub(Z, floor, out=out)
        return torch.maximum(out, floor.mul_(-torch.finfo(out.dtype).max), out=out)

    @property
    def anchor(self) -> Tensor:
        """Y on Ω, 0 elsewhere."""
        return self.Y.clamp(min=0)

    def _off_cvxpy(self, Z: Any, off: Any) -> tuple[list[Any], list[Any]]:  # noqa: ARG002
        import cvxpy as cp

        # A slack in the place of Z₊, which cvxpy's rules do not accept inside a norm beside affine parts.
        slack = cp.Variable(Z.shape, nonneg=True)
        return [slack], [slack >= Z]


@dataclass(frozen=True, eq=False)
class NetTrimSet(_ReluFit):
    """{Z : ‖(Z − Y)_Ω‖_F ≤ eps and Z ≤ V on Ωᶜ} (Aghasi et al. 2017, 2020), Ω = {Y > 0}.

    Args:
        targets: Y [P, M], the outputs after the ReLU.
        eps: The radius, in the units of Y.
        ceiling: V, a number or [P, M]; only its entries on Ωᶜ matter.
    """

    ceiling: ArrayLike | float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.ceiling, Real) or getattr(self.ceiling, "ndim", None) == 0:
            number = as_number("ceiling V", self.ceiling)
            check_finite("ceiling V", torch.tensor(number))
            object.__setattr__(self, "ceiling", number)
            return
        matrix = as_matrix("ceiling V", self.ceiling)  # type: ignore[arg-type]  # mypy does not see that Real holds float
        ceiling = check_shape("ceiling V", matrix, self.shape, "that of the targets")
        if ceiling.device != self.Y.device:
            raise InvalidInput(f"ceiling V: expected the targets' device {self.Y.device}, found {ceiling.device}")
        object.__setattr__(self, "ceiling", ceiling)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same fit with ``change`` applied to its targets and its ceiling."""
        ceiling = change(self.ceiling) if isinstance(self.ceiling, Tensor) else self.ceiling
        return self._with(targets=change(self.Y), ceiling=ceiling)

    def rescaled(self, c: float) -> Self:
        """Targets, eps and ceiling multiplied by c."""
        scaled = super().rescaled(c)
        return scaled if isinstance(self.ceiling, Tensor) else scaled._with(ceiling=float(self.ceiling) * c)

    @property
    def V(self) -> Tensor:
        """The ceiling as a tensor that broadcasts to [P, M]."""
        return torch.as_tensor(self.ceiling, dtype=self.Y.dtype, device=self.Y.device)

    def residual(self, Z: Tensor) -> Tensor:
        """(Z − Y)_Ω."""
        return torch.where(self.Y > 0, Z - self.Y, 0.0)

    def excess(self, Z: Tensor) -> Tensor:
        """(Z − V)₊ on Ωᶜ."""
        return torch.where(self.Y > 0, 0.0, (Z - self.V).clamp(min=0))

    @property
    def anchor(self) -> Tensor:
        """Y on Ω, V elsewhere."""
        return torch.where(self.Y > 0, self.Y, self.V)

    def on_ball(self, L: Tensor) -> Tensor:
        """Λ on Ω."""
        return torch.where(self.Y > 0, L, 0.0)

    def _off_cvxpy(self, Z: Any, off: Any) -> tuple[list[Any], list[Any]]:
        V = self.V.double().expand(self.shape).cpu().numpy()
        return [], [Z <= V[off]]
