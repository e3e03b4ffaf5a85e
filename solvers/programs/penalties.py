"""What a penalty is; the weighted ℓ1 norm, and norms of groups of weights that vanish together."""

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, as_real, check_finite
from convexprune.solvers.errors import InvalidInput, ShapeMismatch

_NEWTON = 50  # steps at most; 9 are needed where lengths in a group differ by 12 orders of magnitude


class Penalty(ABC):
    """A closed g(U) ≥ 0 with g(0) = 0 on weights U [N, M], infinite outside of its domain (docs/penalties.md).

    What has a body here is that of positively homogeneous ones, g(cU) = c·g(U) for c ≥ 0, as norms are; others say
    ``homogeneous = False`` and have a ``conjugate`` and ``times`` of their own.

    Attributes:
        convex: Whether g is convex; if not, no bound is claimed, and the members that describe its dual are not used.
        homogeneous: Whether g is positively homogeneous.
    """

    convex: bool = True
    homogeneous: bool = True

    def check(self, shape: tuple[int, int]) -> None:  # noqa: B027 - any shape will do
        """Raise if the penalty does not fit weights of this shape [N, M]."""

    def to(self, like: Tensor) -> Self:
        """The same penalty on the device and in the dtype of ``like``: each array and penalty among its attributes."""
        new = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Penalty) or (isinstance(value, Tensor) and value.is_floating_point()):
                vars(new)[name] = value.to(like)
            elif isinstance(value, Tensor):  # labels and supports
                vars(new)[name] = value.to(like.device)
        return new

    @abstractmethod
    def rescaled(self, d: Tensor) -> Self:
        """The same penalty of the variables V = diag(d) U, d [N, 1] > 0: V ↦ g(diag(1/d) V)."""

    def times(self, k: float) -> Self:
        """k·g, k > 0; of a homogeneous one g(k·)."""
        return self.rescaled(torch.tensor([[1 / k]], dtype=torch.float64))

    @abstractmethod
    def value(self, U: Tensor) -> Tensor:
        """g(U), a scalar tensor, for U in the domain."""

    @abstractmethod
    def prox(self, V: Tensor, step: float) -> Tensor:
        """argmin over U of step·g(U) + ½‖U − V‖², step ≥ 0; with step 0 the nearest point of the domain."""

    @abstractmethod
    def dual_norm(self, A: Tensor) -> Tensor:
        """[M], s ≥ 0 such that ⟨A diag(t), U⟩ ≤ g∞(U) for all U and all t, 0 ≤ t_m ≤ 1/s_m; free entries left out.

        g∞(U) = lim g(cU)/c, c → ∞, is g itself where g is homogeneous. As small as possible for each column m.
        """

    def conjugate(self, A: Tensor) -> Tensor:
        """[M], g*(A) by column, free entries left out; of a homogeneous one 0 or ∞."""
        return torch.where(self.dual_norm(A) <= 1, 0.0, torch.inf)

    def slack(self, A: Tensor) -> Tensor:
        """[N, M], c ≥ 0 such that g(U) + ⟨A, U⟩ ≥ c_ij|u_ij| for each entry and all U, given dual_norm(−A) ≤ 1."""
        return torch.zeros_like(A)

    @abstractmethod
    def cost(self, shape: tuple[int, int]) -> Tensor:
        """[N, M], the price of each entry, g of it alone at 1; 0 exactly where g does not depend on it: it is free."""

    @abstractmethod
    def to_cvxpy(self, U: Any) -> Any:
        """g as a cvxpy expression of the variable U; infinite outside of the domain."""


Homogeneous = Penalty
"""Its name from when only homogeneous penalties had a base."""


def is_homogeneous(penalty: Penalty) -> bool:
    """Whether the penalty claims to be homogeneous, as it does by default."""
    return bool(getattr(penalty, "homogeneous", True))


@dataclass(frozen=True, eq=False)
class L1(Penalty):
    """The weighted ℓ1 norm g(U) = Σ_ij w_ij |u_ij|.

    Args:
        weights: w ≥ 0, a matrix that broadcasts to [N, M] ([N, 1]: one weight an input), or None for 1 everywhere.
            A weight of 0 leaves the entry (say, the bias) unpenalised.

    Raises:
        InvalidInput: A negative weight. NonFinite: NaN or infinity.
    """

    weights: ArrayLike | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            object.__setattr__(self, "weights", _nonnegative("L1 weights", self.weights))

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


@dataclass(frozen=True, eq=False)
class GroupL2(Penalty):
    """g(U) = Σ_g w_g ‖U_g‖₂ over groups g of entries: whole groups become zero, not single entries.

    Args:
        groups: "rows" (whole inputs vanish), "columns" (whole neurons), or labels [N, M], whole numbers from 0: entries
            with the same label are a group.
        weights: w ≥ 0, one a group ([N], [M], or one for each label), or None for 1; 0 leaves a group unpenalised.

    Raises:
        InvalidInput: Labels that are not whole numbers from 0, another word, or a negative weight.
        ShapeMismatch: Another number of weights than of groups, by ``check``.
    """

    groups: Literal["rows", "columns"] | ArrayLike = "rows"
    weights: ArrayLike | None = None
    lengths: Tensor | None = field(default=None, repr=False)  # [N, 1], a: ‖a∘U_g‖ in the place of ‖U_g‖

    def __post_init__(self) -> None:
        if isinstance(self.groups, str):
            if self.groups not in ("rows", "columns"):
                raise InvalidInput(f'groups: expected "rows", "columns" or labels [N, M], found {self.groups!r}')
        else:
            object.__setattr__(self, "groups", _labels(self.groups))
        if self.weights is not None:
            weights = as_real("GroupL2 weights", self.weights).reshape(1, -1)
            object.__setattr__(self, "weights", _nonnegative("GroupL2 weights", weights)[0])

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
        return type(self)(groups, weights, self._a(like))

    def rescaled(self, d: Tensor) -> Self:
        """‖a∘U_g‖ = ‖(a/d)∘(d∘U)_g‖."""
        lengths = check_finite("rescaled lengths", (1.0 if self.lengths is None else self.lengths.to(d)) / d)
        return type(self)(self.groups, self.weights, lengths)

    def value(self, U: Tensor) -> Tensor:
        """Σ_g w_g ‖a∘U_g‖."""
        return (self._over((self._a(U) * U).square()).sqrt() * self._w(U)).sum()

    def prox(self, V: Tensor, step: float) -> Tensor:
        """Groups with ‖V_g/a‖ ≤ t = step·w_g vanish; the others are v·r/(r + a²) with r = ‖a∘u‖/t.

        r solves Σ (z a²/(r + a²))² = 1, z = v/(a t), by Newton's method on the reciprocal root of the left side, which
        is concave, from a smaller r. Where a is the same in a group its first step is exact (block soft threshold).
        """
        info, a = torch.finfo(V.dtype), self._a(V)
        top = a.max()
        a2, t = (a / top).square(), top * step * self._spread(self._w(V), V.shape)
        z = V * top / a / torch.where(t > 0, t, 1.0)
        alive = (self._spread(self._over(z.square()), V.shape) > 1) & (t > 0)
        z = torch.where(alive, z.clamp(-(info.max**0.5), info.max**0.5), 0.0)
        r = self._spread(self._over(a2 * (z.abs() - 1).clamp(min=0), "amax"), V.shape)
        for _ in range(1 if self._even else _NEWTON):
            reach = (r + a2).clamp(min=info.tiny)
            parts = (z * (a2 / reach)).square()  # at most 1 each, so nothing overflows
            size = self._over(parts)
            move = size * (size.sqrt() - 1) / self._over(parts / reach).clamp(min=info.tiny)
            before, r = r, r + self._spread(move.clamp(min=0), V.shape)
            if not self._even and bool((r <= before * (1 + 4 * info.eps)).all()):
                break
        return torch.where(t > 0, V * (r / (r + a2).clamp(min=info.tiny)), V)

    def dual_norm(self, A: Tensor) -> Tensor:
        """The largest ‖A_g/a‖/w_g of the groups that have entries in column m; [M]."""
        size, w = self._over((A / self._a(A)).square()).sqrt(), self._w(A)
        ratio = torch.where(w > 0, size / torch.where(w > 0, w, 1.0), 0.0)
        # A group that spans columns keeps within its bound when each of them is scaled by at most its inverse.
        return self._spread(ratio, A.shape).amax(0)

    def slack(self, A: Tensor) -> Tensor:
        """a_ij (w_g − ‖A_g/a‖)₊: ⟨A_g, u_g⟩ ≥ −‖A_g/a‖·‖a∘u_g‖, and |u_ij| ≤ ‖a∘u_g‖/a_ij."""
        size = self._over((A / self._a(A)).square()).sqrt()
        return self._a(A) * self._spread((self._w(A) - size).clamp(min=0), A.shape)

    def cost(self, shape: tuple[int, int]) -> Tensor:
        """w_g a_ij."""
        known = [array for array in (self.lengths, self.weights) if isinstance(array, Tensor)]
        device = self.groups.device if isinstance(self.groups, Tensor) else None
        like = known[0] if known else torch.ones(1, device=device)
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

    def _count(self, shape: tuple[int, ...]) -> int:
        return self._labels if isinstance(self.groups, Tensor) else shape[self.groups != "rows"]

    @cached_property
    def _labels(self) -> int:
        return int(self.groups.max()) + 1  # type: ignore[union-attr]

    @property
    def _even(self) -> bool:
        """Whether lengths are the same within each group."""
        return self.groups == "rows" or self.lengths is None or self.lengths.numel() == 1

    def _a(self, like: Tensor) -> Tensor:
        return like.new_ones(1, 1) if self.lengths is None else self.lengths.to(like)

    def _w(self, like: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """One weight a group, in the shape that ``_over`` gives."""
        count = self._count(shape or like.shape)
        weights = self.weights.to(like) if isinstance(self.weights, Tensor) else like.new_ones(count)
        return weights[:, None] if self.groups == "rows" else weights

    def _over(self, A: Tensor, how: str = "sum") -> Tensor:
        """The sum, or of numbers ≥ 0 the largest, over each group: [N, 1] for rows, [M] for columns, one a label."""
        if isinstance(self.groups, Tensor):
            return A.new_zeros(self._labels).scatter_reduce(0, self.groups.reshape(-1), A.reshape(-1), how)
        total: Tensor = getattr(A, how)(int(self.groups == "rows"), keepdim=self.groups == "rows")
        return total

    def _spread(self, sums: Tensor, shape: Any) -> Tensor:
        """Each group's number at each of its entries."""
        return sums[self.groups] if isinstance(self.groups, Tensor) else sums.expand(shape)


def _nonnegative(name: str, weights: ArrayLike) -> Tensor:
    weights = as_matrix(name, weights)
    if bool((weights < 0).any()):
        raise InvalidInput(f"{name}: expected numbers ≥ 0, found {float(weights.min()):g}")
    return weights


def _labels(groups: ArrayLike) -> Tensor:
    try:
        labels = groups if isinstance(groups, Tensor) else torch.as_tensor(np.ascontiguousarray(groups))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"groups: expected labels [N, M], whole numbers, found {type(groups).__name__}") from error
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InvalidInput(f"groups: expected whole numbers as labels, found {labels.dtype}")
    labels = labels.to(torch.int64)
    if labels.ndim != 2 or labels.numel() == 0 or int(labels.min()) < 0:
        raise InvalidInput(f"groups: expected labels ≥ 0 for each entry of [N, M], found shape {list(labels.shape)}")
    if int(labels.max()) >= labels.numel():
        raise InvalidInput(
            f"groups: expected labels below {labels.numel()}, the number of entries, found {int(labels.max())}; "
            "count the groups from 0"
        )
    return labels
