"""Single weights chosen, layer by layer; the others become zeros."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from convexprune.coresets.base import Edges, Guarantee, Product, Scores, of_edges
from convexprune.coresets.network import edges_of, product_error
from convexprune.coresets.recipe import Recipe, See
from convexprune.coresets.rows import Pruned, shareless, status_of
from convexprune.coresets.sizes import choose, items_kept, layer_sizes, shared_sizes
from convexprune.layers import weight_matrices, write_back_
from convexprune.network.choosing import choose_layers
from convexprune.report.report import Assumption, LayerReport


def prune_edges_(model: nn.Module, patterns: str | Iterable[str] | None, recipe: Recipe, see: See) -> Pruned:
    """Keep some weights of every layer that the patterns choose, rescaled; biases stay. A row for each layer.

    Layers are taken in the order in which the network calls them, where there are data to see it.

    Raises:
        As ``coreset_prune_``.
    """
    layers, skipped = choose_layers(model, patterns, kinds=_KINDS)
    capture = see(choose_layers(model, kinds=_KINDS)[0] if recipe.method.whole_network else layers)
    seen = {} if capture is None else capture.layers
    network = {name: edges_of(name, model.get_submodule(name), seen.get(name)) for name in seen | layers}
    found = iter(recipe.method.score([group for groups in network.values() for group in groups]))
    scores = {name: [next(found) for _ in groups] for name, groups in network.items()}
    edges = {name: groups for name, groups in network.items() if name in layers}
    sizes = _shared(edges, scores, recipe) if recipe.scope == "network" else _own(edges, scores, recipe)
    made = {}
    for number, name in enumerate(edges):
        recipe.tell(name, number, len(edges))
        made[name] = _prune_(layers[name], edges[name], scores[name], sizes[name], recipe)
    recipe.tell([*edges][-1], len(edges), len(edges))
    rows = [made[name] for name in layers]
    if recipe.method.whole_network:
        rows = [_beside(row, rows) for row in rows]
    return Pruned(rows, skipped, capture, {name: _terms(groups) for name, groups in scores.items()})


_KINDS = (nn.Linear, nn.Conv2d)
_Edges = Mapping[str, Sequence[Edges]]
_Scores = Mapping[str, Sequence[Scores]]
_Sizes = dict[str, Sequence[Tensor | Guarantee]]  # of every group of a convolution


def _shared(edges: _Edges, scores: _Scores, recipe: Recipe) -> _Sizes:
    """One budget of weights, split over the layers by the method."""
    flat = [one for name in edges for one in scores[name]]
    budget = recipe.budget(sum(map(_weights, edges.values())))
    shared = iter(shared_sizes(recipe.method, flat, _total, budget))
    return {name: [next(shared) for _ in groups] for name, groups in edges.items()}


def _own(edges: _Edges, scores: _Scores, recipe: Recipe) -> _Sizes:
    """The size of each layer."""
    found: _Sizes = {}
    for name, size in layer_sizes(recipe.size, list(edges)).items():
        if isinstance(size, Guarantee):
            found[name] = [size] * len(edges[name])
        else:
            found[name] = shared_sizes(recipe.method, scores[name], _total, items_kept(size, _weights(edges[name])))
    return found


def _total(sizes: Sequence[Tensor]) -> int:
    return sum(int(size.sum()) for size in sizes)


def _weights(groups: Sequence[Edges]) -> int:
    return sum(group.product.weights.numel() for group in groups)


def _prune_(
    layer: nn.Module,
    edges: Sequence[Edges],
    scores: Sequence[Scores],
    sizes: Sequence[Tensor | Guarantee],
    recipe: Recipe,
) -> LayerReport:
    began = time.perf_counter()
    choices = [choose(recipe.method, one, size, recipe.rng) for one, size in zip(scores, sizes, strict=True)]
    products = [group.product for group in edges]
    factors = [of_edges(choice.factors, p.weights) for choice, p in zip(choices, products, strict=True)]
    error = product_error(products, factors)
    pruned = [(p.weights * F).to(p.weights.dtype) for p, F in zip(products, factors, strict=True)]
    kept = [int(U.count_nonzero()) for U in pruned]
    uniform = recipe.uniform_error([(group, k, [group.product]) for group, k in zip(edges, kept, strict=True)])
    weight = layer.get_parameter("weight")
    before = int(weight.count_nonzero())
    _write_(layer, pruned)
    guarantee = sizes[0] if isinstance(sizes[0], Guarantee) else None
    asked = [one.assumptions(guarantee) for one in scores]
    assumptions = min(asked, key=_hold)  # of the groups of a convolution, those of one that fail, if there is one
    s = [of_edges(one.sensitivities, p.weights) for one, p in zip(scores, products, strict=True)]
    live = _of_nonzero(s, products), _of_nonzero(factors, products)
    choice = replace(choices[0], whole=torch.cat([choice.whole for choice in choices]))
    return LayerReport(
        name=edges[0].name,
        shape=tuple(weight.shape),
        samples=0 if products[0].inputs is None else len(products[0].inputs),
        nonzeros_before=before,
        nonzeros=int(weight.count_nonzero()),
        output_error=error,
        seconds=time.perf_counter() - began,
        status=status_of(assumptions, choice, guarantee),
        items="edges",
        kept_items=sum(kept),
        all_items=weight.numel(),
        sampling=choice.sampling,
        draws=_total([one.asked for one in choices]),
        uniform_error=uniform,
        guarantee=None if guarantee is None else (guarantee.eps, guarantee.delta),
        promise=scores[0].promise,
        assumptions=assumptions,
        notes=(*scores[0].notes, *shareless("nonzero weights", *live, recipe.method.needs_inputs)),
        terms=_terms(scores),
    )


def _of_nonzero(values: Sequence[Tensor], products: Sequence[Product]) -> Tensor:
    """[n] of values [N, M] of each group: those of weights that are not 0."""
    return torch.cat([of[product.weights != 0] for of, product in zip(values, products, strict=True)])


def _hold(assumptions: Sequence[Assumption]) -> bool:
    return all(assumption.holds is not False for assumption in assumptions)


def _terms(scores: Sequence[Scores]) -> dict[str, float]:
    """Of a layer: those of its first group, with the sensitivities of all."""
    terms = scores[0].terms
    return terms | {"S": sum(one.terms["S"] for one in scores)} if "S" in terms else terms


def _beside(row: LayerReport, rows: Sequence[LayerReport]) -> LayerReport:
    """The row with what a promise about the network asks of all its layers; those that are not pruned are whole."""
    if row.guarantee is None:
        return row
    holds = all(_no_weaker(other, row.guarantee) for other in rows)
    network = Assumption("every layer has a guarantee that is no weaker, or is kept whole", holds)
    status = row.status if holds else "assumption fails"
    return replace(row, assumptions=(*row.assumptions, network), status=status)


def _no_weaker(row: LayerReport, guarantee: tuple[float, float]) -> bool:
    whole = row.nonzeros == row.nonzeros_before and row.output_error == 0
    own = row.guarantee
    return whole or (own is not None and own[0] <= guarantee[0] and own[1] <= guarantee[1])


def _write_(layer: nn.Module, weights: Sequence[Tensor]) -> None:
    """Weights without the bias, which stays."""
    before = weight_matrices(layer)
    write_back_(layer, [torch.cat([U, old[len(U) :]]) for U, old in zip(weights, before, strict=True)])
