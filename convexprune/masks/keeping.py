"""Masks made of zeros, their end, their state dicts, and the bridge to ``torch.nn.utils.prune``."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from convexprune.errors import UnsupportedModule
from convexprune.masks.weights import ModuleWeight, check_ties, chosen_weights, masked, parameter_order
from convexprune.network.weights import resize_, restoring
from convexprune.solvers.errors import InvalidInput

_KEY = re.compile(r"(?:(.+)\.)?parametrizations\.(\w+)\.0\.mask")


def keep_masks_(model: nn.Module, layers: str | Iterable[str] | None = None) -> dict[str, Tensor]:
    """Keep the zeros of the weights: each weight that holds any gets the mask (weight ≠ 0) and computes the same.

    Weights are the ``weight`` of any module that has two axes or more, and the projections of nn.MultiheadAttention;
    not biases, norms and recurrent layers. Called again, it takes masks anew, with the zeros that came since.

    The Parameter objects stay, so an optimiser may be made before or after. A masked module cannot be pickled, and its
    state dict has other keys (``load_masked_state_dict_``); ``make_permanent_`` ends both.

    Args:
        model: A module, pruned in whatever way.
        layers: Shell patterns of qualified module names; None: all.

    Returns:
        The masks now kept, as in ``kept_masks``; a weight without zeros has none.

    Raises:
        NothingToPrune: A pattern matches no module with such a weight, or the model has none.
        UnsupportedModule: A weight is computed from other tensors (weight norm, ``torch.nn.utils.prune``), is no dense
            tensor with values, or is shared with a module that is left out; or as in ``kept_masks``.
        InvalidInput: The model is no module, or a pattern no text. In any case the model is unchanged.
    """
    masked(model)  # refuses before anything is changed
    weights = chosen_weights(model, layers)
    masks = {weight: weight.tensor != 0 for weight in weights}
    check_ties(model, weights, [weight for weight, mask in masks.items() if not mask.all()])
    with _adding({weight: mask for weight, mask in masks.items() if weight.mask is None and not mask.all()}):
        for weight, mask in masks.items():
            if weight.mask is not None:
                weight.mask.mask.copy_(mask)
    return kept_masks(model)


def kept_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks themselves, by the qualified name of the weight ("features.0.weight"); True where it stays.

    Raises:
        UnsupportedModule: Another parametrization was put on top of a mask.
        InvalidInput: The model is no module.
    """
    return {weight.key: mask.mask for weight, mask in masked(model)}


def make_permanent_(model: nn.Module) -> None:
    """Take the masks off again and leave their zeros in the weights, which an optimiser may change from now on.

    Each weight is the same Parameter in the same memory, with its ``grad`` and ``requires_grad``; names and their order
    are as before ``keep_masks_``. Other parametrizations stay.

    Raises:
        UnsupportedModule, InvalidInput: As in ``kept_masks``; the model is unchanged.
    """
    for weight, mask in masked(model):
        with torch.no_grad():
            weight.original.masked_fill_(~mask.mask, 0)
        weight.remove_mask_()


def load_masked_state_dict_(model: nn.Module, state: Mapping[str, Tensor], *, resize: bool = False) -> None:
    """Load the state dict of a masked model, strictly, into one that is freshly built; its weights are masked then too.

    Args:
        model: The architecture, with or without masks.
        state: What ``state_dict()`` gave, or ``load_weights(path)``.
        resize: Whether the masked network had lost neurons, as in ``load_weights_into_``.

    Raises:
        InvalidInput: Keys are missing or unexpected, shapes differ, or the model is no module.
        UnsupportedModule: A weight with a mask in the state is computed from other tensors in the model.
        ShapeMismatch: Layers cannot be resized. In any case nothing was changed.
    """
    with restoring(model):
        if resize:
            resize_(model, {re.sub(r"parametrizations\.(\w+)\.original$", r"\1", key): state[key] for key in state})
        named = [_weight_at(model, *found.groups()) for found in map(_KEY.fullmatch, state) if found]
        weights = {(id(weight.module), weight.name): weight for weight in named if not weight.mask}  # each once
        with _adding({weight: torch.ones_like(weight.tensor, dtype=torch.bool) for weight in weights.values()}):
            try:
                model.load_state_dict(state)
            except RuntimeError as error:
                advice = "build the model that it was saved from; masks that only the model has go by make_permanent_"
                raise InvalidInput(f"the state does not fit the model ({error}); {advice}") from error


def to_torch_prune_(model: nn.Module) -> None:
    """Hand the masks over to ``torch.nn.utils.prune``: ``weight_orig``, ``weight_mask`` and a forward hook.

    Raises:
        UnsupportedModule, InvalidInput: As in ``make_permanent_``.
    """
    for weight, mask in masked(model):
        weight.remove_mask_()
        hook = prune.CustomFromMask.apply(weight.module, weight.name, mask.mask)  # type: ignore[no-untyped-call]
        vars(hook).update(order=mask.order)


def from_torch_prune_(model: nn.Module) -> dict[str, Tensor]:
    """Take over all masks of ``torch.nn.utils.prune``, those of biases too; the Parameter objects stay.

    Parameters come back in the order of before ``to_torch_prune_``; otherwise they stay in that which
    ``torch.nn.utils.prune`` has made of it.

    Returns:
        As in ``keep_masks_``.

    Raises:
        UnsupportedModule: A mask holds other values than 0 and 1, or belongs to a recurrent layer, whose weights cannot
            be parametrized; or as in ``kept_masks``. The model is unchanged.
    """
    masked(model)  # refuses before anything is changed
    found = [
        (ModuleWeight(path, module, hook._tensor_name), number)
        for path, module in model.named_modules()
        for number, hook in module._forward_pre_hooks.items()
        if isinstance(hook, prune.BasePruningMethod)
    ]
    for weight, _ in found:
        mask = weight.module.get_buffer(f"{weight.name}_mask")
        if isinstance(weight.module, nn.RNNBase):
            raise UnsupportedModule(f"{weight.key} belongs to a recurrent layer: make it permanent with prune.remove")
        if not ((mask == 0) | (mask == 1)).all():
            advice = "make it permanent first, with prune.remove"
            raise UnsupportedModule(f"{weight.key}_mask holds other values than 0 and 1: {advice}")
    orders = {weight.module: parameter_order(weight.module) for weight, _ in found}
    for weight, number in found:
        module, name = weight.module, weight.name
        hook = module._forward_pre_hooks.pop(number)
        original, mask = module.get_parameter(f"{name}_orig"), module.get_buffer(f"{name}_mask")
        for attribute in (name, f"{name}_orig", f"{name}_mask"):
            delattr(module, attribute)
        module.register_parameter(name, original)
        weight.add_mask_(mask != 0, vars(hook).get("order", orders[module]))
    return kept_masks(model)


@contextmanager
def _adding(masks: Mapping[ModuleWeight, Tensor]) -> Iterator[None]:
    """Register masks that change no weight; if anything fails they are taken off again."""
    with ExitStack() as undoing:
        for weight, mask in masks.items():
            weight.add_mask_(mask, parameter_order(weight.module))
            undoing.callback(weight.remove_mask_)
        yield
        undoing.pop_all()


def _weight_at(model: nn.Module, path: str | None, name: str) -> ModuleWeight:
    """The weight that a key of a state dict names."""
    try:
        weight = ModuleWeight(path or "", model.get_submodule(path or ""), name)
    except AttributeError as error:
        raise InvalidInput(f"the state has a mask of {path}.{name}, and the model no such module") from error
    if not isinstance(getattr(weight.module, name, None), Tensor):
        raise InvalidInput(f"the state has a mask of {weight.key}, which the model does not have")
    if reason := weight.obstacle():
        raise UnsupportedModule(f"the state has a mask of {weight.key}, which {reason}. The model is unchanged")
    return weight
