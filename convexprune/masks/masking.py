"""Masks on modules' weights: which can have one, how it is put on, taken off and loaded, and those of torch itself."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from convexprune.errors import NothingToPrune, UnsupportedModule
from convexprune.layers.memory import Holders
from convexprune.network.choosing import is_chosen, name_patterns, unmatched
from convexprune.network.forwards import check_module, restoring
from convexprune.network.weights import resize_
from convexprune.solvers.errors import InvalidInput

_WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # nn.MultiheadAttention's
_KEY = re.compile(r"(?:(.+)\.)?parametrizations\.(\w+)\.0\.mask")


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
class _Weight:
    """A weight, by the module that holds it."""

    path: str
    module: nn.Module
    name: str

    @property
    def key(self) -> str:
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
    def original(self) -> nn.Parameter | None:
        """The Parameter that is trained: the module's own, or that of the parametrizations; None if it has neither."""
        held = self.module if self.chain is None else self.chain
        return held._parameters.get(self.name if self.chain is None else "original")

    @property
    def tensor(self) -> Tensor:
        return cast(Tensor, getattr(self.module, self.name)).detach()

    def obstacle(self) -> str | None:
        """Why the weight cannot have a mask, and what to do about it; None if it can, or has one."""
        own = self.original
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
        self._own_class_()
        parametrize.register_parametrization(self.module, self.name, Mask(mask, order))

    def remove_mask_(self) -> None:
        """Take the mask off, leave the original as it is, and put it back in its place among the parameters."""
        order = parameter_order(self.module)
        self._own_class_()
        parametrize.remove_parametrizations(self.module, self.name, leave_parametrized=False)
        parameters = self.module._parameters
        for name in sorted(parameters, key=[*order, *parameters].index):
            parameters[name] = parameters.pop(name)

    def _own_class_(self) -> None:
        """Give a parametrized module a class of its own: a deep copy shares the one that holds its properties."""
        if parametrize.is_parametrized(self.module):
            kind = type(self.module)
            body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            self.module.__class__ = type(kind.__name__, kind.__bases__, body)


def masked(model: nn.Module) -> list[tuple[_Weight, Mask]]:
    """All weights with a mask; raises UnsupportedModule if another parametrization is on top of one."""
    modules = check_module(model).named_modules()
    weights = [_Weight(path, module, name) for path, module in modules for name in _chains(module)]
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


def check_ties(model: nn.Module, chosen: Iterable[_Weight], masked: Iterable[_Weight]) -> None:
    """Raise UnsupportedModule if a weight that gets a mask shares memory with one of a module that is not chosen."""
    tensors = (own for one in model.modules() for own in (*one._parameters.values(), *one._buffers.values()))
    used = [own for own in tensors if own is not None]
    left_out = Counter(map(id, used)) - Counter(id(weight.original) for weight in chosen)
    holders = Holders((own, None) for own in used if left_out[id(own)])
    if shared := next((weight for weight in masked if holders.of(cast(Tensor, weight.original))), None):
        why = "is shared with a module that the patterns leave out, where its zeros would not stay"
        advice = "choose all modules that share it, or untie them. The model is unchanged"
        raise UnsupportedModule(f"{shared.key} {why}: {advice}")


def _matrices(path: str, module: nn.Module) -> list[_Weight]:
    """The module's weights of two axes or more, its own or computed."""
    found = []
    for weight in (_Weight(path, module, name) for name in _WEIGHTS):
        plain = (weight.original, vars(module).get(weight.name))  # torch.nn.utils.prune leaves a plain attribute
        values = plain if weight.chain is None else weight.chain.parameters()
        if any(isinstance(value, Tensor) and (nn.parameter.is_lazy(value) or value.dim() >= 2) for value in values):
            found.append(weight)
    return found


def _chains(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    found = module.parametrizations if parametrize.is_parametrized(module) else nn.ModuleDict()
    return dict(cast(Mapping[str, parametrize.ParametrizationList], found).items())


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
    patterns = ["*"] if layers is None else name_patterns(layers)
    weights = [weight for path, module in model.named_modules() for weight in _matrices(path, module)]
    if idle := unmatched(patterns, [weight.path for weight in weights]):
        names = ", ".join(dict.fromkeys(weight.path or "the model" for weight in weights)) or "none"
        raise NothingToPrune(f"no module with a weight matrix matches {idle}. The modules with one: {names}")
    chosen = [weight for weight in weights if is_chosen(weight.path, patterns)]
    for weight in chosen:
        if reason := weight.obstacle():
            raise UnsupportedModule(f"{weight.key} {reason}, or leave it out with layers=. The model is unchanged")
    masks = {weight: weight.tensor != 0 for weight in chosen}
    check_ties(model, chosen, [weight for weight, mask in masks.items() if not mask.all()])
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
            cast(Tensor, weight.original).masked_fill_(~mask.mask, 0)
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

    Raises as ``make_permanent_``.
    """
    for weight, mask in masked(model):
        weight.remove_mask_()
        hook = prune.CustomFromMask.apply(weight.module, weight.name, mask.mask)  # type: ignore[no-untyped-call]
        vars(hook).update(order=mask.order)


def from_torch_prune_(model: nn.Module) -> dict[str, Tensor]:
    """Take over all masks of ``torch.nn.utils.prune``, those of biases too; the Parameter objects stay.

    Parameters come back in the order of before ``to_torch_prune_``, else they stay in that of ``torch.nn.utils.prune``.
    Returns the masks as ``keep_masks_`` does.

    Raises:
        UnsupportedModule: A mask holds other values than 0 and 1, or belongs to a recurrent layer, whose weights cannot
            be parametrized; or as in ``kept_masks``. The model is unchanged.
    """
    masked(model)  # refuses before anything is changed
    found = [
        (_Weight(path, module, hook._tensor_name), number)
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
    for weight, number in found:
        module, name = weight.module, weight.name
        order = vars(module._forward_pre_hooks.pop(number)).get("order", parameter_order(module))
        original, mask = module.get_parameter(f"{name}_orig"), module.get_buffer(f"{name}_mask")
        for attribute in (name, f"{name}_orig", f"{name}_mask"):
            delattr(module, attribute)
        module.register_parameter(name, original)
        weight.add_mask_(mask != 0, order)
    return kept_masks(model)


@contextmanager
def _adding(masks: Mapping[_Weight, Tensor]) -> Iterator[None]:
    """Register masks that change no weight; if anything fails they are taken off again."""
    with ExitStack() as undoing:
        for weight, mask in masks.items():
            weight.add_mask_(mask, parameter_order(weight.module))
            undoing.callback(weight.remove_mask_)
        yield
        undoing.pop_all()


def _weight_at(model: nn.Module, path: str | None, name: str) -> _Weight:
    """The weight that a key of a state dict names."""
    try:
        weight = _Weight(path or "", model.get_submodule(path or ""), name)
    except AttributeError as error:
        raise InvalidInput(f"the state has a mask of {path}.{name}, and the model no such module") from error
    if not isinstance(getattr(weight.module, name, None), Tensor):
        raise InvalidInput(f"the state has a mask of {weight.key}, which the model does not have")
    if reason := weight.obstacle():
        raise UnsupportedModule(f"the state has a mask of {weight.key}, which {reason}. The model is unchanged")
    return weight
