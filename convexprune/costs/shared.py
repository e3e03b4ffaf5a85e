"""What the measurements share: the weights as they are deployed, their density, and the words for a comparison."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from convexprune.errors import UnsupportedModule
from convexprune.masks import kept_masks, make_permanent_
from convexprune.network.choosing import check_module
from convexprune.solvers.errors import InvalidInput


def permanent(model: nn.Module) -> nn.Module:
    """The model itself, or a copy without masks if it has any.

    Raises:
        InvalidInput: The model is no module, or a parameter of it has no values yet.
        UnsupportedModule: It has masks of ``torch.nn.utils.prune``, or as in ``make_permanent_``.
    """
    if prune.is_pruned(check_module(model)):
        raise UnsupportedModule("the model has masks of torch.nn.utils.prune: take them over with from_torch_prune_")
    for name, own in model.named_parameters():
        checked_tensor(name, own, dense=False)
    if not kept_masks(model):
        return model
    model = copy.deepcopy(model)
    make_permanent_(model)
    return model


def checked_tensor(name: str, value: object, *, dense: bool = True) -> Tensor:
    """The value, detached.

    Raises:
        InvalidInput: It is not a tensor with values, or should be dense and is not.
    """
    if not isinstance(value, Tensor) or nn.parameter.is_lazy(value) or value.is_meta or (dense and _is_sparse(value)):
        raise InvalidInput(f"{name!r} is not a dense tensor with values: load the weights, or leave it out")
    return value.detach()


def density(tensor: Tensor) -> float:
    """The part of the entries that are not zero."""
    return int(tensor.count_nonzero()) / max(tensor.numel(), 1)


def against(what: str, now: int, before: int, unit: str = "bytes") -> str:
    """What it takes now, and how much less or more that is than before."""
    percent = round(100 * (now / max(before, 1) - 1))
    change = "about the same" if percent == 0 else f"{abs(percent)} % {'fewer' if percent < 0 else 'more'}"
    return f"{what} takes {now:,} {unit} ({'the same' if now == before else change})"


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided
