"""Net-Trim's own fits: distances count on Ω = {Y > 0} only, and Z stays below a ceiling elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Self

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, as_number, check_finite, check_shape
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs.fits.base import LossFit, SetFit
from convexprune.solvers.programs.fits.relu import OneSided


@dataclass(frozen=True, eq=False)
class _Ceiling(OneSided):
    ceiling: ArrayLike | float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same fit with ``change`` applied to its targets and its ceiling."""
        ceiling = change(self.ceiling) if isinstance(self.ceiling, Tensor) else self.ceiling
        return self._with(targets=change(self.Y), ceiling=ceiling)

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
        """The ceiling as a tensor that broadcasts to [P, M]."""
        return torch.as_tensor(self.ceiling, dtype=self.Y.dtype, device=self.Y.device)

    @property
    def anchor(self) -> Tensor:
        """Y on Ω, V elsewhere."""
        if not isinstance(self.ceiling, Tensor) and self.ceiling == 0:
            return self.Y
        return torch.where(self.Y > 0, self.Y, self.V)

    def seen(self) -> Tensor:
        """Ω."""
        return self.omega()

    def as_loss(self, weight: float = 1.0) -> "NetTrimLoss":
        """½·weight·‖(Z − Y)_Ω‖² with the same ceiling."""
        return NetTrimLoss(self.Y, weight, self.ceiling)


@dataclass(frozen=True, eq=False)
class NetTrimSet(_Ceiling, SetFit):
    """{Z : ‖(Z − Y)_Ω‖_F ≤ eps and Z ≤ V on Ωᶜ} (Aghasi et al. 2017, 2020), Ω = {Y > 0}.

    Args:
        targets: Y [P, M], the outputs after the ReLU.
        eps: The radius in the units of Y, a number; or [M], one for each neuron.
        ceiling: V, a number or [P, M]; only its entries on Ωᶜ matter.
    """


@dataclass(frozen=True, eq=False)
class NetTrimLoss(_Ceiling, LossFit):
    """½·weight·‖(Z − Y)_Ω‖_F² where Z ≤ V on Ωᶜ, ∞ elsewhere: the program of the 2017 code, a QP for each neuron.

    Args:
        targets: Y [P, M], the outputs after the ReLU.
        weight: What a unit of squared distance costs beside the penalty, > 0.
        ceiling: V, a number or [P, M]; only its entries on Ωᶜ matter.
    """
