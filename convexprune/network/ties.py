"""Weights that several modules share, found by the memory they lie in, not by the objects that hold them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from convexprune.layers.support import kind_of, unsupported
from convexprune.network.memory import Holders, place_of
from convexprune.network.taps import tap


@dataclass(frozen=True, eq=False)
class Ties:
    """What the modules of a model share; those that share nothing are in neither mapping.

    Attributes:
        uses: For each layer that has the very same weight and bias as others, the names of all of them, in the model's
            order. They are one layer, to be solved once for all its uses.
        refused: For each module that shares a parameter in another way, with whom, and what to do.
    """

    uses: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str]

    @property
    def several(self) -> list[tuple[str, ...]]:
        """The names of each layer that has several, the first of them first."""
        return list(dict.fromkeys(self.uses.values()))

    def uses_of(self, name: str) -> tuple[str, ...]:
        """All names of the layer; its own if it shares nothing."""
        return self.uses.get(name, (name,))


def find_ties(model: nn.Module, joint: bool = True) -> Ties:
    """Which modules of a model share parameters, as one layer or otherwise.

    Memory is shared where tensors have an entry in common. Modules are one layer if all tensors of their products lie
    in the same places, in the same shapes, and they are of one kind, with the same stride, padding and dilation.

    Args:
        model: Any module.
        joint: Whether layers may be solved together; if not, all that share a parameter are refused.

    Raises:
        UnsupportedModule: The model is compiled by ``torch.jit``.
    """
    modules = named_uses(model)
    shared = _overlaps(modules)
    same = {name: _identity(modules[name]) if joint else None for name in shared}
    uses, refused = {}, {}
    for name, others in shared.items():
        if same[name] is not None and all(same[other] == same[name] for other in others):
            uses[name] = tuple(other for other in modules if other in others | {name})
        else:
            refused[name] = _refusal([other for other in modules if other in others], joint)
    return Ties(uses, refused)


def layer_uses(model: nn.Module, name: str) -> tuple[str, ...]:
    """All names under which the layer is used, in the model's order; each has a ``tap`` of its own.

    For many layers call ``find_ties`` once, and its ``uses_of`` for each.

    Raises:
        InvalidInput: The model has no such module.
    """
    tap(model, name)
    return find_ties(model).uses_of(name)


def named_uses(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by qualified name, each once, as in ``model.named_modules()``.

    A module of two names is one module, called twice; only an ``out_proj`` of two MultiheadAttentions is listed for
    both, which call no module.
    """
    found: dict[tuple[int, int], tuple[str, nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault((id(module), id(tap(model, name).module)), (name, module))
    return dict(found.values())


def _refusal(others: Collection[str], joint: bool) -> str:
    names = ", ".join(repr(name) if name else "the model itself" for name in others)
    only = "weights can be pruned for one use only"
    if joint:
        only = "only layers of one kind with the very same weight, bias and settings are pruned together"
    return f"shares a parameter with {names}, and {only}: untie them, by a copy of the parameter"


def _overlaps(modules: Mapping[str, nn.Module]) -> dict[str, set[str]]:
    """Which modules each module shares memory with, if any; what only buffers share is never pruned."""
    held = [(tensor, name) for name, module in modules.items() for tensor in _own(module)]
    everyone = Holders((tensor, (name, isinstance(tensor, nn.Parameter))) for tensor, name in held)
    shared: dict[str, set[str]] = {}
    for tensor, name in held:
        for other, trained in everyone.of(tensor):
            if other != name and (trained or isinstance(tensor, nn.Parameter)):
                shared.setdefault(name, set()).add(other)
    return shared


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _identity(module: nn.Module) -> tuple[Any, ...] | None:
    """What modules agree in if they are one layer; None if this one cannot be pruned."""
    kind = kind_of(module)
    if kind is None or unsupported(module) is not None:
        return None
    tensors = [tensor for group in kind.groups(module) for tensor in group]
    places = [None if t is None else place_of(t) for t in tensors]
    return (kind.base, *places, *(getattr(module, setting) for setting in kind.settings))
