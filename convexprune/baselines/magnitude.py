"""Magnitude pruning: keep each layer's largest weights."""

from collections.abc import Mapping

import torch
from torch import nn

from convexprune.solvers.errors import InvalidInput


def magnitude_prune_(model: nn.Module, keep: Mapping[str, int]) -> None:
    """Set all but the ``keep[name]`` entries of largest magnitude in each named module's weight to zero, in place.

    Biases stay. Among equal magnitudes the entry that comes first is kept, so that the count is exact.

    Raises:
        InvalidInput: No module of that name with a weight, or a number of entries that it does not have.
    """
    weights = {name: _weight(model, name) for name in keep}
    for name, count in keep.items():
        if not 0 <= count <= weights[name].numel():
            raise InvalidInput(f"keep[{name!r}]: expected 0 to {weights[name].numel()} entries, found {count}")
    with torch.no_grad():
        for name, count in keep.items():
            flat = weights[name].view(-1)
            flat[flat.abs().argsort(descending=True, stable=True)[count:]] = 0


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    try:
        return model.get_submodule(name).get_parameter("weight")
    except AttributeError as error:
        raise InvalidInput(f"the model has no module {name!r} with a weight") from error
