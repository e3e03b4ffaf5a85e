"""Supports: budgets, which are not convex, so that no bound is claimed; and any penalty on a given support."""

from abc import abstractmethod
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, Self

import torch
from torch import Tensor

from convexprune.solvers.arrays import check_shape
from convexprune.solvers.errors import InvalidInput, SolverRefused
from convexprune.solvers.programs.penalties import Penalty, is_homogeneous


class _Budget(Penalty):
    """The indicator of a union of subspaces, each spanned by the entries that ``support`` may keep."""

    convex = False
    rows: int | None
    within: Tensor | None

    def budgeted(self, inputs: int) -> int:
        """How many of the first rows of U the budget is for; the rest (the bias) is free."""
        return inputs if self.rows is None else self.rows

    @abstractmethod
    def best(self, size: Tensor) -> Tensor:
        """Of the budgeted rows, the boolean support with the largest total ``size``, a matrix of numbers ≥ 0."""

    def support(self, U: Tensor) -> Tensor:
        """Boolean [N, M]: the entries of U to keep, the largest the budget allows and all free ones; never a zero."""
        rows = self.budgeted(U.shape[0])
        allowed = self.allowed(U)
        kept = allowed.clone()
        kept[:rows] &= self.best(U[:rows].abs() * allowed[:rows])
        return kept & (U != 0)

    def allowed(self, U: Tensor) -> Tensor:
        """Boolean [N, M]: the entries that a support may have at all."""
        return torch.ones_like(U, dtype=torch.bool) if self.within is None else self.within.to(U.device)

    def _check_counts(self, *names: str) -> None:
        """Whole numbers ≥ 1, of Python or numpy; ``rows`` may be None."""
        for name in names if self.rows is None else (*names, "rows"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise InvalidInput(f"{name}: expected a whole number ≥ 1, found {value!r}")
            object.__setattr__(self, name, int(value))

    def _check_shape(self, shape: tuple[int, int]) -> None:
        if self.budgeted(shape[0]) > shape[0]:
            raise InvalidInput(f"rows: expected at most the {shape[0]} inputs, found {self.rows}")
        check_support("within", self.within, shape)

    def to(self, like: Tensor) -> Self:  # noqa: ARG002 - what arrays there are have no dtype
        return self

    def rescaled(self, d: Tensor) -> Self:  # noqa: ARG002 - supports have no unit
        return self

    def value(self, U: Tensor) -> Tensor:
        kept = torch.equal(self.support(U), U != 0)
        return U.new_zeros(()) if kept else U.new_full((), torch.inf)

    def prox(self, V: Tensor, step: float) -> Tensor:  # noqa: ARG002 - an indicator has no scale
        """A nearest point: the largest entries are kept, the first of equals."""
        return torch.where(self.support(V), V, 0.0)

    def dual_norm(self, A: Tensor) -> Tensor:
        return A.new_full((A.shape[1],), torch.inf)

    def cost(self, shape: tuple[int, int]) -> Tensor:
        return torch.zeros(shape)

    def to_cvxpy(self, U: Any) -> Any:  # noqa: ARG002
        raise SolverRefused(f"{type(self).__name__} is not convex and has no cvxpy formulation")


@dataclass(frozen=True)
class TopK(_Budget):
    """At most k nonzeros, in the layer or in each neuron (column).

    Args:
        k: How many, ≥ 1.
        per: "layer" or "neuron".
        rows: The budget is for the first ``rows`` inputs; later ones (the bias) are free. None: for all.
        within: Boolean [N, M], the only entries that may be nonzero; None: any.

    Raises:
        InvalidInput: A number that is not whole and ≥ 1, or another ``per``.
    """

    k: int
    per: Literal["layer", "neuron"] = "layer"
    rows: int | None = None
    within: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.per not in ("layer", "neuron"):
            raise InvalidInput(f'per: expected "layer" or "neuron", found {self.per!r}')
        self._check_counts("k")

    def check(self, shape: tuple[int, int]) -> None:
        """Raise InvalidInput if there are fewer weights than k, ShapeMismatch if ``within`` is not [N, M]."""
        self._check_shape(shape)
        entries = self.budgeted(shape[0]) * (shape[1] if self.per == "layer" else 1)
        if self.k > entries:
            raise InvalidInput(f"TopK: expected k ≤ {entries}, the weights of a {self.per}, found {self.k}")

    def best(self, size: Tensor) -> Tensor:
        """The k largest, the first of equals."""
        flat = size.reshape(-1, 1) if self.per == "layer" else size
        last = flat.topk(self.k, dim=0, sorted=False).values.amin(0, keepdim=True)  # a third of a sort's time
        above, equal = flat > last, flat == last
        return (above | (equal & (equal.cumsum(0) <= self.k - above.sum(0)))).view(size.shape)


@dataclass(frozen=True)
class NM(_Budget):
    """At most n nonzeros in each m consecutive inputs of a neuron (2:4 is what accelerators can use).

    Args:
        n: How many to keep.
        m: Of how many, n ≤ m; the budgeted rows must be a multiple of it.
        rows, within: As in ``TopK``.
    """

    n: int = 2
    m: int = 4
    rows: int | None = None
    within: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._check_counts("n", "m")
        if self.n > self.m:
            raise InvalidInput(f"NM: expected n ≤ m, found {self.n} of {self.m}")

    def check(self, shape: tuple[int, int]) -> None:
        """Raise InvalidInput unless the inputs are a multiple of m, ShapeMismatch if ``within`` is not [N, M]."""
        self._check_shape(shape)
        if self.budgeted(shape[0]) % self.m:
            raise InvalidInput(
                f"NM: expected a multiple of {self.m} inputs, found {self.budgeted(shape[0])}; "
                "set rows to the inputs without the bias"
            )

    def best(self, size: Tensor) -> Tensor:
        """The n largest of each m, the first of equals."""
        blocks = size.reshape(-1, self.m, size.shape[1])
        ahead = torch.zeros_like(blocks, dtype=torch.int32)  # how many come before each; a tenth of a sort's time
        for j in range(self.m):
            ahead += blocks[:, j : j + 1] > blocks
            ahead[:, j + 1 :] += blocks[:, j : j + 1] == blocks[:, j + 1 :]
        return (ahead < self.n).view(size.shape)


def check_support(name: str, support: object, shape: tuple[int, int] | None = None) -> None:
    """Raise InvalidInput for a support that is not boolean, ShapeMismatch unless it has the shape; None passes."""
    if support is None:
        return
    if not isinstance(support, Tensor) or support.dtype != torch.bool:
        raise InvalidInput(f"{name}: expected a boolean tensor, found {getattr(support, 'dtype', type(support))}")
    if shape is not None:
        check_shape(name, support, shape, "the weights")


@dataclass(frozen=True, eq=False)
class Restricted(Penalty):
    """g(U) where U vanishes off a support S [N, M], and infinity elsewhere.

    For a g that does not grow when entries are set to 0, as L1 and GroupL2 do not: with S∘U denoting U with zeros off
    the support, prox(V) = prox_g(S∘V) and (g + indicator)*(A) = g*(S∘A). Off the support a dual point is not bound.

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
        object.__setattr__(self, "homogeneous", is_homogeneous(self.penalty))

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ShapeMismatch unless the support is [N, M], and as g."""
        check_support("support", self.support, shape)
        self.penalty.check(shape)

    def rescaled(self, d: Tensor) -> Self:
        """That of V = diag(d) U, which has the same support."""
        return type(self)(self.penalty.rescaled(d), self.support)

    def times(self, k: float) -> Self:
        """k·g on the support."""
        return type(self)(self.penalty.times(k), self.support)

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
        return self.penalty.conjugate(self._on_support(A))

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
