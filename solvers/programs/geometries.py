"""The three geometries of outputs around their targets: linear, ReLU and Net-Trim's, each as a set and as a loss."""

from dataclasses import dataclass
from numbers import Real
from typing import Self

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, as_number, check_finite, check_shape
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs.fits import LossFit, SetFit, TargetFit
from convexprune.solvers.programs.gram import Gram


class _Linear(TargetFit):
    def as_loss(self, weight: float = 1.0) -> "SquaredLoss":
        return SquaredLoss(self.Y, weight)._with(gram=self.gram)


@dataclass(frozen=True, eq=False)
class Ball(_Linear, SetFit):
    """{Z : ‖Z − Y‖_F ≤ eps}: a linear layer, logits, or any Lipschitz activation.

    Args:
        targets: Y [P, M], or the ``Gram`` that holds them.
        eps: As in ``SetFit``.
    """


@dataclass(frozen=True, eq=False)
class SquaredLoss(_Linear, LossFit):
    """½·weight·‖Z − Y‖_F² for targets Y [P, M], or the ``Gram`` that holds them; weight as in ``LossFit``."""


class _OneSided(TargetFit):
    """Entries off Ω = {Y > 0} may be as low as they like, so multipliers there are ≥ 0."""

    linear = False

    def __post_init__(self, targets: ArrayLike | Gram) -> None:
        super().__post_init__(targets)
        # Once, for it would be a pass over [P, M] at each use; and no copy is made where targets are a ReLU's outputs.
        if bool((self.Y < 0).any()):
            object.__setattr__(self, "Y", self.Y.clamp(min=0))

    def offset(self, Z: Tensor) -> Tensor:
        # Z − anchor on Ω, its positive part elsewhere, as max(Z − anchor, floor) with floor 0 off Ω and very low on it:
        # 6 times as fast as ``where`` on a CPU.
        p = Z - self.anchor
        floor = self.omega().to(p.dtype).mul_(-torch.finfo(p.dtype).max)
        return torch.maximum(p, floor, out=p)

    def omega(self) -> Tensor:
        return torch.sign(self.Y)

    def project_dual(self, L: Tensor) -> Tensor:
        return torch.where(self.Y > 0, L, L.clamp(min=0))

    def unrestricted(self) -> Tensor:
        return self.Y > 0


class _Relu(_OneSided):
    def as_loss(self, weight: float = 1.0) -> "ReluLoss":
        return ReluLoss(self.Y, weight)


@dataclass(frozen=True, eq=False)
class ReluBall(_Relu, SetFit):
    """{Z : ‖h(Z)‖_F ≤ eps}, h = Z − Y on Ω = {Y > 0} and Z₊ elsewhere; eps as in ``SetFit``.

    Every Z in it has ‖ReLU(Z) − Y‖_F ≤ eps for the outputs Y ≥ 0 [P, M] after the ReLU, and it contains the Net-Trim
    set of the same Y and eps with ceiling 0 (docs/program.md). Entries Y ≤ 0 all mean an inactive output.
    """


@dataclass(frozen=True, eq=False)
class ReluLoss(_Relu, LossFit):
    """½·weight·‖h(Z)‖_F², h = Z − Y on Ω = {Y > 0} and Z₊ elsewhere: half the squared error after the ReLU, at most.

    Y [P, M] are the outputs after the ReLU; weight as in ``LossFit``.
    """


@dataclass(frozen=True, eq=False)
class _Ceiling(_OneSided):
    ceiling: ArrayLike | float = 0.0

    def __post_init__(self, targets: ArrayLike | Gram) -> None:
        super().__post_init__(targets)
        if isinstance(self.ceiling, Real) or getattr(self.ceiling, "ndim", None) == 0:
            number = as_number("ceiling V", self.ceiling)
            check_finite("ceiling V", torch.tensor(number))
            object.__setattr__(self, "ceiling", number)
            return
        matrix = as_matrix("ceiling V", self.ceiling)  # type: ignore[arg-type]  # mypy does not see that Real holds float
        ceiling = check_shape("ceiling V", matrix, self.shape, "that of the targets")
        if ceiling.device != self.Y.device:
            raise InvalidInput(f"ceiling V: expected the targets' device {self.Y.device}, found {ceiling.device}")
        object.__setattr__(self, "ceiling", ceiling)

    def _scaled(self, c: float) -> Self:
        scaled = super()._scaled(c)
        return scaled if isinstance(self.ceiling, Tensor) else scaled._with(ceiling=float(self.ceiling) * c)

    def relaxed(self, by: float) -> Self:
        """Radii and ceiling raised, each to a half of the square."""
        each = by / 2**0.5
        ceiling = self.ceiling + each / self.Y.numel() ** 0.5
        return super().relaxed(each)._with(ceiling=ceiling)

    @property
    def V(self) -> Tensor:
        return torch.as_tensor(self.ceiling, dtype=self.Y.dtype, device=self.Y.device)

    @property
    def anchor(self) -> Tensor:
        if not isinstance(self.ceiling, Tensor) and self.ceiling == 0:
            return self.Y
        return torch.where(self.Y > 0, self.Y, self.V)

    def seen(self) -> Tensor:
        return self.omega()

    def as_loss(self, weight: float = 1.0) -> "NetTrimLoss":
        return NetTrimLoss(self.Y, weight, self.ceiling)


@dataclass(frozen=True, eq=False)
class NetTrimSet(_Ceiling, SetFit):
    """{Z : ‖(Z − Y)_Ω‖_F ≤ eps and Z ≤ V on Ωᶜ} (Aghasi et al. 2017, 2020), Ω = {Y > 0}.

    Args:
        targets: Y [P, M], the outputs after the ReLU.
        eps: As in ``SetFit``.
        ceiling: V, a number or [P, M]; only its entries on Ωᶜ matter.
    """


@dataclass(frozen=True, eq=False)
class NetTrimLoss(_Ceiling, LossFit):
    """½·weight·‖(Z − Y)_Ω‖_F² where Z ≤ V on Ωᶜ, ∞ elsewhere: the program of the 2017 code, a QP for each neuron.

    Arguments as in ``NetTrimSet`` and ``LossFit``.
    """
