"""What a penalty is."""

from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Penalty(Protocol):
    """A closed g(U) ≥ 0 with g(0) = 0 on weights U [N, M], infinite outside of its domain (docs/penalties.md).

    Positively homogeneous ones, g(cU) = c·g(U) for c ≥ 0, as norms are, may leave out ``conjugate`` and ``times`` (or
    inherit them from ``Homogeneous``); others say ``homogeneous = False`` and have both.
    """

    @property
    def convex(self) -> bool:
        """Whether g is convex; if not, no bound is claimed, and the members that describe its dual are not used."""

    def check(self, shape: tuple[int, int]) -> None:
        """Raise if the penalty does not fit weights of this shape [N, M]."""

    def to(self, like: Tensor) -> Self:
        """The same penalty on the device and in the dtype of ``like``."""

    def rescaled(self, d: Tensor) -> Self:
        """The same penalty of the variables V = diag(d) U, d [N, 1] > 0: V ↦ g(diag(1/d) V)."""

    def value(self, U: Tensor) -> Tensor:
        """g(U), a scalar tensor, for U in the domain."""

    def prox(self, V: Tensor, step: float) -> Tensor:
        """argmin over U of step·g(U) + ½‖U − V‖², step ≥ 0; with step 0 the nearest point of the domain."""

    def dual_norm(self, A: Tensor) -> Tensor:
        """[M], s ≥ 0 such that ⟨A diag(t), U⟩ ≤ g∞(U) for all U and all t, 0 ≤ t_m ≤ 1/s_m; free entries left out.

        g∞(U) = lim g(cU)/c, c → ∞, is g itself where g is homogeneous. As small as possible for each column m.
        """

    def slack(self, A: Tensor) -> Tensor:
        """[N, M], c ≥ 0 such that g(U) + ⟨A, U⟩ ≥ c_ij|u_ij| for each entry and all U, given dual_norm(−A) ≤ 1."""

    def cost(self, shape: tuple[int, int]) -> Tensor:
        """[N, M], the price of each entry, g of it alone at 1; 0 exactly where g does not depend on it: it is free."""

    def to_cvxpy(self, U: Any) -> Any:
        """g as a cvxpy expression of the variable U; infinite outside of the domain."""


class Homogeneous:
    """Base of positively homogeneous penalties: what follows from g(cU) = c·g(U)."""

    homogeneous: ClassVar[bool] = True

    def times(self, k: float) -> Self:
        """k·g = g(k·), k > 0."""
        scaled: Self = self.rescaled(torch.tensor([[1 / k]], dtype=torch.float64))  # type: ignore[attr-defined]
        return scaled

    def conjugate(self, A: Tensor) -> Tensor:
        """[M], g*(A) by column, free entries left out: 0 where the dual norm is at most 1, else infinite."""
        return torch.where(self.dual_norm(A) <= 1, 0.0, torch.inf)  # type: ignore[attr-defined]


def is_homogeneous(penalty: Penalty) -> bool:
    """Whether the penalty claims to be homogeneous, as it does by default."""
    return bool(getattr(penalty, "homogeneous", True))
