"""What a fit is, and the package's own fits as a geometry h of the outputs and a measure m of h: a set, or a loss."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, as_radii, blocks_of, checked_positive, norm, working_dtype
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs.gram import Gram


class Fit(ABC):
    """A closed convex f on outputs Z [P, M], as solvers and the certificate see it (docs/fits.md has examples).

    ``sums`` and ``dual_terms`` add up over samples; given them, all else is one row at a time: blocks will do. What has
    a body here is that of a function around the targets that is finite everywhere.

    Attributes:
        Y: The targets [P, M].
    """

    Y: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """[P, M]."""
        return (self.Y.shape[0], self.Y.shape[1])

    @property
    def size(self) -> float:
        """‖Y‖_F."""
        return float(norm(self.Y))

    @property
    def scale(self) -> float:
        """The unit that distances are reported in: eps, or ‖Y‖_F where there is none (1 where that is 0)."""
        return self.size or 1.0

    @property
    def anchor(self) -> Tensor:
        """Outputs [P, M] to start from, which the conjugate is linear about."""
        return self.Y

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same fit with each of its [P, M] arrays replaced by ``change`` of it: a row slice, a dtype, a device."""
        arrays = {name: a for name, a in vars(self).items() if isinstance(a, Tensor) and a.shape == self.Y.shape}
        return self._with(**{name: change(array) for name, array in arrays.items()})

    def _with(self, **changes: object) -> Self:
        """A copy with some attributes changed, not checked again: solvers make one for each block of rows."""
        new = copy(self)
        vars(new).update(changes)
        return new

    @abstractmethod
    def rescaled(self, c: float) -> Self:
        """The same fit of c·Z, c > 0."""

    @abstractmethod
    def times(self, k: float) -> Self:
        """k·f, k > 0."""

    def sample(self, rows: slice | Tensor) -> Self:
        """The fit of some samples (a slice or int64 indices) that stand for all: its mean over samples stays."""
        part = self.map(lambda array: array[rows])
        return part.times(self.shape[0] / part.shape[0])

    @abstractmethod
    def sums(self, Z: Tensor) -> Tensor:
        """[K, M] sums over samples, in float64, from which ``value``, ``distance`` and ``prox_residual`` follow."""

    def value(self, sums: Tensor) -> float:  # noqa: ARG002 - an indicator
        """f(Z) without its indicator part."""
        return 0.0

    def distance(self, sums: Tensor) -> float:  # noqa: ARG002 - finite everywhere
        """The Frobenius distance of Z from the domain of f, in the units of Y."""
        return 0.0

    @abstractmethod
    def prox_residual(self, Z: Tensor, sums: Tensor, rho: float) -> Tensor:
        """Z − prox for rows Z, given the sums of all rows; with rho = ∞, allowed outside, Z minus its projection."""

    def prox(self, Z: Tensor, rho: float) -> Tensor:
        """argmin over V of f(V) + ½rho‖V − Z‖², by blocks of rows; for a set, the projection."""
        # Without temporaries of the size of Z: those, not the arithmetic, would take most of the time.
        parts = [(rows, self.map(lambda a, rows=rows: a[rows])) for rows in blocks_of(Z)]  # type: ignore[misc]
        sums = torch.stack([fit.sums(Z[rows]) for rows, fit in parts]).sum(0)
        V = torch.empty_like(Z)
        for rows, fit in parts:
            torch.sub(Z[rows], fit.prox_residual(Z[rows], sums, rho), out=V[rows])
        return V

    @abstractmethod
    def residual(self, Z: Tensor) -> Tensor:
        """A multiple of a subgradient of f at Z: the multipliers that Z itself suggests."""

    def project_dual(self, L: Tensor) -> Tensor:
        """The nearest multipliers at which the conjugate f* is finite; every bound is taken where this came last."""
        return L

    def unrestricted(self) -> Tensor:
        """[P, M]: the multipliers that may move both ways, which the certificate moves first where weights are free."""
        return torch.ones_like(self.Y, dtype=torch.bool)

    def dual_terms(self, L: Tensor) -> Tensor:
        """[K, M] sums over samples in float64 that give −f*(t∘Λ) for any t [M] ≥ 0: a = −⟨λ_m, anchor_m⟩, ‖λ_m‖²."""
        L = L.to(working_dtype(L.dtype))
        return torch.stack([-(L * self.anchor).sum(0), L.square().sum(0)]).to(torch.float64)

    @abstractmethod
    def best_scaling(self, terms: Tensor, cap: Tensor) -> Tensor:
        """t [M] in [0, cap] with a finite f*(t∘Λ), for which −f*(t∘Λ) is large; any such t is valid."""

    @abstractmethod
    def dual_value(self, terms: Tensor, t: Tensor) -> float:
        """−f*(t∘Λ)."""

    @abstractmethod
    def to_cvxpy(self, Z: Any) -> tuple[Any, list[Any]]:
        """(objective term, constraints) of f as cvxpy expressions of Z."""


@dataclass(frozen=True, eq=False)
class TargetFit(Fit):
    """f(Z) = m(h(Z)) where e(Z) = 0, ∞ elsewhere: a geometry (h, e) and a measure m of h.

    With p = Z − anchor, its negative part left out where multipliers are restricted: h is p on the entries that the
    measure has seen, e is p on the others. Subclasses say what anchor and the two masks are; here the fit is linear.
    """

    targets: InitVar[ArrayLike | Gram]
    Y: Tensor = field(init=False)
    gram: Gram | None = field(init=False, repr=False)  # what the targets were taken from
    linear: ClassVar[bool] = True  # whether products of inputs and targets say all of the fit

    def __post_init__(self, targets: ArrayLike | Gram) -> None:
        gram = targets if isinstance(targets, Gram) else None
        if gram is not None and not self.linear:
            why = f"a Gram keeps only what Ball and SquaredLoss ask for, found targets of {gram.samples} streamed"
            raise InvalidInput(f"{type(self).__name__} needs the samples themselves: {why} samples")
        Y = as_matrix("targets Y", targets.targets if isinstance(targets, Gram) else targets)
        vars(self).update(gram=gram, Y=Y)  # what is frozen has no other way

    @abstractmethod
    def as_loss(self, weight: float = 1.0) -> "LossFit":
        """½·weight·‖h‖² with the same geometry."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same fit with ``change`` applied to its [P, M] arrays, no longer those of a Gram."""
        return super().map(change)._with(gram=None)

    def _scaled(self, c: float) -> Self:
        """The geometry of c·Z."""
        return self.map(lambda array: array * c)

    def relaxed(self, by: float) -> Self:  # noqa: ARG002 - a loss has no set
        """A set that holds this one and no point farther from it than ``by``; a loss as it is."""
        return self

    def offset(self, Z: Tensor) -> Tensor:
        """p(Z), a new tensor."""
        return Z - self.anchor

    def seen(self) -> Tensor | None:
        """Of p what the measure sees: 1 or 0 for each entry in the dtype of the targets, a new tensor; None for all."""
        return None

    def sums(self, Z: Tensor) -> Tensor:
        """Columnwise ‖h‖² and ‖e‖²."""
        p, seen = self.offset(Z), self.seen()
        squares = p.to(working_dtype(p.dtype)).square_()  # those of numbers above 256 are infinite in float16
        if seen is None:
            s = squares.sum(0)
            return torch.stack([s, torch.zeros_like(s)]).to(torch.float64)
        h = squares * seen
        return torch.stack([h.sum(0), squares.sub_(h).sum(0)]).to(torch.float64)

    def prox_residual(self, Z: Tensor, sums: Tensor, rho: float) -> Tensor:
        """The measure's fraction of h, and all of e."""
        p, part, seen = self.offset(Z), self._prox_fraction(sums[0], rho).to(Z), self.seen()
        return p.mul_(part) if seen is None else p.mul_(torch.mul(seen, part - 1, out=seen).add_(1))

    def residual(self, Z: Tensor) -> Tensor:
        """h(Z)."""
        p, seen = self.offset(Z), self.seen()
        return p if seen is None else p.mul_(seen)

    def dual_terms(self, L: Tensor) -> Tensor:
        """a = −⟨λ_m, anchor_m⟩ and b² = ‖λ_m on what the measure sees‖²."""
        if (seen := self.seen()) is None:
            return super().dual_terms(L)
        L = L.to(working_dtype(L.dtype))
        return torch.stack([-(L * self.anchor).sum(0), L.square().mul_(seen).sum(0)]).to(torch.float64)

    @abstractmethod
    def _prox_fraction(self, s: Tensor, rho: float) -> Tensor:
        """[M] or scalar: the part of each column of h that the prox with penalty rho takes away."""

    def _cvxpy_part(self, Z: Any) -> tuple[Any, list[Any]]:
        """h [P, M], 0 on unseen entries, with slacks for the one-sided ones; and bounds for unseen ones."""
        import cvxpy as cp

        mask, free = self.seen(), self.unrestricted().expand(self.shape).cpu().numpy()
        seen = ((torch.ones_like(self.Y) if mask is None else mask.expand(self.shape)) > 0).cpu().numpy()
        p, one, bound = Z - self.anchor.double().expand(self.shape).cpu().numpy(), seen & ~free, ~seen & ~free
        h, constraints = cp.multiply(1.0 * (seen & free), p), []
        if one.any():
            # A slack in the place of the positive part, which cvxpy's rules do not accept inside a norm.
            slack = cp.Variable(self.shape, nonneg=True)
            h, constraints = h + cp.multiply(1.0 * one, slack), [slack[one] >= p[one]]
        return h, constraints + ([p[bound] <= 0] if bound.any() else [])


@dataclass(frozen=True, eq=False)
class SetFit(TargetFit):
    """The indicator of a set: h within one ball over the layer, or within a ball for each neuron.

    Args:
        targets: Y [P, M].
        eps: The radius in the units of Y, a number; or [M], one for each neuron.
    """

    eps: float | ArrayLike

    def __post_init__(self, targets: ArrayLike | Gram) -> None:
        super().__post_init__(targets)
        vars(self).update(eps=as_radii("eps", self.eps, self.Y))

    @property
    def radii(self) -> float | Tensor:
        """eps as a number, or [M] in float64 on the device of the targets, where ``map`` may have moved them."""
        return self.eps.to(self.Y.device) if isinstance(self.eps, Tensor) else cast(float, self.eps)

    @property
    def scale(self) -> float:
        """The length of all radii together, or ‖Y‖_F where that is 0 (1 where both are)."""
        return float(torch.linalg.vector_norm(torch.as_tensor(self.eps, dtype=torch.float64))) or super().scale

    def with_eps(self, eps: float | ArrayLike) -> Self:
        """The same set with another radius, or other radii [M]."""
        return self._with(eps=as_radii("eps", eps, self.Y))

    def relaxed(self, by: float) -> Self:
        """Radii that are larger by ``by``, in all."""
        return self._with(eps=self.radii + (by / len(self.radii) ** 0.5 if isinstance(self.radii, Tensor) else by))

    def rescaled(self, c: float) -> Self:
        """Targets and eps multiplied by c."""
        return self._scaled(c)._with(eps=self.radii * c)

    def times(self, k: float) -> Self:  # noqa: ARG002 - an indicator has no scale
        """Itself."""
        return self

    def sample(self, rows: slice | Tensor) -> Self:
        """The same root mean square over fewer samples."""
        part = self.map(lambda array: array[rows])
        return part._with(eps=self.radii * (part.shape[0] / self.shape[0]) ** 0.5)

    def _lengths(self, s: Tensor) -> Tensor:
        """‖h‖ of what each ball holds: of all columns together, or of each."""
        return (s if isinstance(self.eps, Tensor) else s.sum()).sqrt()

    def distance(self, sums: Tensor) -> float:
        """√(dist(h, balls)² + ‖e‖²)."""
        beyond = torch.linalg.vector_norm((self._lengths(sums[0]) - self.radii).clamp(min=0))
        return math.hypot(float(beyond), float(sums[1].sum().sqrt()))

    def _prox_fraction(self, s: Tensor, rho: float) -> Tensor:  # noqa: ARG002 - an indicator has no scale
        return (1 - self.radii / self._lengths(s).clamp(min=1e-300)).clamp(min=0)

    def best_scaling(self, terms: Tensor, cap: Tensor) -> Tensor:
        """The maximiser of Σ a_m t_m − eps·√Σ b_m² t_m² over 0 ≤ t ≤ cap; with a ball a neuron each term is linear."""
        a, b2 = terms
        if isinstance(self.radii, Tensor):
            return torch.where(a > self.radii * b2.sqrt(), cap, 0.0)
        return _best_in_ball(self.radii, a.clamp(min=0), b2, cap) if self.radii else torch.where(a > 0, cap, 0.0)

    def dual_value(self, terms: Tensor, t: Tensor) -> float:
        """Σ a_m t_m − eps·√Σ b_m² t_m², or Σ t_m (a_m − eps_m b_m)."""
        a, b2 = terms
        if isinstance(self.radii, Tensor):
            return float((t * (a - self.radii * b2.sqrt())).sum())
        return float((a * t).sum() - self.radii * (b2 * t.square()).sum().sqrt())

    def to_cvxpy(self, Z: Any) -> tuple[Any, list[Any]]:
        """A second-order cone a ball."""
        import cvxpy as cp

        h, constraints = self._cvxpy_part(Z)
        if isinstance(self.eps, Tensor):
            return 0.0, [*constraints, cp.norm(h, 2, axis=0) <= self.eps.cpu().numpy()]
        return 0.0, [*constraints, cp.norm(h, "fro") <= self.eps]


def _best_in_ball(eps: float, a: Tensor, b2: Tensor, cap: Tensor) -> Tensor:
    """The t [M] with t_m = min(S a_m/(eps b_m²), cap_m) and S = ‖t∘b‖, exact up to rounding.

    Columns reach their cap in the order of eps b_m² cap_m/a_m, so S follows from their number; the best one is taken.
    """
    reach = torch.where(a > 0, eps * b2 * cap / a, torch.inf)
    order = reach.argsort()
    a, b2, top, reach = a[order], b2[order], cap[order], reach[order]
    # Columns that reach S at once (no ball term) are at their cap whatever S is.
    slope = torch.where(b2 > 0, a.square() / b2.clamp(min=1e-300), 0.0) / eps**2
    capped = torch.cumsum(top.square() * b2, 0)
    rest = 1 - (slope.sum() - torch.cumsum(slope, 0))
    S = torch.where(rest > 0, (capped / rest.clamp(min=1e-300)).sqrt(), torch.inf)
    following = torch.cat([reach[1:], reach.new_tensor([torch.inf])])
    consistent = (S >= reach * (1 - 1e-9)) & (S <= following * (1 + 1e-9)) & (a > 0)
    if not bool(consistent.any()):
        return torch.zeros_like(cap)
    best = S[consistent].min()
    t = torch.where(reach <= best, top, best * a / (eps * b2).clamp(min=1e-300))
    return torch.zeros_like(cap).scatter(0, order, torch.where(a > 0, torch.minimum(t, top), 0.0))


@dataclass(frozen=True, eq=False)
class LossFit(TargetFit):
    """½·weight·‖h‖²; the weight [1/units of Y²] says what a unit of squared distance costs beside the penalty.

    Args:
        targets: Y [P, M].
        weight: A number > 0.
    """

    weight: float = 1.0

    def __post_init__(self, targets: ArrayLike | Gram) -> None:
        super().__post_init__(targets)
        vars(self).update(weight=checked_positive("weight", self.weight))

    def rescaled(self, c: float) -> Self:
        """Targets multiplied by c, the weight divided by c²."""
        return self._scaled(c).times(1 / c / c)

    def times(self, k: float) -> Self:
        """The weight multiplied by k."""
        return self._with(weight=checked_positive("weight", self.weight * k))

    def value(self, sums: Tensor) -> float:
        """½·weight·Σ ‖h_m‖²."""
        return 0.5 * self.weight * float(sums[0].sum())

    def distance(self, sums: Tensor) -> float:
        """‖e‖: no h is out of reach of a loss."""
        return float(sums[1].sum().sqrt())

    def _prox_fraction(self, s: Tensor, rho: float) -> Tensor:
        return s.new_tensor(self.weight / (self.weight + rho))

    def best_scaling(self, terms: Tensor, cap: Tensor) -> Tensor:
        """The top of a parabola a column: min(weight·a_m/b_m², cap_m)."""
        return torch.minimum(self.weight * terms[0].clamp(min=0) / terms[1].clamp(min=1e-300), cap)

    def dual_value(self, terms: Tensor, t: Tensor) -> float:
        """Σ a_m t_m − b_m² t_m²/(2 weight)."""
        return float((terms[0] * t - terms[1] * t.square() / (2 * self.weight)).sum())

    def to_cvxpy(self, Z: Any) -> tuple[Any, list[Any]]:
        """A sum of squares."""
        import cvxpy as cp

        h, constraints = self._cvxpy_part(Z)
        return 0.5 * self.weight * cp.sum_squares(h), constraints
