"""What a fit is, and the family of the package's own fits: a geometry h of the outputs, and a measure of h."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, as_radii, blocks_of, checked_positive, norm, working_dtype
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs.fits.measures import HalfSquare, LayerBall, Measure, NeuronBalls
from convexprune.solvers.programs.gram import Gram


@runtime_checkable
class Fit(Protocol):
    """A closed convex f on outputs Z [P, M], as solvers and the certificate see it (docs/fits.md has examples).

    ``sums`` and ``dual_terms`` are sums over samples, and given them everything else is one row at a time: so solvers
    and the certificate can walk through the samples in blocks.
    """

    @property
    def Y(self) -> Tensor:
        """The targets [P, M]."""

    @property
    def shape(self) -> tuple[int, int]:
        """[P, M]."""

    @property
    def scale(self) -> float:
        """The unit that distances are reported in: eps, or ‖Y‖_F where there is none."""

    @property
    def size(self) -> float:
        """‖Y‖_F."""

    @property
    def anchor(self) -> Tensor:
        """Outputs [P, M] to start from."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same fit with each of its [P, M] arrays replaced by ``change`` of it: a row slice, a dtype, a device."""

    def rescaled(self, c: float) -> Self:
        """The same fit of c·Z, c > 0."""

    def times(self, k: float) -> Self:
        """k·f, k > 0."""

    def sample(self, rows: slice | Tensor) -> Self:
        """The fit of some samples (a slice or int64 indices) that stand for all: its mean over samples stays."""

    def sums(self, Z: Tensor) -> Tensor:
        """[K, M] sums over samples, in float64, from which ``value``, ``distance`` and ``prox_residual`` follow."""

    def value(self, sums: Tensor) -> float:
        """f(Z) without its indicator part."""

    def distance(self, sums: Tensor) -> float:
        """The Frobenius distance of Z from the domain of f, in the units of Y."""

    def prox_residual(self, Z: Tensor, sums: Tensor, rho: float) -> Tensor:
        """Z − prox for rows Z, given the sums of all rows; with rho = ∞, allowed outside, Z minus its projection."""

    def prox(self, Z: Tensor, rho: float) -> Tensor:
        """argmin over V of f(V) + ½rho‖V − Z‖²; for a set, the projection."""

    def residual(self, Z: Tensor) -> Tensor:
        """A multiple of a subgradient of f at Z: the multipliers that Z itself suggests."""

    def project_dual(self, L: Tensor) -> Tensor:
        """The nearest multipliers at which the conjugate f* is finite; every bound is taken where this came last."""

    def unrestricted(self) -> Tensor:
        """[P, M]: the multipliers that may move both ways, which the certificate moves first where weights are free."""

    def dual_terms(self, L: Tensor) -> Tensor:
        """[K, M] sums over samples in float64 that give −f*(t∘Λ) for any t [M] ≥ 0; the first is −⟨λ_m, anchor_m⟩."""

    def best_scaling(self, terms: Tensor, cap: Tensor) -> Tensor:
        """t [M] in [0, cap] with a finite f*(t∘Λ), for which −f*(t∘Λ) is large; any such t is valid."""

    def dual_value(self, terms: Tensor, t: Tensor) -> float:
        """−f*(t∘Λ)."""

    def to_cvxpy(self, Z: Any) -> tuple[Any, list[Any]]:
        """(objective term, constraints) of f as cvxpy expressions of Z."""


@dataclass(frozen=True, eq=False)
class TargetFit(ABC):
    """f(Z) = m(h(Z)) where e(Z) = 0, ∞ elsewhere: a geometry (h, e) and a measure m of h.

    With p = Z − anchor, its negative part left out where multipliers are restricted: h is p on the entries that the
    measure has seen, e is p on the others. Subclasses say what anchor, p and the two masks are.
    """

    targets: ArrayLike | Gram
    gram: Gram | None = field(init=False, repr=False)  # what the targets were taken from

    def __post_init__(self) -> None:
        gram = self.targets if isinstance(self.targets, Gram) else None
        targets = self._gram_targets(gram) if gram is not None else self.targets
        object.__setattr__(self, "gram", gram)
        object.__setattr__(self, "targets", as_matrix("targets Y", targets))  # type: ignore[arg-type]

    def _gram_targets(self, gram: Gram) -> Tensor:
        raise InvalidInput(
            f"{type(self).__name__} needs the samples themselves: a Gram keeps only what Ball and SquaredLoss ask for, "
            f"found targets of {gram.samples} streamed samples"
        )

    @property
    @abstractmethod
    def measure(self) -> Measure:
        """m."""

    @abstractmethod
    def as_loss(self, weight: float = 1.0) -> "LossFit":
        """½·weight·‖h‖² with the same geometry."""

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
        """The measure's unit, or ‖Y‖_F where that is 0 (1 where both are)."""
        return self.measure.unit or self.size or 1.0

    @property
    def size(self) -> float:
        """‖Y‖_F."""
        return float(norm(self.Y))

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same fit with ``change`` applied to its targets."""
        return self._with(targets=change(self.Y), gram=None)

    def _with(self, **changes: object) -> Self:
        """A copy with some fields changed, not checked again: solvers make one for each block of rows."""
        new = copy(self)
        for name, value in changes.items():
            object.__setattr__(new, name, value)
        return new

    def _scaled(self, c: float) -> Self:
        """The geometry of c·Z."""
        return self.map(lambda array: array * c)

    def relaxed(self, by: float) -> Self:  # noqa: ARG002 - a loss has no set
        """A set that holds this one and no point farther from it than ``by``; a loss as it is."""
        return self

    @property
    def anchor(self) -> Tensor:
        """The point [P, M] that the conjugate is linear about."""
        return self.Y

    @abstractmethod
    def offset(self, Z: Tensor) -> Tensor:
        """p(Z), a new tensor."""

    def seen(self) -> Tensor | None:
        """Of p what the measure sees: 1 or 0 for each entry in the dtype of the targets, a new tensor; None for all."""
        return None

    def unrestricted(self) -> Tensor:
        """Everywhere."""
        return torch.ones_like(self.Y, dtype=torch.bool)

    def sums(self, Z: Tensor) -> Tensor:
        """Columnwise ‖h‖² and ‖e‖²."""
        squares, seen = _single(self.offset(Z)).square_(), self.seen()
        if seen is None:
            s = squares.sum(0)
            return torch.stack([s, torch.zeros_like(s)]).to(torch.float64)
        h = squares * seen
        return torch.stack([h.sum(0), squares.sub_(h).sum(0)]).to(torch.float64)

    def value(self, sums: Tensor) -> float:
        """m(h)."""
        return self.measure.value(sums[0])

    def distance(self, sums: Tensor) -> float:
        """√(dist(h, domain of m)² + ‖e‖²)."""
        return math.hypot(self.measure.distance(sums[0]), float(sums[1].sum().sqrt()))

    def prox_residual(self, Z: Tensor, sums: Tensor, rho: float) -> Tensor:
        """The measure's fraction of h, and all of e."""
        p, part, seen = self.offset(Z), self.measure.prox_fraction(sums[0], rho).to(Z), self.seen()
        return p.mul_(part) if seen is None else p.mul_(torch.mul(seen, part - 1, out=seen).add_(1))

    def prox(self, Z: Tensor, rho: float) -> Tensor:
        """Z − prox_residual, by blocks of rows."""
        # Without temporaries of the size of Z: those, not the arithmetic, would take most of the time.
        parts = [(self.map(lambda a, rows=rows: a[rows]), Z[rows]) for rows in blocks_of(Z)]  # type: ignore[misc]
        sums = torch.stack([fit.sums(z) for fit, z in parts]).sum(0)
        V = torch.empty_like(Z)
        for (fit, z), rows in zip(parts, blocks_of(Z), strict=True):
            torch.sub(z, fit.prox_residual(z, sums, rho), out=V[rows])
        return V

    def residual(self, Z: Tensor) -> Tensor:
        """h(Z)."""
        p, seen = self.offset(Z), self.seen()
        return p if seen is None else p.mul_(seen)

    def project_dual(self, L: Tensor) -> Tensor:
        """Λ itself: every sign is allowed."""
        return L

    def dual_terms(self, L: Tensor) -> Tensor:
        """a = −⟨λ_m, anchor_m⟩ and b² = ‖λ_m on what the measure sees‖²."""
        L, seen = _single(L), self.seen()
        squares = L.square() if seen is None else L.square().mul_(seen)
        return torch.stack([-(L * self.anchor).sum(0), squares.sum(0)]).to(torch.float64)

    def best_scaling(self, terms: Tensor, cap: Tensor) -> Tensor:
        """The measure's."""
        return self.measure.best_scaling(terms[0], terms[1], cap)

    def dual_value(self, terms: Tensor, t: Tensor) -> float:
        """Σ a_m t_m − m*(t∘Λ)."""
        return self.measure.dual_value(terms[0], terms[1], t)

    def to_cvxpy(self, Z: Any) -> tuple[Any, list[Any]]:
        """f as cvxpy sees it: the measure of each neuron's entries, slacks for one-sided, bounds for unseen ones."""
        import cvxpy as cp

        anchor, free = self.anchor.double().expand(self.shape).cpu().numpy(), self.unrestricted().cpu().numpy()
        mask = self.seen()
        seen = ((torch.ones_like(self.Y) if mask is None else mask.expand(self.shape)) > 0).cpu().numpy()
        columns, constraints = [], []
        for m in range(self.shape[1]):
            two, one, bound = free[:, m] & seen[:, m], ~free[:, m] & seen[:, m], ~free[:, m] & ~seen[:, m]
            h = [Z[two, m] - anchor[two, m]] if two.any() else []
            if one.any():
                # A slack in the place of the positive part, which cvxpy's rules do not accept inside a norm.
                h.append(cp.Variable(int(one.sum()), nonneg=True))
                constraints.append(h[-1] >= Z[one, m] - anchor[one, m])
            if bound.any():
                constraints.append(Z[bound, m] <= anchor[bound, m])
            columns.append(cp.hstack(h) if h else None)
        objective, more = self.measure.to_cvxpy(columns)
        return objective, constraints + more


@dataclass(frozen=True, eq=False)
class SetFit(TargetFit, ABC):
    """The indicator of a set: h within one ball over the layer, or within a ball for each neuron.

    Args:
        targets: Y [P, M].
        eps: The radius in the units of Y, a number; or [M], one for each neuron.
    """

    eps: float | ArrayLike

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "eps", as_radii("eps", self.eps, self.Y))

    @property
    def measure(self) -> Measure:
        """The ball, or balls."""
        # ``map`` may have moved the targets to another device.
        return NeuronBalls(self.eps.to(self.Y.device)) if isinstance(self.eps, Tensor) else LayerBall(self.eps)  # type: ignore[arg-type]

    def with_eps(self, eps: float | ArrayLike) -> Self:
        """The same set with another radius, or other radii [M]."""
        return self._with(eps=as_radii("eps", eps, self.Y))

    def relaxed(self, by: float) -> Self:
        """Radii that are larger by ``by``, in all."""
        each = by / len(self.eps) ** 0.5 if isinstance(self.eps, Tensor) else by
        return self._with(eps=self.eps + each)  # type: ignore[operator]

    def rescaled(self, c: float) -> Self:
        """Targets and eps multiplied by c."""
        return self._scaled(c)._with(eps=self.eps * c)  # type: ignore[operator]

    def times(self, k: float) -> Self:  # noqa: ARG002 - an indicator has no scale
        """Itself."""
        return self

    def sample(self, rows: slice | Tensor) -> Self:
        """The same root mean square over fewer samples."""
        part = self.map(lambda array: array[rows])
        return part._with(eps=self.eps * (part.shape[0] / self.shape[0]) ** 0.5)


@dataclass(frozen=True, eq=False)
class LossFit(TargetFit, ABC):
    """½·weight·‖h‖²; the weight [1/units of Y²] says what a unit of squared distance costs beside the penalty.

    Args:
        targets: Y [P, M].
        weight: A number > 0.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weight", checked_positive("weight", self.weight))

    @property
    def measure(self) -> Measure:
        """Half the weighted sum of squares."""
        return HalfSquare(self.weight)

    def rescaled(self, c: float) -> Self:
        """Targets multiplied by c, the weight divided by c²."""
        return self._scaled(c).times(1 / c / c)

    def sample(self, rows: slice | Tensor) -> Self:
        """The same mean over fewer samples: the weight grows as they become fewer."""
        part = self.map(lambda array: array[rows])
        return part.times(self.shape[0] / part.shape[0])

    def times(self, k: float) -> Self:
        """The weight multiplied by k."""
        return self._with(weight=checked_positive("weight", self.weight * k))


def _single(A: Tensor) -> Tensor:
    """A, in float32 if its own precision is lower: squares of numbers above 256 are infinite in float16."""
    return A.to(working_dtype(A.dtype))
