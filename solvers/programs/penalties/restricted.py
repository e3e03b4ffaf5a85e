"""Any penalty on a given support: what is zero stays zero."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs.penalties.base import Penalty, is_homogeneous
from convexprune.solvers.programs.penalties.sparse import check_support


@dataclass(frozen=True, eq=False)
class Restricted:
    """g(U) where U vanishes off a support S [N, M], and infinity elsewhere.

    For a g that does not grow when entries are set to 0, as L1 and GroupL2 do not. Then, S∘U denoting U with zeros off
    the support, prox(V) = prox_g(S∘V) and (g + indicator)*(A) = g*(S∘A): for any U, g(S∘U) ≤ g(U), while ⟨S∘A, U⟩ and
    the distance of S∘U from S∘V are those of U, or less. Off the support a dual point is not bound by anything.

    Args:
        penalty: g, convex.
        support: S, boolean; the only entries that may be nonzero.

    Raises:
        InvalidInput: g is not convex (the budgets have a ``within`` of their own), or the support is not boolean.
    """

    penalty: Penalty
    support: Tensor

    def __post_init__(self) -> None:
        if not self.penalty.convex:
            raise InvalidInput(f"penalty: expected a convex one, found {self.penalty}; give it within=support instead")
        check_support("support", self.support)

    @property
    def convex(self) -> bool:
        """True."""
        return True

    @property
    def homogeneous(self) -> bool:
        """Whether g is."""
        return is_homogeneous(self.penalty)

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ShapeMismatch unless the support is [N, M], and as g."""
        check_support("support", self.support, shape)
        self.penalty.check(shape)

    def to(self, like: Tensor) -> Self:
        """The same penalty on the device and in the dtype of ``like``."""
        return type(self)(self.penalty.to(like), self.support.to(like.device))

    def rescaled(self, d: Tensor) -> Self:
        """That of V = diag(d) U, which has the same support."""
        return type(self)(self.penalty.rescaled(d), self.support)

    def times(self, k: float) -> Self:
        """k·g on the support."""
        plain: Any = self.penalty
        return type(self)(plain.times(k), self.support)

    def value(self, U: Tensor) -> Tensor:
        """g(U), for U on the support."""
        return self.penalty.value(U)

    def prox(self, V: Tensor, step: float) -> Tensor:
        """prox_g(S∘V); with step 0 S∘V, where g is finite everywhere."""
        return self.penalty.prox(self._on_support(V), step)

    def dual_norm(self, A: Tensor) -> Tensor:
        """That of g at S∘A."""
        return self.penalty.dual_norm(self._on_support(A))

    def conjugate(self, A: Tensor) -> Tensor:
        """g*(S∘A)."""
        plain: Any = self.penalty
        found: Tensor = plain.conjugate(self._on_support(A))
        return found

    def slack(self, A: Tensor) -> Tensor:
        """That of g at S∘A; off the support nothing is left to bound."""
        return self.penalty.slack(self._on_support(A))

    def cost(self, shape: tuple[int, int]) -> Tensor:
        """That of g; an entry off the support is fixed, and never free."""
        cost = self.penalty.cost(shape)
        return torch.where((cost == 0) & ~self.support.to(cost.device), 1.0, cost)

    def to_cvxpy(self, U: Any) -> Any:
        """g(U), infinite unless U vanishes off the support."""
        from cvxpy import multiply
        from cvxpy.transforms import indicator

        off = (~self.support).double().cpu().numpy()
        return self.penalty.to_cvxpy(U) + indicator([multiply(off, U) == 0])

    def _on_support(self, A: Tensor) -> Tensor:
        return torch.where(self.support.to(A.device), A, 0.0)
