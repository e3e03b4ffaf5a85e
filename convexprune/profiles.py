"""Architectures as results: the widths that pruning left, scaled to a budget, and built anew to train from scratch.

E. J. Crowley, J. Turner, A. Storkey and M. O'Boyle, Pruning neural networks: is it time to nip it in the bud?, 2018:
what pruning finds may be an architecture rather than weights. A profile holds the widths of a pruned network. The
paper's "copycat" networks are ``profile.scaled(...)``, its "reduced" ones ``Profile.of(model).scaled(...)``.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor, nn

from convexprune import costs
from convexprune.errors import DamagedFile, NothingToPrune, UnsupportedModule
from convexprune.files.weights import StrPath, existing, listed, save_json
from convexprune.layers.kinds import LAYERS
from convexprune.layers.memory import tensors_in
from convexprune.network.calibration import as_batches
from convexprune.network.forwards import check_module, evaluating, run_model, seeded
from convexprune.network.graph import outputs_of
from convexprune.network.links import Link, find_links
from convexprune.network.weights import resize_links_
from convexprune.report.tables import as_text, layer_table
from convexprune.runs.journal import read_json
from convexprune.solvers.arrays import checked_count, checked_positive, checked_radius
from convexprune.solvers.errors import InvalidInput, NonFinite, ShapeMismatch

if TYPE_CHECKING:
    from rich.table import Table

Architecture: TypeAlias = nn.Module | Callable[[], nn.Module]
"""A network, which is left as it is, or a function that makes one."""

_FORMAT = 1
_REMEDY = "write it again by Profile.of(model).save(path)"


@dataclass(frozen=True)
class Profile:
    """How wide the layers of a network are whose widths can change.

    Attributes:
        widths: The neurons, or filters, of each link that ``find_links(model, residual=True)`` finds, by its name, in
            the order of calls: layers whose outputs are added to each other are one link, by the name of the first.
            InvalidTolerance is raised where one is no whole number ≥ 0, InvalidInput where they are no mapping by name.
    """

    widths: Mapping[str, int]

    def __post_init__(self) -> None:
        if not isinstance(self.widths, Mapping) or not all(isinstance(name, str) for name in self.widths):
            raise InvalidInput(f"widths: expected numbers of neurons by the names of layers, found {self.widths!r}")
        checked = {name: checked_count(f"width of {name}", width, least=0) for name, width in self.widths.items()}
        vars(self).update(widths=checked)

    @classmethod
    def of(cls, model: Architecture) -> "Profile":
        """That of a network as it is.

        Raises:
            NothingToPrune: None of its layers can have another width.
            UnsupportedModule: It cannot be traced.
        """
        made = _made(model)
        return cls({name: outputs_of(made.get_submodule(name)) for name in _links_of(made)})

    def times(self, factor: float) -> "Profile":
        """All widths times a factor ≥ 0, rounded, at least 1; layers without neurons stay so.

        Raises:
            InvalidTolerance: The factor is another number.
        """
        scale = checked_radius("factor", factor)
        return Profile({name: max(1, round(scale * width)) if width else 0 for name, width in self.widths.items()})

    def scaled(
        self,
        model: Architecture,
        *,
        weights: float | None = None,
        flops: float | None = None,
        batch: object = None,
    ) -> "Profile":
        """All widths times the largest factor with which the network is within a budget; it may be more than 1.

        Args:
            model: Of this architecture, such as the network before it was pruned.
            weights: A whole number of them, or the part of the model's, a float: 0.5, or 1.0 for as many. Entries of
                parameters with two axes or more count, those of layers whose widths cannot change as well.
            flops: The same of the floating-point operations of a forward on ``batch`` (``convexprune.costs.flops``).
            batch: A tensor [samples, ...], a tuple of positional or a mapping of keyword arguments.

        Raises:
            InvalidInput: Not one of the two budgets, operations without a batch, a budget that one neuron a layer
                exceeds, or a profile without neurons.
            InvalidTolerance: A budget that is no number above 0.
            ShapeMismatch: The profile is that of another architecture.
            NothingToPrune, UnsupportedModule: As in ``of``; and as ``costs.flops``.
        """
        if (weights is None) == (flops is None) or (flops is not None and batch is None):
            raise InvalidInput("scaled: expected weights=, or flops= with batch=; give one of the two budgets")
        dense = _made(model)
        links = _links_of(dense)
        own = self._among(dense, links)
        if not any(own.widths.values()):
            raise InvalidInput("scaled: no layer of the profile has neurons, so that there is nothing to scale")

        @cache
        def size(widths: tuple[int, ...]) -> int:
            network = _resized(dense, links, dict(zip(links, widths, strict=True)))
            return _weights(network) if flops is None else costs.flops(network, batch).dense

        def fits(factor: float) -> bool:
            return size(tuple(own.times(factor).widths.values())) <= limit

        name, budget = ("flops", flops) if weights is None else ("weights", weights)
        limit = _limit(name, budget, size(tuple(Profile.of(dense).widths.values())))
        if not fits(0.0):
            least = size(tuple(own.times(0.0).widths.values()))
            raise InvalidInput(f"{name}: one neuron a layer takes {least:,}, more than the {limit:,.0f} allowed")
        low, high = 0.0, 1.0
        while fits(high):
            low, high = high, 2 * high
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if fits(middle) else (low, middle)
        return own.times(low)

    def _among(self, model: nn.Module, links: Mapping[str, Link]) -> "Profile":
        """The widths of a model's links.

        Where a depthwise convolution was left one channel it is like any other, and links are smaller than the model's:
        their widths are to agree with the model's.
        """
        possible = dict[str, int]()
        for name, link in links.items():
            width, before = self.widths.get(name, 0), outputs_of(model.get_submodule(name))
            along = {other: outputs_of(model.get_submodule(other)) for other in link.along}
            possible |= dict.fromkeys(link.producers, width)
            possible |= {other: outputs // max(before, 1) * width for other, outputs in along.items()}
        missing = [name for name in links if name not in self.widths]
        wrong = [f"{name} ({width:,})" for name, width in self.widths.items() if possible.get(name) != width]
        if missing or wrong:
            parts = {"says nothing of": missing, "has widths that the model's layers cannot have:": wrong}
            found = "; it ".join(f"{what} {listed(names)}" for what, names in parts.items() if names)
            raise ShapeMismatch(f"profile: it {found}. Take the profile of a network of the same architecture")
        return Profile({name: self.widths[name] for name in links})

    def save(self, path: StrPath) -> Path:
        """Write it as JSON, atomically; InvalidInput is raised unless the path ends in .json."""
        if Path(path).suffix.lower() != ".json":
            raise InvalidInput(f"{path}: a profile is written as JSON; give a path ending in .json")
        return save_json({"format": _FORMAT, **self.to_dict()}, path)

    @classmethod
    def load(cls, path: StrPath) -> "Profile":
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: Nothing is at ``path``.
            InvalidInput: It is a folder, has another suffix, or is of another format.
            DamagedFile: It is not what ``save`` writes.
        """
        file, _ = existing(path, (".json",))
        found = read_json(file, _REMEDY)
        if "format" not in found:
            raise DamagedFile(f"{file} is no profile, it has no format number; {_REMEDY}")
        if found["format"] != _FORMAT:
            raise InvalidInput(f"{file}: a profile of format {found['format']!r}, expected {_FORMAT}; {_REMEDY}")
        try:
            return cls(found["widths"])
        except (KeyError, InvalidInput) as error:
            raise DamagedFile(f"{file} holds no widths of layers ({error}); {_REMEDY}") from error

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {"widths": dict(self.widths)}

    def table(self, width: int = 140) -> "Table":
        """A rich table, a row a link."""
        rows = [[name, f"{neurons:,}"] for name, neurons in self.widths.items()]
        without = sum(not neurons for neurons in self.widths.values())
        caption = f"{sum(self.widths.values()):,} neurons" + (f"; {without} layers have none" if without else "")
        return layer_table((), ("layer", "neurons"), rows, (caption,), width)

    def __str__(self) -> str:
        return as_text(self.table)


def build_from_profile(
    model: Architecture,
    profile: Profile,
    *,
    seed: int = 0,
    initialise: Callable[[nn.Module], object] | None = None,
    batch: object = None,
) -> nn.Module:
    """A new network of a profile's widths, with fresh weights, to train from scratch.

    Layers may be narrower than the model's, or wider; those without neurons are as ``remove_neurons_`` leaves them, and
    return zeros. All modules are reset by their own ``reset_parameters()``, children first, batch norms with their
    statistics; other buffers, dtypes, devices, ``requires_grad``, and what is in training mode, stay as in the model.

    Args:
        model: The architecture, of any widths but 0; a module is left as it is.
        profile: Of a network of this architecture.
        seed: Of all random numbers: the same weights, bit for bit, on the same device. torch's state stays as it is.
        initialise: Called after that with each module, children first, as by ``model.apply``, but for layers without
            weights, whose biases are 0.
        batch: One batch, on which the outputs are to be finite, and of the same shapes as the model's.

    Raises:
        ShapeMismatch: The profile is that of another architecture, or outputs on the batch have other shapes.
        InvalidInput: A layer is to have no neurons where a pool needs one, or the network fails on the batch.
        NothingToPrune: No layer of the model can have another width.
        UnsupportedModule: The model cannot be traced, or has parameters, which are named, that nothing resets.
        NonFinite: Outputs on the batch are NaN or infinite.
        InvalidTolerance: The seed is no whole number ≥ 0.
    """
    checked_count("seed", seed, least=0)
    dense = _made(model, seed)
    links = _links_of(dense)
    network = _resized(dense, links, profile._among(dense, links).widths)
    with seeded(network, seed):
        _draw_(network, initialise)
    if batch is not None:
        _check_outputs(network, dense, batch)
    return network


def _made(model: Architecture, seed: int = 0) -> nn.Module:
    """The module, or what the function makes, by random numbers that follow from the seed."""
    if isinstance(model, nn.Module) or not callable(model):
        return check_module(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # buffers may be drawn, too
        return check_module(model())


def _links_of(model: nn.Module) -> dict[str, Link]:
    links, skipped = find_links(model, residual=True)
    if not links:
        reasons = "; ".join(f"{module.name}: {module.reason}" for module in skipped) or "it has no layers"
        raise NothingToPrune(f"none of the model's layers can have another width: {reasons}")
    return links


def _resized(model: nn.Module, links: Mapping[str, Link], widths: Mapping[str, int]) -> nn.Module:
    """A copy with these widths."""
    network = copy.deepcopy(model)
    resize_links_(network, links, widths)
    return network


def _weights(model: nn.Module) -> int:
    return sum(own.numel() for own in model.parameters() if own.dim() >= 2)


def _limit(name: str, budget: float | None, whole: int) -> float:
    """A whole number, or a part of the whole."""
    return checked_count(name, budget) if isinstance(budget, Integral) else checked_positive(name, budget) * whole


@torch.no_grad()
def _draw_(network: nn.Module, initialise: Callable[[nn.Module], object] | None) -> None:
    """New values for all parameters; NaN stands where there are none yet."""
    if lazy := [name for name, own in network.named_parameters() if nn.parameter.is_lazy(own)]:
        raise UnsupportedModule(f"{listed(lazy)}: without a shape yet; run the model once on a batch")
    parameters = {name: own for name, own in network.named_parameters() if own.is_floating_point()}
    for own in parameters.values():
        own.fill_(torch.nan)
    network.apply(_reset_)

    def draw_(module: nn.Module) -> None:
        if initialise is not None and not _lacks_weights(module):
            initialise(module)

    network.apply(draw_)
    if left := [name for name, own in parameters.items() if bool(own.isnan().any())]:
        what = "initialise leaves them" if initialise else "their modules have no reset_parameters() that does; give"
        advice = "without values" if initialise else "initialise=, a function of a module"
        raise UnsupportedModule(f"nothing resets {listed(left)}: {what} {advice}")


def _reset_(module: nn.Module) -> None:
    """Draw the module's own parameters anew."""
    if _lacks_weights(module):  # torch's reset warns, or leaves the bias as it is
        if isinstance(module.bias, nn.Parameter):
            module.bias.zero_()
        return
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()


def _lacks_weights(module: nn.Module) -> bool:
    return isinstance(module, LAYERS) and not cast(Tensor, module.weight).numel()


def _check_outputs(network: nn.Module, model: nn.Module, batch: object) -> None:
    checked, found = as_batches([batch])[0], []
    for one in (network, model):
        with evaluating(one):
            found.append([tensor.detach() for tensor in tensors_in(run_model(one, checked, None))])
    shapes, expected = ([list(tensor.shape) for tensor in outputs] for outputs in found)
    if shapes != expected:
        raise ShapeMismatch(f"the built network returns {shapes}, and the model {expected}: a shape was not followed")
    if not all(bool(tensor.isfinite().all()) for tensor in found[0]):
        raise NonFinite("the built network returns NaN or infinity on the batch: give another initialise=")
