"""A BatchNorm behind a layer, as part of the layer's program: its weights stay where they are.

In eval mode BN(XW + b) = X(W∘s) + (b − μ)∘s + β with s = γ/σ. So the program of the layer with its norm has the
weights W∘s and the shift (b − μ)∘s + β as its bias. In the model W keeps the zeros, the shift goes into β; b, γ and the
running statistics stay.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Fold:
    """The way between weights as they are stored and those of the program; nothing to do without a norm.

    Attributes:
        scale: s [M], or None without a norm.
        offset: (b − μ)∘s [M].
    """

    scale: Tensor | None = None
    offset: Tensor | None = None

    def apply(self, stored: Tensor) -> Tensor:
        """The program's weights [N, M]: W∘s, and in the last row β + (b − μ)∘s for a stored β."""
        if self.scale is None or self.offset is None:
            return stored
        W = stored * self.scale.to(stored)
        W[-1] = stored[-1] + self.offset.to(stored)
        return W

    def undo(self, U: Tensor) -> Tensor:
        """The weights to store; those behind a scale of 0 have no effect, and are 0."""
        if self.scale is None or self.offset is None:
            return U
        s = self.scale.to(U)
        stored = torch.where(s == 0, 0.0, U / torch.where(s == 0, 1.0, s))
        stored[-1] = U[-1] - self.offset.to(U)
        return stored


def folds(norm: nn.Module | None, bias: Tensor | None, groups: int) -> tuple[Fold, ...]:
    """For each group of a layer with this bias the norm behind it, computed in float64."""
    if norm is None:
        return (Fold(),) * groups
    gamma = norm.get_parameter("weight").detach().double()
    mean, variance = (norm.get_buffer(name).double() for name in ("running_mean", "running_var"))
    scale = gamma / (variance + float(norm.eps)).sqrt()  # type: ignore[arg-type]
    b = torch.zeros_like(mean) if bias is None else bias.detach().double()
    offset = (b - mean) * scale
    return tuple(Fold(s, c) for s, c in zip(scale.chunk(groups), offset.chunk(groups), strict=True))
