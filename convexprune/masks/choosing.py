"""Which weights can have a mask, and why others cannot."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from convexprune.errors import NothingToPrune, UnsupportedModule
from convexprune.masks.sites import Site
from convexprune.network.choosing import check_module
from convexprune.network.memory import Holders
from convexprune.network.patterns import is_chosen, name_patterns, unmatched

_WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # nn.MultiheadAttention's


def chosen_sites(model: nn.Module, layers: str | Iterable[str] | None) -> list[Site]:
    """The weights of two axes or more in the modules that the patterns choose; None chooses all.

    Raises:
        NothingToPrune: A pattern matches no module with such a weight, or the model has none.
        UnsupportedModule: A weight cannot have a mask.
        InvalidInput: The model is no module, or a pattern no text.
    """
    patterns = ["*"] if layers is None else name_patterns(layers)
    modules = check_module(model).named_modules()
    sites = [site for path, module in modules for site in _sites_of(path, module)]
    if idle := unmatched(patterns, [site.path for site in sites]):
        names = ", ".join(dict.fromkeys(site.path or "the model" for site in sites)) or "none"
        raise NothingToPrune(f"no module with a weight matrix matches {idle}. The modules with one: {names}")
    chosen = [site for site in sites if is_chosen(site.path, patterns)]
    for site in chosen:
        if reason := obstacle(site):
            raise UnsupportedModule(f"{site.key} {reason}, or leave it out with layers=. The model is unchanged")
    return chosen


def obstacle(site: Site) -> str | None:
    """Why the weight cannot have a mask, and what to do about it; None if it can, or has one."""
    if site.mask is not None:
        return None
    own = site.own
    if site.chain is not None:
        kinds = ", ".join(type(step).__name__ for step in site.chain)
        return f"is parametrized already, by {kinds}: make that permanent with parametrize.remove_parametrizations"
    if own is None:
        return "is computed from other tensors: from_torch_prune_ takes masks over, remove_weight_norm a norm off"
    if nn.parameter.is_lazy(own) or own.is_meta:
        return "has no values yet: load the weights, or run the model once on a batch"
    if own.layout != torch.strided or isinstance(site.module, torch.jit.ScriptModule | nn.RNNBase):
        return f"is no parameter that can be parametrized ({type(site.module).__name__}, {own.layout})"
    return None


def check_ties(model: nn.Module, chosen: Iterable[Site], masked: Iterable[Site]) -> None:
    """A weight whose memory is shared must be masked wherever it is used.

    Raises:
        UnsupportedModule: One that gets a mask is used by a module that is not chosen.
    """
    known = Counter(id(site.original) for site in chosen)
    used = [own for module in model.modules() for own in _own(module)]
    left_out = Counter(map(id, used)) - known
    holders = Holders((own, None) for own in used if left_out[id(own)])
    for site in masked:
        if holders.of(site.original):
            raise UnsupportedModule(
                f"{site.key} is shared with a module that the patterns leave out, where its zeros would not stay: "
                "choose all modules that share it, or untie them. The model is unchanged"
            )


def _own(module: nn.Module) -> list[Tensor]:
    """Its own tensors, as often as it has them."""
    named = (module.named_parameters, module.named_buffers)
    return [own for each in named for _, own in each(recurse=False, remove_duplicate=False)]


def _sites_of(path: str, module: nn.Module) -> list[Site]:
    sites = [Site(path, module, name) for name in _WEIGHTS]
    return [site for site in sites if any(map(_is_matrix, _tensors_of(site)))]


def _tensors_of(site: Site) -> list[object]:
    """What the module has, or computes, under the weight's name; a computed one lies among its plain attributes."""
    if site.chain is not None:
        return list(site.chain.parameters())
    return [site.own, vars(site.module).get(site.name)]


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and (nn.parameter.is_lazy(value) or value.dim() >= 2)
