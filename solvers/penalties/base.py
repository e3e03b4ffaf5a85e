"""What a penalty is."""

from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor

__all__ = ["Penalty"]


@runtime_checkable
class Penalty(Protocol):
    """A closed g(U) ≥ 0 with g(0) = 0, even and positively homogeneous, on weights U [N, M].

    Everything that solvers and the certificate ask of it; see docs/program.md for the mathematics.
    """

    @property
    def convex(self) -> bool:
        """Whether g is convex. If not, no bound is claimed, and ``dual_norm`` and ``cost`` are never asked for."""

    def check(self, shape: tuple[int, int]) -> None:
        """Raise if the penalty does not fit weights of this shape [N, M]."""

    def to(self, like: Tensor) -> Self:
        """The same penalty on the device and in the dtype of ``like``."""

    def rescaled(self, d: Tensor) -> Self:
        """The same penalty of the variables V = diag(d) U, d [N, 1] > 0: U ↦ g(U) written as V ↦ g(diag(1/d) V)."""

    def value(self, U: Tensor) -> Tensor:
        """g(U), a scalar tensor."""

    def prox(self, V: Tensor, step: float) -> Tensor:
        """argmin over U of step·g(U) + ½‖U − V‖²."""

    def dual_norm(self, A: Tensor) -> Tensor:
        """[M], s ≥ 0 such that ⟨A diag(t), U⟩ ≤ g(U) for all U and all t with 0 ≤ t_m ≤ 1/s_m; free entries left out.

        As small as can be told for each column m; where g is a sum over columns, the polar of its m-th term.
        """

    def slack(self, A: Tensor) -> Tensor:
        """[N, M], c ≥ 0 such that g(U) + ⟨A, U⟩ ≥ c_ij|u_ij| for each entry and all U, given dual_norm(−A) ≤ 1."""

    def cost(self, shape: tuple[int, int]) -> Tensor:
        """g of each entry alone at 1, [N, M]; where it is 0 the entry is free and a dual point must have A = 0."""

    def to_cvxpy(self, U: Any) -> Any:
        """g as a cvxpy expression of the variable U."""
