"""What a forward changes in its model besides its outputs, taken back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convexprune.network.memory import overlaps_itself
from convexprune.network.watch import tensors_in


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Afterwards modules have the attributes and buffers of before, with their values; parameters do not count.

    Lazy modules, which a first forward completes, stay complete; of compiled ones the values of buffers are looked at.
    """
    modules = [
        module for module in model.modules() if not (_is_lazy(module) or isinstance(module, torch.jit.ScriptModule))
    ]
    attributes = [(module, dict(vars(module))) for module in modules]
    buffers = [(module._buffers, dict(module._buffers)) for module in modules]
    tensors = [*tensors_in([found for _, found in attributes]), *model.buffers()]
    held = {id(own): own for own in tensors if _may_change(own)}
    values = [(own, own.detach(), own.detach().clone()) for own in held.values()]
    try:
        yield
    finally:
        for module, found in attributes:
            vars(module).clear()
            vars(module).update(found)
        for now, before in buffers:
            now.clear()
            now.update(before)
        with torch.no_grad():
            for own, place, value in values:
                _put_back(own, place, value)


def _is_lazy(module: nn.Module) -> bool:
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(nn.parameter.is_lazy(tensor) for tensor in own)


def _may_change(own: Tensor) -> bool:
    """What has no values yet, or was made in inference mode, cannot be changed here."""
    if isinstance(own, nn.Parameter) or nn.parameter.is_lazy(own):
        return False
    return not (own.is_meta or own.layout != torch.strided or own.is_inference())


def _put_back(own: Tensor, place: Tensor, value: Tensor) -> None:
    if (own.data_ptr(), own.shape) != (place.data_ptr(), place.shape):
        own.data = place
    # By value: what writes through .data or numpy leaves no other trace. NaN is not equal to itself, and is copied.
    if not (torch.equal(own, value) or overlaps_itself(own)):
        own.copy_(value)
