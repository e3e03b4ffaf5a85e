"""Masks from the zeros of the weights, and their end."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from convexprune.masks.choosing import check_ties, chosen_sites
from convexprune.masks.parametrizing import adding_masks, take_off_
from convexprune.masks.sites import masked


def keep_masks_(model: nn.Module, layers: str | Iterable[str] | None = None) -> dict[str, Tensor]:
    """Keep the zeros of the weights: each weight that holds any gets the mask (weight ≠ 0) and computes the same.

    Weights are the ``weight`` of any module (Linear, convolutions, Embedding, Transformers' Conv1D, ...) that has two
    axes or more, and the projections of nn.MultiheadAttention. Biases, norms and recurrent layers are left alone.
    Called again, it takes masks anew, so that weights which have become zero since stay so too.

    The Parameter objects stay, so an optimiser may be made before or after. A masked module cannot be pickled, and its
    state dict has other keys (``load_masked_state_dict_``); ``make_permanent_`` ends both.

    Args:
        model: Any module, pruned in whatever way.
        layers: Shell patterns of qualified module names; None: all.

    Returns:
        The masks now kept, by the weight's qualified name, as in ``kept_masks``; a weight without zeros has none.

    Raises:
        NothingToPrune: A pattern matches no module with such a weight, or the model has none.
        UnsupportedModule: A weight is already computed from other tensors (weight norm, ``torch.nn.utils.prune``), is
            no dense tensor with values, or is shared with a module that is left out; or as in ``kept_masks``. The
            model is unchanged.
        InvalidInput: The model is no module, or a pattern no text.
    """
    masked(model)  # refuses before anything is changed
    sites = chosen_sites(model, layers)
    masks = {site: site.tensor != 0 for site in sites}
    check_ties(model, sites, [site for site, mask in masks.items() if not mask.all()])
    with adding_masks({site: mask for site, mask in masks.items() if site.mask is None and not mask.all()}):
        for site, mask in masks.items():
            if site.mask is not None:
                site.mask.mask.copy_(mask)
    return kept_masks(model)


def kept_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks themselves, by the qualified name of the weight ("features.0.weight"); True where it stays.

    Raises:
        UnsupportedModule: Another parametrization was put on top of a mask.
        InvalidInput: The model is no module.
    """
    return {site.key: mask.mask for site, mask in masked(model)}


def make_permanent_(model: nn.Module) -> None:
    """Take the masks off again and leave their zeros in the weights.

    Each weight is the same Parameter in the same memory, with its ``grad`` and ``requires_grad``; names and their order
    are as before ``keep_masks_``. Other parametrizations stay. From now on an optimiser may change the zeros.

    Raises:
        UnsupportedModule: Another parametrization was put on top of a mask. The model is unchanged.
        InvalidInput: The model is no module.
    """
    for site, mask in masked(model):
        with torch.no_grad():
            site.original.masked_fill_(~mask.mask, 0)
        take_off_(site)
