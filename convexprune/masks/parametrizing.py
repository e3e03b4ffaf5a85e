"""Masks put on and taken off, so that Parameters, memory, names and deep copies stay what they are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from convexprune.masks.sites import Mask, Site, parameter_order


@contextmanager
def adding_masks(masks: Mapping[Site, Tensor]) -> Iterator[None]:
    """Register masks that change no weight; if anything fails they are taken off again."""
    done = []
    try:
        for site, mask in masks.items():
            put_on_(site, mask, parameter_order(site.module))
            done.append(site)
        yield
    except BaseException:
        for site in reversed(done):
            take_off_(site)
        raise


def put_on_(site: Site, mask: Tensor, order: tuple[str, ...]) -> None:
    """Parametrize the weight by the mask; ``order`` is that of the module's parameters."""
    if parametrize.is_parametrized(site.module):
        _own_class_(site.module)
    parametrize.register_parametrization(site.module, site.name, Mask(mask, order))


def take_off_(site: Site) -> None:
    """Take the mask off and leave the original as it is.

    ``remove_parametrizations`` would move the parameter into other memory and to the end of the module's, and take the
    weight away from deep copies of the module.
    """
    module, original, order = site.module, site.original, parameter_order(site.module)
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
