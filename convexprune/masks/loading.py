"""The state dict of a masked model, into one that is freshly built."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from convexprune.errors import UnsupportedModule
from convexprune.masks.choosing import obstacle
from convexprune.masks.parametrizing import adding_masks
from convexprune.masks.sites import Site
from convexprune.network.shrink import resize_, restoring
from convexprune.solvers.errors import InvalidInput

_KEY = re.compile(r"(?:(.+)\.)?parametrizations\.(\w+)\.0\.mask")


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
        named = [_site(model, *found.groups()) for found in map(_KEY.fullmatch, state) if found]
        sites = {(id(site.module), site.name): site for site in named if not site.mask}  # a module may have two names
        with adding_masks({site: torch.ones_like(site.tensor, dtype=torch.bool) for site in sites.values()}):
            try:
                model.load_state_dict(state)
            except RuntimeError as error:
                advice = "build the model that it was saved from; masks that only the model has go by make_permanent_"
                raise InvalidInput(f"the state does not fit the model ({error}); {advice}") from error


def _site(model: nn.Module, path: str | None, name: str) -> Site:
    """The place that a key of a state dict names."""
    try:
        site = Site(path or "", model.get_submodule(path or ""), name)
    except AttributeError as error:
        raise InvalidInput(f"the state has a mask of {path}.{name}, and the model no such module") from error
    if not isinstance(getattr(site.module, name, None), Tensor):
        raise InvalidInput(f"the state has a mask of {site.key}, which the model does not have")
    if reason := obstacle(site):
        raise UnsupportedModule(f"the state has a mask of {site.key}, which {reason}. The model is unchanged")
    return site
