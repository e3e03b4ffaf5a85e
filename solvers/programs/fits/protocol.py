"""What a fit is."""

from collections.abc import Callable
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor


@runtime_checkable
class Fit(Protocol):
    """A closed convex f on outputs Z [P, M], as solvers and the certificate see it.

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
        """Outputs [P, M] that the fit is about: a point to start from."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same fit with each of its [P, M] arrays replaced by ``change`` of it: a row slice, a dtype, a device."""

    def rescaled(self, c: float) -> Self:
        """The same fit of c·Z, c > 0."""

    def times(self, k: float) -> Self:
        """k·f, k > 0."""

    def sample(self, rows: slice | Tensor) -> Self:
        """The fit of some samples that stand for all: what f asks of each of them on average stays.

        ``rows`` are a slice or int64 indices, whatever indexes the first axis of the [P, M] arrays.
        """

    def sums(self, Z: Tensor) -> Tensor:
        """[K, M] sums over samples, in float64, from which ``value``, ``distance`` and ``pull`` follow."""

    def value(self, sums: Tensor) -> float:
        """f(Z) without its indicator part."""

    def distance(self, sums: Tensor) -> float:
        """The Frobenius distance of Z from the domain of f, in the units of Y."""

    def pull(self, Z: Tensor, sums: Tensor, rho: float) -> Tensor:
        """Z − prox: what the prox takes away from rows Z of outputs whose sums, over all samples, are these.

        Where the distance is > 0 rho may be infinite: what the projection on the domain of f takes away.
        """

    def prox(self, Z: Tensor, rho: float) -> Tensor:
        """argmin over V of f(V) + ½rho‖V − Z‖²; for a set, the projection."""

    def residual(self, Z: Tensor) -> Tensor:
        """A multiple of a subgradient of f at Z: the multipliers that Z itself suggests."""

    def curb(self, L: Tensor) -> Tensor:
        """The nearest multipliers at which the conjugate f* is finite; every bound is taken where this came last."""

    def unrestricted(self) -> Tensor:
        """[P, M]: the multipliers that the certificate moves first, both ways, to make free weights dual feasible.

        Those with room on both sides, say where either sign is allowed. It curbs again after it has moved them, so a
        bound holds whatever the mask; a poor one only makes it a loose bound.
        """

    def dual_terms(self, L: Tensor) -> Tensor:
        """[K, M] sums over samples in float64, from which −f*(t∘Λ) follows for any t [M] ≥ 0.

        The first row is a = −⟨λ_m, anchor_m⟩, which counts in it as Σ a_m t_m; ours have ‖λ_m‖² as the second.
        """

    def best_scaling(self, terms: Tensor, cap: Tensor) -> Tensor:
        """t [M] in [0, cap] with a finite f*(t∘Λ), maximising −f*(t∘Λ) as far as is easy; any such t is valid."""

    def dual_value(self, terms: Tensor, t: Tensor) -> float:
        """−f*(t∘Λ)."""

    def to_cvxpy(self, Z: Any) -> tuple[Any, list[Any]]:
        """(objective term, constraints) of f as cvxpy expressions of Z."""
