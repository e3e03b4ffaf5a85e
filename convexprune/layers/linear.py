"""Linear, and the Transformers library's Conv1D, a Linear whose weight is kept transposed."""

import sys
from typing import Any

from torch import Tensor, nn

from convexprune.layers.kinds import Group, Kind, check_axis


def features(tensor: Tensor, size: int) -> Tensor:
    """[..., features], detached.

    Raises:
        ShapeMismatch: The last axis is of another size.
    """
    check_axis(tensor, -1, size, "[..., features]")
    return tensor.detach()


def transformers_kinds() -> list[Kind]:
    """Conv1D, if the Transformers library is in use; it is not imported in order to look."""
    base = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return [] if base is None else [_kind(base, inputs_axis=0)]


def _kind(base: type[nn.Module], inputs_axis: int) -> Kind:
    def groups(module: Any) -> list[Group]:
        weight = module.weight.detach()
        return [(weight.mT if inputs_axis == 0 else weight, None if module.bias is None else module.bias.detach())]

    def inputs(module: Any, received: Tensor) -> list[Tensor]:
        return [features(received, module.weight.shape[inputs_axis])]

    def outputs(module: Any, computed: Tensor) -> list[Tensor]:
        return [features(computed, module.weight.shape[1 - inputs_axis])]

    return Kind(base, ("weight", "bias"), groups, inputs, outputs)


LINEAR = _kind(nn.Linear, inputs_axis=1)
