"""What there is to say of a kind of module for its weights to be pruned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from convexprune.solvers.errors import ShapeMismatch

Group = tuple[Tensor, Tensor | None]
"""The weight [M, *fan-in] and the bias [M] of one group."""


@dataclass(frozen=True)
class Kind:
    """A kind of module whose output is a matrix product, group by group. The functions take such a module first.

    Attributes:
        base: The class; subclasses that compute the same are of the kind.
        parameters: Names of the module's tensors that make up U.
        groups: Detached views of these tensors, for what is written there to be in the module.
        inputs: Inputs [*positions, *fan-in] of each group, from what the module received; views where possible.
        outputs: Outputs [*positions, M] of each group, from what the module computed; views where possible.
        settings: Names of the attributes that say how ``inputs`` are made.
        axis: Of what the module returns, the one along which its outputs lie, counted from the end.
    """

    base: type[nn.Module]
    parameters: tuple[str, ...]
    groups: Callable[[Any], Sequence[Group]]
    inputs: Callable[[Any, Any], Sequence[Tensor]]
    outputs: Callable[[Any, Any], Sequence[Tensor]]
    settings: tuple[str, ...] = ()
    axis: int = -1


def check_axis(tensor: Tensor, axis: int, size: int, layout: str, most: int | None = None) -> None:
    """The tensor has this size at the axis, counted from the end, and at most so many axes.

    Raises:
        ShapeMismatch: It has not.
    """
    if tensor.dim() < -axis or tensor.shape[axis] != size or (most is not None and tensor.dim() > most):
        raise ShapeMismatch(f"expected {layout} with {size} at axis {axis}; got shape {tuple(tensor.shape)}")
