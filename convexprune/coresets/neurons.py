"""Neurons and filters chosen, and removed, layer by layer."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from convexprune.coresets.base import Guarantee, Neurons, Scores
from convexprune.coresets.network import Seen, neurons_of, product_error, reach_of_inputs
from convexprune.coresets.recipe import Recipe, See, spread
from convexprune.coresets.rows import Pruned, shareless, status_of
from convexprune.coresets.sizes import Choice, Size, choose, layer_sizes, shared_sizes
from convexprune.errors import NothingToPrune
from convexprune.network.links import Link, find_links
from convexprune.network.patterns import is_chosen, name_patterns, unmatched
from convexprune.network.shrink import mask_neurons_, remove_neurons_
from convexprune.report.report import LayerReport, SkippedModule


@dataclass(frozen=True, eq=False)
class _View:
    """The network as it is now, with what its layers saw, and how large their inputs were, when it was whole."""

    model: nn.Module
    seen: Seen
    reach: Mapping[str, float | None]

    def neurons(self, link: Link) -> Neurons:
        """A link's, as the methods see them."""
        return neurons_of(self.model, link, self.seen, self.reach[link.producer])


@dataclass(frozen=True, eq=False)
class _Made:
    """What became of one link."""

    scores: Scores
    choice: Choice
    size: Size | Tensor
    kept: int
    error: float
    uniform: float
    samples: int
    comments: tuple[str, ...]
    seconds: float


def prune_neurons_(model: nn.Module, patterns: str | Iterable[str] | None, recipe: Recipe, see: See) -> Pruned:
    """Remove, or mask, neurons of every link that the patterns choose; a row for each module that changed.

    Raises:
        As ``coreset_prune_``.
    """
    links, skipped = _chosen(model, patterns)
    touched = _touched(model, links)
    before = {name: int(model.get_submodule(name).get_parameter("weight").count_nonzero()) for name in touched}
    widths = {name: len(model.get_submodule(name).get_parameter("weight")) for name in touched}
    capture = see(touched)
    seen = {} if capture is None else capture.layers
    view = _View(model, seen, {name: reach_of_inputs(model.get_submodule(name), seen.get(name)) for name in links})
    sizes: Mapping[str, Size | Tensor] = layer_sizes(recipe.size, list(links))
    if recipe.scope == "network":
        sizes = _shared(view, links, touched, recipe)
    made = {}
    ordered = list(links.values())
    for number, link in enumerate(ordered if recipe.order == "bottom-up" else ordered[::-1]):
        recipe.tell(link.producer, number, len(links))
        made[link.producer] = _prune_(view, link, sizes[link.producer], recipe)
    recipe.tell(ordered[-1].producer, len(links), len(links))
    rows = [_row(model, name, made.get(name), before[name], widths[name]) for name in touched]
    return Pruned(rows, skipped, capture)


def _chosen(model: nn.Module, patterns: str | Iterable[str] | None) -> tuple[dict[str, Link], list[SkippedModule]]:
    links, skipped = find_links(model)
    reasons = [f"{module.name}: {module.reason}" for module in skipped]
    wanted = ["*"] if patterns is None else name_patterns(patterns)
    if not wanted:
        raise NothingToPrune("layers: expected patterns of names, found none; leave it out for every layer")
    idle = unmatched(wanted, links, (module.name for module in skipped))
    chosen = {name: link for name, link in links.items() if is_chosen(name, wanted)}
    if idle or not chosen:
        found = "; ".join(reasons) or "it has no Linear or Conv2d layer"
        raise NothingToPrune(f"layers: {idle or wanted} match no layer of which neurons can be removed: {found}")
    left = {name: type(model.get_submodule(name)).__name__ for name in links if name not in chosen}
    unwanted = [SkippedModule(name, kind, "not chosen by the name patterns") for name, kind in left.items()]
    return chosen, [*skipped, *unwanted]


def _touched(model: nn.Module, links: Mapping[str, Link]) -> list[str]:
    """Producers and consumers, in the model's order."""
    names = {name for link in links.values() for name in (link.producer, *link.consumers)}
    return [name for name, _ in model.named_modules() if name in names]


def _prune_(view: _View, link: Link, size: Size | Tensor, recipe: Recipe) -> _Made:
    began = time.perf_counter()
    layer = view.neurons(link)
    [scores] = recipe.method.score([layer])
    choice = choose(recipe.method, scores, size, recipe.rng, len(layer.incoming))
    factors = choice.factors
    if not bool((factors > 0).any()):  # no neuron adds anything; a layer needs one all the same
        factors = factors.clone().index_fill_(1, torch.tensor([0], device=factors.device), 1.0)
    kept = (factors[0] > 0).nonzero()[:, 0]
    products = list(layer.products)
    error = product_error(products, spread(factors, products))
    uniform = recipe.uniform_error([(layer, len(kept), products)])
    scales = factors[0][kept]
    apply_ = remove_neurons_ if recipe.remove else mask_neurons_
    apply_(view.model, link, kept, None if bool((scales == 1).all()) else scales)
    X = products[0].inputs
    samples = 0 if X is None else len(X)
    comments = (*scores.notes, *shareless("neurons", scores.sensitivities, factors, recipe.method.needs_inputs))
    return _Made(scores, choice, size, len(kept), error, uniform, samples, comments, time.perf_counter() - began)


def _shared(view: _View, links: Mapping[str, Link], touched: Sequence[str], recipe: Recipe) -> dict[str, Tensor]:
    """One budget of weights, split over the layers by the method, from the whole network's scores."""
    weights = {name: view.model.get_submodule(name).get_parameter("weight") for name in touched}
    numbers = {name: number for number, name in enumerate(links)}
    feeding = {consumer: number for number, link in enumerate(links.values()) for consumer in link.consumers}

    def cost(sizes: Sequence[Tensor]) -> int:
        part = [int(size.sum()) / len(weights[name]) for size, name in zip(sizes, links, strict=True)]
        outputs = {name: part[number] for name, number in numbers.items()}
        inputs = {name: part[number] for name, number in feeding.items()}
        return round(sum(w.numel() * outputs.get(name, 1) * inputs.get(name, 1) for name, w in weights.items()))

    scores = recipe.method.score([view.neurons(link) for link in links.values()])
    budget = recipe.budget(sum(weight.numel() for weight in weights.values()))
    return dict(zip(links, shared_sizes(recipe.method, scores, cost, budget), strict=True))


def _row(model: nn.Module, name: str, made: _Made | None, before: int, width: int) -> LayerReport:
    weight = model.get_submodule(name).get_parameter("weight")
    shape, nonzeros = tuple(weight.shape), int(weight.count_nonzero())
    if made is None:
        row = LayerReport(name, shape, 0, before, nonzeros, math.nan, 0.0, "inputs only")
        return replace(row, items="inputs", kept_items=width, all_items=width)
    guarantee = made.size if isinstance(made.size, Guarantee) else None
    assumptions = made.scores.assumptions(guarantee)
    return LayerReport(
        name=name,
        shape=shape,
        samples=made.samples,
        nonzeros_before=before,
        nonzeros=nonzeros,
        output_error=made.error,
        seconds=made.seconds,
        status=status_of(assumptions, made.choice, guarantee),
        items="neurons",
        kept_items=made.kept,
        all_items=width,
        sampling=made.choice.sampling,
        draws=int(made.choice.asked.sum()),
        uniform_error=made.uniform,
        guarantee=None if guarantee is None else (guarantee.eps, guarantee.delta),
        promise=made.scores.promise,
        assumptions=assumptions,
        notes=made.comments,
        terms=made.scores.terms,
    )
