"""Groups of weights that vanish together."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, check_finite
from convexprune.solvers.errors import InvalidInput, ShapeMismatch

__all__ = ["GroupL2"]

_NEWTON = 50  # steps at most; it ends when rounding does
_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class GroupL2:
    """g(U) = Σ_g w_g ‖U_g‖₂ over groups g of entries: zero groups, not single zeros.

    Args:
        groups: "rows" (whole inputs vanish), "columns" (whole neurons), or labels [N, M], whole numbers from 0: entries
            with the same label are a group.
        weights: w ≥ 0, a number for each group ([N], [M], or one for each label), or None for 1. A weight of 0 leaves
            the group unpenalised.

    Raises:
        InvalidInput: Labels that are not whole numbers ≥ 0, another word, or a negative weight.
        ShapeMismatch: Another number of weights than of groups (``check`` sees it once N and M are known).
    """

    groups: Literal["rows", "columns"] | ArrayLike = "rows"
    weights: ArrayLike | None = None
    lengths: Tensor | None = field(default=None, repr=False)  # [N, 1], a: ‖a∘U_g‖ in the place of ‖U_g‖
    convex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.groups, str):
            if self.groups not in ("rows", "columns"):
                raise InvalidInput(f'groups: expected "rows", "columns" or labels [N, M], found {self.groups!r}')
        else:
            object.__setattr__(self, "groups", _labels(self.groups))
        if self.weights is not None:
            weights = torch.as_tensor(self.weights).detach()
            weights = as_matrix("GroupL2 weights", weights.reshape(1, -1))[0]
            if bool((weights < 0).any()):
                raise InvalidInput(f"GroupL2 weights: expected numbers ≥ 0, found {float(weights.min()):g}")
            object.__setattr__(self, "weights", weights)

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ShapeMismatch unless labels and weights fit ``shape``."""
        if isinstance(self.groups, Tensor) and tuple(self.groups.shape) != shape:
            raise ShapeMismatch(f"groups: expected labels {list(shape)}, found {list(self.groups.shape)}")
        count = self._count(shape)
        if isinstance(self.weights, Tensor) and len(self.weights) != count:
            raise ShapeMismatch(f"GroupL2 weights: expected {count}, one a group, found {len(self.weights)}")

    def to(self, like: Tensor) -> Self:
        """The same penalty on the device and in the dtype of ``like``."""
        groups = self.groups.to(like.device) if isinstance(self.groups, Tensor) else self.groups
        weights = self.weights.to(like) if isinstance(self.weights, Tensor) else None
        return type(self)(groups, weights, None if self.lengths is None else self.lengths.to(like))

    def rescaled(self, d: Tensor) -> Self:
        """‖a∘U_g‖ = ‖(a/d)∘(d∘U)_g‖."""
        lengths = check_finite("rescaled lengths", (1.0 if self.lengths is None else self.lengths.to(d)) / d)
        return type(self)(self.groups, self.weights, lengths)

    def value(self, U: Tensor) -> Tensor:
        """Σ_g w_g ‖a∘U_g‖."""
        return (self._sums((self._a(U) * U).square()).sqrt() * self._w(U)).sum()

    def prox(self, V: Tensor, step: float) -> Tensor:
        """Groups with ‖V_g/a‖ ≤ step·w_g vanish; the others are v/(1 + step·w_g a²/τ) with τ = ‖a∘u‖.

        τ solves Σ (a v/(τ + step·w_g a²))² = 1, and Newton's method on the reciprocal root of the left side climbs to it
        from 0; where a is the same in all of a group its first step is exact (the block soft threshold).
        """
        a, t = self._a(V), step * self._spread(self._w(V), V.shape)
        shift, av = t * a.square(), a * V
        alive = self._spread(self._sums((V / a).square()).sqrt(), V.shape) > t
        tau = torch.zeros_like(V)
        for _ in range(_NEWTON):
            parts = torch.where(alive, (av / (tau + shift).clamp(min=_tiny(V))).square(), 0.0)
            size = self._sums(parts)
            slope = self._sums(parts / (tau + shift).clamp(min=_tiny(V)))
            move = size * (size.sqrt() - 1) / slope.clamp(min=_tiny(V))
            new = (tau + self._spread(move, V.shape)).clamp(min=0) * alive
            settled = bool(((new - tau).abs() <= 4 * torch.finfo(V.dtype).eps * new).all())
            tau = new
            if settled:
                break
        return torch.where(alive, V * (tau / (tau + shift).clamp(min=_tiny(V))), 0.0)

    def dual_norm(self, A: Tensor) -> Tensor:
        """The largest ‖A_g/a‖/w_g of the groups that have entries in column m; [M].

        A group that spans columns keeps within its bound when each of them is scaled by at most its inverse.
        """
        size, w = self._sums((A / self._a(A)).square()).sqrt(), self._w(A)
        ratio = torch.where(w > 0, size / w.clamp(min=_tiny(A)), 0.0)
        return self._spread(ratio, A.shape).amax(0)

    def slack(self, A: Tensor) -> Tensor:
        """a_ij (w_g − ‖A_g/a‖)₊: ⟨A_g, u_g⟩ ≥ −‖A_g/a‖·‖a∘u_g‖, and |u_ij| ≤ ‖a∘u_g‖/a_ij."""
        size = self._sums((A / self._a(A)).square()).sqrt()
        return self._a(A) * self._spread((self._w(A) - size).clamp(min=0), A.shape)

    def cost(self, shape: tuple[int, int]) -> Tensor:
        """w_g a_ij."""
        like = self.weights if isinstance(self.weights, Tensor) else self.lengths
        like = torch.ones(1) if like is None else like
        like = like if like.is_floating_point() else like.to(torch.get_default_dtype())
        return (self._spread(self._w(like, shape), shape) * self._a(like)).expand(shape)

    def to_cvxpy(self, U: Any) -> Any:
        """Σ w_g ‖a∘U_g‖ as a cvxpy expression."""
        import cvxpy as cp

        device = self.groups.device if isinstance(self.groups, Tensor) else None
        double = torch.zeros(U.shape, dtype=torch.float64, device=device)
        w = self._w(double).reshape(-1).cpu().numpy()
        scaled = cp.multiply(self._a(double).expand(U.shape).cpu().numpy(), U)
        if isinstance(self.groups, str):
            return w @ cp.norm(scaled, 2, axis=1 if self.groups == "rows" else 0)
        labels = self.groups.cpu().numpy()  # type: ignore[union-attr]
        return sum(w[g] * cp.norm(scaled[labels == g], 2) for g in range(len(w)) if (labels == g).any())

    def _count(self, shape: tuple[int, int]) -> int:
        if isinstance(self.groups, Tensor):
            return int(self.groups.max()) + 1
        return shape[0] if self.groups == "rows" else shape[1]

    def _a(self, like: Tensor) -> Tensor:
        return like.new_ones(1, 1) if self.lengths is None else self.lengths.to(like)

    def _w(self, like: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """One weight a group, in the shape that ``_sums`` gives."""
        shape = shape or (like.shape[0], like.shape[1])
        weights = self.weights.to(like) if isinstance(self.weights, Tensor) else like.new_ones(self._count(shape))
        return weights[:, None] if self.groups == "rows" else weights

    def _sums(self, A: Tensor) -> Tensor:
        """The sum over each group: [N, 1] for rows, [M] for columns, one a label."""
        if isinstance(self.groups, Tensor):
            return A.new_zeros(self._count(A.shape)).index_add(0, self.groups.reshape(-1), A.reshape(-1))  # type: ignore[arg-type]
        return A.sum(1, keepdim=True) if self.groups == "rows" else A.sum(0)

    def _spread(self, sums: Tensor, shape: Any) -> Tensor:
        """Each group's number at each of its entries."""
        return sums[self.groups] if isinstance(self.groups, Tensor) else sums.expand(shape)


def _labels(groups: ArrayLike) -> Tensor:
    labels = torch.as_tensor(groups)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InvalidInput(f"groups: expected whole numbers as labels, found {labels.dtype}")
    labels = labels.to(torch.int64)
    if labels.ndim != 2 or labels.numel() == 0 or int(labels.min()) < 0:
        raise InvalidInput(f"groups: expected labels ≥ 0 for each entry of [N, M], found shape {list(labels.shape)}")
    return labels


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
