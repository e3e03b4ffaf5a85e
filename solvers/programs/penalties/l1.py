"""The weighted ℓ1 norm."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, check_finite
from convexprune.solvers.errors import InvalidInput, ShapeMismatch
from convexprune.solvers.programs.penalties.base import Homogeneous


@dataclass(frozen=True, eq=False)
class L1(Homogeneous):
    """The weighted ℓ1 norm g(U) = Σ_ij w_ij |u_ij|.

    Args:
        weights: w ≥ 0, a matrix that broadcasts to [N, M] ([N, 1]: one weight an input), or None for 1 everywhere.
            A weight of 0 leaves the entry (say, the bias) unpenalised.

    Raises:
        InvalidInput: A negative weight. NonFinite: NaN or infinity.
    """

    weights: ArrayLike | None = None
    convex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.weights is not None:
            weights = as_matrix("L1 weights", self.weights)
            if bool((weights < 0).any()):
                raise InvalidInput(f"L1 weights: expected numbers ≥ 0, found {float(weights.min()):g}")
            object.__setattr__(self, "weights", weights)

    @classmethod
    def free_bias(cls, inputs: int) -> Self:
        """Weight 1 on the first ``inputs`` − 1 rows and 0 on the last one, the bias."""
        weights = torch.ones(inputs, 1)
        weights[-1] = 0
        return cls(weights)

    @property
    def w(self) -> Tensor:
        """The weights as a tensor that broadcasts to [N, M]."""
        return self.weights if isinstance(self.weights, Tensor) else torch.ones(1, 1)

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ShapeMismatch unless the weights broadcast to ``shape``."""
        if any(have not in (1, want) for have, want in zip(self.w.shape, shape, strict=True)):
            raise ShapeMismatch(
                f"L1 weights: expected {list(shape)}, [N, 1], [1, M] or [1, 1], found {list(self.w.shape)}"
            )

    def to(self, like: Tensor) -> Self:
        """The same penalty on the device and in the dtype of ``like``."""
        return type(self)(self.w.to(like))

    def rescaled(self, d: Tensor) -> Self:
        """w/d, since w|u| = (w/d)|d·u|."""
        return type(self)(check_finite("rescaled L1 weights", self.w.to(d) / d))

    def value(self, U: Tensor) -> Tensor:
        """Σ w|u|."""
        return (U.abs() * self.w.to(U)).sum()

    def prox(self, V: Tensor, step: float) -> Tensor:
        """The soft threshold sign(v)·(|v| − step·w)₊."""
        threshold = step * self.w.to(V)
        return V - torch.maximum(torch.minimum(V, threshold), -threshold)

    def dual_norm(self, A: Tensor) -> Tensor:
        """max_j |a_jm|/w_jm over the entries with w > 0; [M]."""
        w = self.w.to(A)
        return torch.where(w > 0, A.abs() / w, 0.0).amax(0)

    def slack(self, A: Tensor) -> Tensor:
        """(w − |A|)₊."""
        return (self.w.to(A) - A.abs()).clamp(min=0)

    def cost(self, shape: tuple[int, int]) -> Tensor:
        """w, as a full matrix."""
        return self.w.expand(shape)

    def to_cvxpy(self, U: Any) -> Any:
        """Σ w|u| as a cvxpy expression."""
        import cvxpy as cp

        w = self.w.double().expand(U.shape).cpu().numpy()
        return cp.sum(cp.multiply(w, cp.abs(U)))
