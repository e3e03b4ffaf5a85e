"""Modules' weights as places for masks: the parametrization, and which weights can have it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convexprune.errors import NothingToPrune, UnsupportedModule
from convexprune.network.choosing import check_module, is_chosen, name_patterns, unmatched
from convexprune.network.memory import Holders

_WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # nn.MultiheadAttention's


class Mask(nn.Module):
    """The parametrization original ∘ mask: 0 wherever the mask is False, and no gradient there, whatever the original.

    Attributes:
        mask: True where the weight stays; a bool buffer of the weight's shape, so it is saved, loaded and moved.
        order: The module's parameters in the order before, in which they come back.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, order: tuple[str, ...]) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.order = order

    def forward(self, original: Tensor) -> Tensor:
        """The masked weight."""
        return torch.where(self.mask, original, 0)  # a product would keep NaN and infinity, and pass them back


@dataclass(frozen=True)
class ModuleWeight:
    """A weight, by the module that holds it."""

    path: str
    module: nn.Module
    name: str

    @property
    def key(self) -> str:
        """The weight's qualified name."""
        return f"{self.path}.{self.name}".removeprefix(".")

    @property
    def chain(self) -> parametrize.ParametrizationList | None:
        """The parametrizations that compute the weight, if it has any."""
        return _chains(self.module).get(self.name)

    @property
    def mask(self) -> Mask | None:
        """The weight's mask, if that is its only parametrization."""
        only = list(self.chain or ())
        return only[0] if len(only) == 1 and isinstance(only[0], Mask) else None

    @property
    def own(self) -> nn.Parameter | None:
        """The module's own Parameter of that name, if it has one."""
        return dict(self.module.named_parameters(recurse=False, remove_duplicate=False)).get(self.name)

    @property
    def original(self) -> nn.Parameter:
        """The Parameter that is trained."""
        return cast(nn.Parameter, getattr(self.module, self.name) if self.chain is None else self.chain.original)

    @property
    def tensor(self) -> Tensor:
        """The weight as the module computes with it."""
        return cast(Tensor, getattr(self.module, self.name)).detach()

    def obstacle(self) -> str | None:
        """Why the weight cannot have a mask, and what to do about it; None if it can, or has one."""
        own = self.own
        if self.mask is not None:
            return None
        if self.chain is not None:
            kinds = ", ".join(type(step).__name__ for step in self.chain)
            return f"is parametrized already, by {kinds}: make that permanent with parametrize.remove_parametrizations"
        if own is None:
            return "is computed from other tensors: from_torch_prune_ takes masks over, remove_weight_norm a norm off"
        if nn.parameter.is_lazy(own) or own.is_meta:
            return "has no values yet: load the weights, or run the model once on a batch"
        if own.layout != torch.strided or isinstance(self.module, torch.jit.ScriptModule | nn.RNNBase):
            return f"is no parameter that can be parametrized ({type(self.module).__name__}, {own.layout})"
        return None

    def add_mask_(self, mask: Tensor, order: tuple[str, ...]) -> None:
        """Parametrize the weight by the mask; ``order`` is that of the module's parameters."""
        if parametrize.is_parametrized(self.module):
            self._own_class_()
        parametrize.register_parametrization(self.module, self.name, Mask(mask, order))

    def remove_mask_(self) -> None:
        """Take the mask off and leave the original as it is.

        ``remove_parametrizations`` would move the parameter, and take the weight away from copies of the module.
        """
        module, original, order = self.module, self.original, parameter_order(self.module)
        self._own_class_(without=self.name)
        chains = cast(nn.ModuleDict, module.parametrizations)
        del chains[self.name]
        if not chains:
            delattr(module, "parametrizations")
            module.__class__ = type(module).__bases__[0]
        module.register_parameter(self.name, original)
        rank = {name: place for place, name in enumerate(order)}
        for name in sorted(module._parameters, key=lambda name: rank.get(name, len(rank))):
            module._parameters[name] = module._parameters.pop(name)

    def _own_class_(self, without: str | None = None) -> None:
        """Give a parametrized module a class of its own: a deep copy shares the one that holds its properties."""
        kind = type(self.module)
        body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__", without)}
        self.module.__class__ = type(kind.__name__, kind.__bases__, body)


def masked(model: nn.Module) -> list[tuple[ModuleWeight, Mask]]:
    """All weights with a mask; raises UnsupportedModule if another parametrization is on top of one."""
    modules = check_module(model).named_modules()
    weights = [ModuleWeight(path, module, name) for path, module in modules for name in _chains(module)]
    for weight in weights:
        if weight.mask is None and any(isinstance(step, Mask) for step in weight.chain or ()):
            remedy = "take both off by torch.nn.utils.parametrize.remove_parametrizations, which leaves the zeros"
            raise UnsupportedModule(f"{weight.key}: a parametrization is on top of its mask, {remedy}")
    return [(weight, weight.mask) for weight in weights if weight.mask is not None]


def parameter_order(module: nn.Module) -> tuple[str, ...]:
    """The module's own parameters in their order without any mask of ours, pruned ones by their plain names."""
    steps = [step for chain in _chains(module).values() for step in cast(nn.ModuleList, chain)]
    kept = next((step.order for step in steps if isinstance(step, Mask)), None)
    return kept or tuple(
        name.removesuffix("_orig") if f"{name.removesuffix('_orig')}_mask" in module._buffers else name
        for name in module._parameters
    )


def chosen_weights(model: nn.Module, layers: str | Iterable[str] | None) -> list[ModuleWeight]:
    """The weights of two axes or more in the modules that the patterns choose; raises as ``keep_masks_``."""
    patterns = ["*"] if layers is None else name_patterns(layers)
    modules = check_module(model).named_modules()
    weights = [weight for path, module in modules for weight in _matrices(path, module)]
    if idle := unmatched(patterns, [weight.path for weight in weights]):
        names = ", ".join(dict.fromkeys(weight.path or "the model" for weight in weights)) or "none"
        raise NothingToPrune(f"no module with a weight matrix matches {idle}. The modules with one: {names}")
    chosen = [weight for weight in weights if is_chosen(weight.path, patterns)]
    for weight in chosen:
        if reason := weight.obstacle():
            raise UnsupportedModule(f"{weight.key} {reason}, or leave it out with layers=. The model is unchanged")
    return chosen


def check_ties(model: nn.Module, chosen: Iterable[ModuleWeight], masked: Iterable[ModuleWeight]) -> None:
    """Raise UnsupportedModule if a weight that gets a mask shares memory with one of a module that is not chosen."""
    used = [
        own
        for module in model.modules()
        for named in (module.named_parameters, module.named_buffers)
        for _, own in named(recurse=False, remove_duplicate=False)
    ]
    left_out = Counter(map(id, used)) - Counter(id(weight.original) for weight in chosen)
    holders = Holders((own, None) for own in used if left_out[id(own)])
    for weight in masked:
        if holders.of(weight.original):
            why = "is shared with a module that the patterns leave out, where its zeros would not stay"
            advice = "choose all modules that share it, or untie them. The model is unchanged"
            raise UnsupportedModule(f"{weight.key} {why}: {advice}")


def _matrices(path: str, module: nn.Module) -> list[ModuleWeight]:
    """The module's weights of two axes or more, its own or computed."""
    found = []
    for weight in (ModuleWeight(path, module, name) for name in _WEIGHTS):
        plain = (weight.own, vars(module).get(weight.name))  # torch.nn.utils.prune leaves a plain attribute
        values = plain if weight.chain is None else weight.chain.parameters()
        if any(isinstance(value, Tensor) and (nn.parameter.is_lazy(value) or value.dim() >= 2) for value in values):
            found.append(weight)
    return found


def _chains(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    found = module.parametrizations if parametrize.is_parametrized(module) else nn.ModuleDict()
    return dict(cast(Mapping[str, parametrize.ParametrizationList], found).items())
