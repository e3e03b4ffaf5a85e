"""Masks that last: the zeros of a pruned network stay zeros while the rest is trained on.

A masked weight is original ∘ mask, by ``torch.nn.utils.parametrize``. The optimiser holds the original, which is the
same Parameter as before; what the mask leaves out gets no gradient, and what momentum or weight decay make of it is
not seen. A mask costs one byte a weight, and a forward one copy of the weight.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from convexprune.errors import NothingToPrune, UnsupportedModule
from convexprune.plan import check_module, name_patterns
from convexprune.shrink import resize_, restoring
from convexprune.solvers.errors import InvalidInput

__all__ = [
    "Mask",
    "from_torch_prune_",
    "keep_masks_",
    "kept_masks",
    "load_masked_state_dict_",
    "make_permanent_",
    "to_torch_prune_",
]

_WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # nn.MultiheadAttention's


class Mask(nn.Module):
    """The parametrization original ∘ mask: 0 wherever the mask is False, and no gradient there, whatever the original.

    Attributes:
        mask: True where the weight stays; a bool buffer of the weight's shape, so it is saved, loaded and moved.
        order: Of the module's parameters before, in which they come back.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, order: tuple[str, ...]) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.order = order

    def forward(self, original: Tensor) -> Tensor:
        """The masked weight."""
        return torch.where(self.mask, original, 0)  # a product would keep NaN and infinity, and pass them back


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
            no dense tensor with values, or is shared with a module that is left out. The model is unchanged.
        InvalidInput: The model is no module, or a pattern no text.
    """
    sites = _chosen(model, layers)
    masks = {site: site.tensor != 0 for site in sites}
    _check_ties(model, sites, [site for site, mask in masks.items() if not mask.all()])
    with _adding_masks({site: mask for site, mask in masks.items() if site.mask is None and not mask.all()}):
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
    return {site.key: mask.mask for site, mask in _masked(model)}


def make_permanent_(model: nn.Module) -> None:
    """Take the masks off again and leave their zeros in the weights.

    Each weight is the same Parameter in the same memory, with its ``grad`` and ``requires_grad``; names and their order
    are as before ``keep_masks_``. Other parametrizations stay. From now on an optimiser may change the zeros.

    Raises:
        UnsupportedModule: Another parametrization was put on top of a mask. The model is unchanged.
        InvalidInput: The model is no module.
    """
    for site, mask in _masked(model):
        with torch.no_grad():
            site.original.masked_fill_(~mask.mask, 0)
        _release_(site)


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
        sites = [_site(model, *found.groups()) for found in map(_KEY.fullmatch, state) if found]
        with _adding_masks({site: torch.ones_like(site.tensor, dtype=torch.bool) for site in sites if not site.mask}):
            try:
                model.load_state_dict(state)
            except RuntimeError as error:
                advice = "build the model that it was saved from; masks that only the model has go by make_permanent_"
                raise InvalidInput(f"the state does not fit the model ({error}); {advice}") from error


_KEY = re.compile(r"(?:(.+)\.)?parametrizations\.(\w+)\.0\.mask")


def to_torch_prune_(model: nn.Module) -> None:
    """Hand the masks over to ``torch.nn.utils.prune``: ``weight_orig``, ``weight_mask`` and a forward hook.

    Raises:
        UnsupportedModule, InvalidInput: As in ``make_permanent_``.
    """
    for site, mask in _masked(model):
        _release_(site)
        hook = prune.CustomFromMask.apply(site.module, site.name, mask.mask)  # type: ignore[no-untyped-call]
        vars(hook).update(order=mask.order)


def from_torch_prune_(model: nn.Module) -> dict[str, Tensor]:
    """Take over all masks of ``torch.nn.utils.prune``, those of biases too; the Parameter objects stay.

    A mask that came from ``to_torch_prune_`` remembers the order of the parameters; otherwise they stay in that which
    ``torch.nn.utils.prune`` has made of it.

    Returns:
        As in ``keep_masks_``.

    Raises:
        UnsupportedModule: A mask holds other values than 0 and 1, or belongs to a recurrent layer, whose weights cannot
            be parametrized. The model is unchanged.
        InvalidInput: The model is no module.
    """
    found = [
        (_Site(path, module, hook._tensor_name), number)
        for path, module in check_module(model).named_modules()
        for number, hook in module._forward_pre_hooks.items()
        if isinstance(hook, prune.BasePruningMethod)
    ]
    for site, _ in found:
        mask = site.module.get_buffer(f"{site.name}_mask")
        if isinstance(site.module, nn.RNNBase):
            raise UnsupportedModule(f"{site.key} belongs to a recurrent layer: make it permanent with prune.remove")
        if not ((mask == 0) | (mask == 1)).all():
            raise UnsupportedModule(f"{site.key}_mask holds other values than 0 and 1: make it permanent first")
    orders = {site.module: _order(site.module) for site, _ in found}
    for site, number in found:
        _take_over_(site, number, orders[site.module])
    return kept_masks(model)


def _take_over_(site: "_Site", number: int, order: tuple[str, ...]) -> None:
    module, name = site.module, site.name
    hook = module._forward_pre_hooks.pop(number)
    original, mask = module.get_parameter(f"{name}_orig"), module.get_buffer(f"{name}_mask")
    for attribute in (name, f"{name}_orig", f"{name}_mask"):
        delattr(module, attribute)
    module.register_parameter(name, original)
    _mask_(site, mask != 0, vars(hook).get("order", order))


@dataclass(frozen=True)
class _Site:
    """A place for a mask: a weight, by the module that holds it."""

    path: str
    module: nn.Module
    name: str

    @property
    def key(self) -> str:
        return f"{self.path}.{self.name}".removeprefix(".")

    @property
    def chain(self) -> parametrize.ParametrizationList | None:
        """What computes the weight, if anything does."""
        if not parametrize.is_parametrized(self.module, self.name):
            return None
        return cast(parametrize.ParametrizationList, cast(nn.ModuleDict, self.module.parametrizations)[self.name])

    @property
    def mask(self) -> Mask | None:
        only = list(self.chain or ())
        return only[0] if len(only) == 1 and isinstance(only[0], Mask) else None

    @property
    def original(self) -> nn.Parameter:
        """The Parameter that is trained."""
        return cast(nn.Parameter, getattr(self.module, self.name) if self.chain is None else self.chain.original)

    @property
    def tensor(self) -> Tensor:
        """The weight as the module computes with it."""
        return cast(Tensor, getattr(self.module, self.name)).detach()


def _chosen(model: nn.Module, layers: str | Iterable[str] | None) -> list[_Site]:
    patterns = ["*"] if layers is None else name_patterns(layers)
    modules = check_module(model).named_modules()
    sites = [_Site(path, module, name) for path, module in modules for name in _WEIGHTS if _holds(module, name)]
    idle = [pattern for pattern in patterns if not any(fnmatchcase(site.path, pattern) for site in sites)]
    if idle:
        names = ", ".join(dict.fromkeys(site.path or "the model" for site in sites)) or "none"
        raise NothingToPrune(f"no module with a weight matrix matches {idle}. The modules with one: {names}")
    chosen = [site for site in sites if any(fnmatchcase(site.path, pattern) for pattern in patterns)]
    for site in chosen:
        _check(site)
    return chosen


def _holds(module: nn.Module, name: str) -> bool:
    """Whether the module has, or computes, a weight of that name with two axes or more."""
    site, own = _Site("", module, name), dict(module.named_parameters(recurse=False, remove_duplicate=False))
    held = list(site.chain.parameters()) if site.chain is not None else [own.get(name, vars(module).get(name))]
    return any(isinstance(value, Tensor) and (nn.parameter.is_lazy(value) or value.dim() >= 2) for value in held)


def _check(site: _Site) -> None:
    if site.mask is not None:
        return
    own = dict(site.module.named_parameters(recurse=False, remove_duplicate=False)).get(site.name)
    reason = None
    if site.chain is not None:
        kinds = ", ".join(type(step).__name__ for step in site.chain)
        reason = f"is parametrized already, by {kinds}: make that permanent with parametrize.remove_parametrizations"
    elif own is None:
        reason = "is computed from other tensors: from_torch_prune_ takes masks over, remove_weight_norm a norm off"
    elif nn.parameter.is_lazy(own) or own.is_meta:
        reason = "has no values yet: load the weights, or run the model once on a batch"
    elif own.layout != torch.strided or isinstance(site.module, torch.jit.ScriptModule | nn.RNNBase):
        reason = f"is no parameter that can be parametrized ({type(site.module).__name__}, {own.layout})"
    if reason is not None:
        raise UnsupportedModule(f"{site.key} {reason}, or leave it out with layers=. The model is unchanged")


def _check_ties(model: nn.Module, chosen: list[_Site], masked: list[_Site]) -> None:
    """A shared weight must be masked wherever it is used."""
    holders = Counter(
        id(own)
        for module in model.modules()
        for _, own in module.named_parameters(recurse=False, remove_duplicate=False)
    )
    known = Counter(id(site.original) for site in chosen)
    for site in masked:
        if holders[id(site.original)] != known[id(site.original)]:
            raise UnsupportedModule(
                f"{site.key} is shared with a module that the patterns leave out, where its zeros would not stay: "
                "choose all modules that share it, or untie them. The model is unchanged"
            )


def _site(model: nn.Module, path: str | None, name: str) -> _Site:
    """The place that a key of a state dict names."""
    try:
        site = _Site(path or "", model.get_submodule(path or ""), name)
    except AttributeError as error:
        raise InvalidInput(f"the state has a mask of {path}.{name}, and the model no such module") from error
    if not isinstance(getattr(site.module, name, None), Tensor):
        raise InvalidInput(f"the state has a mask of {site.key}, which the model does not have")
    _check(site)
    return site


def _masked(model: nn.Module) -> list[tuple[_Site, Mask]]:
    found = []
    for path, module in check_module(model).named_modules():
        for name in cast(nn.ModuleDict, module.parametrizations) if parametrize.is_parametrized(module) else ():
            site = _Site(path, module, name)
            if site.mask is not None:
                found.append((site, site.mask))
            elif any(isinstance(step, Mask) for step in site.chain or ()):
                raise UnsupportedModule(f"{site.key}: a parametrization is on top of its mask, remove that one first")
    return found


@contextmanager
def _adding_masks(masks: Mapping[_Site, Tensor]) -> Iterator[None]:
    """Register masks that change no weight; if anything fails they are taken off again."""
    done = []
    try:
        for site, mask in masks.items():
            _mask_(site, mask, _order(site.module))
            done.append(site)
        yield
    except BaseException:
        for site in reversed(done):
            _release_(site)
        raise


def _order(module: nn.Module) -> tuple[str, ...]:
    """The module's own parameters in their order without any mask of ours, pruned ones by their plain names."""
    chains = cast(nn.ModuleDict, module.parametrizations).values() if parametrize.is_parametrized(module) else ()
    kept = next((step.order for chain in chains for step in cast(nn.ModuleList, chain) if isinstance(step, Mask)), None)
    return kept or tuple(
        name.removesuffix("_orig") if f"{name.removesuffix('_orig')}_mask" in module._buffers else name
        for name in module._parameters
    )


def _mask_(site: _Site, mask: Tensor, order: tuple[str, ...]) -> None:
    if parametrize.is_parametrized(site.module):
        _own_class_(site.module)
    parametrize.register_parametrization(site.module, site.name, Mask(mask, order))


def _release_(site: _Site) -> None:
    """Take the mask off and leave the original as it is.

    ``remove_parametrizations`` would move the parameter into other memory and to the end of the module's, and take the
    weight away from deep copies of the module.
    """
    module, original, order = site.module, site.original, _order(site.module)
    _own_class_(module, without=site.name)
    chains = cast(nn.ModuleDict, module.parametrizations)
    del chains[site.name]
    if not chains:
        delattr(module, "parametrizations")
        module.__class__ = type(module).__bases__[0]
    module.register_parameter(site.name, original)
    rank = {name: place for place, name in enumerate(order)}
    for name in sorted(module._parameters, key=lambda name: rank.get(name, len(rank))):
        module._parameters[name] = module._parameters.pop(name)


def _own_class_(module: nn.Module, without: str | None = None) -> None:
    """Give a parametrized module a class of its own: a deep copy shares the one that holds its properties."""
    kind = type(module)
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__", without)}
    module.__class__ = type(kind.__name__, kind.__bases__, body)
