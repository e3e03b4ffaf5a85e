"""Where masks are: the parametrization, the weights that have it, and the order of a module's parameters."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convexprune.errors import UnsupportedModule
from convexprune.network.choosing import check_module


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


@dataclass(frozen=True)
class Site:
    """A place for a mask: a weight, by the module that holds it."""

    path: str
    module: nn.Module
    name: str

    @property
    def key(self) -> str:
        """The weight's qualified name."""
        return f"{self.path}.{self.name}".removeprefix(".")

    @property
    def chain(self) -> parametrize.ParametrizationList | None:
        """What computes the weight, if anything does."""
        return _chains(self.module).get(self.name)

    @property
    def mask(self) -> Mask | None:
        """The weight's mask, if that alone computes it."""
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


def masked(model: nn.Module) -> list[tuple[Site, Mask]]:
    """All sites with a mask.

    Raises:
        UnsupportedModule: Another parametrization was put on top of a mask.
        InvalidInput: The model is no module.
    """
    modules = check_module(model).named_modules()
    sites = [Site(path, module, name) for path, module in modules for name in _chains(module)]
    for site in sites:
        if site.mask is None and any(isinstance(step, Mask) for step in site.chain or ()):
            remedy = "take both off by torch.nn.utils.parametrize.remove_parametrizations, which leaves the zeros"
            raise UnsupportedModule(f"{site.key}: a parametrization is on top of its mask, {remedy}")
    return [(site, site.mask) for site in sites if site.mask is not None]


def parameter_order(module: nn.Module) -> tuple[str, ...]:
    """The module's own parameters in their order without any mask of ours, pruned ones by their plain names."""
    steps = [step for chain in _chains(module).values() for step in cast(nn.ModuleList, chain)]
    kept = next((step.order for step in steps if isinstance(step, Mask)), None)
    return kept or tuple(
        name.removesuffix("_orig") if f"{name.removesuffix('_orig')}_mask" in module._buffers else name
        for name in module._parameters
    )


def _chains(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    if not parametrize.is_parametrized(module):
        return {}
    return dict(cast(dict[str, parametrize.ParametrizationList], module.parametrizations).items())
