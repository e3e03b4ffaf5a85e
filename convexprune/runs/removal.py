"""Neurons that go: which layers can lose them, how they are removed, and the rows of the layers that change."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from convexprune.errors import NothingToPrune
from convexprune.layers.kinds import LAYERS
from convexprune.network.choosing import is_chosen, unmatched
from convexprune.network.graph import outputs_of
from convexprune.network.links import Link, find_links
from convexprune.network.weights import mask_neurons_, remove_neurons_
from convexprune.report.report import LayerReport, SkippedModule
from convexprune.runs.answer import layer_row, with_extras
from convexprune.runs.layer import Layer
from convexprune.runs.outcome import same_outputs
from convexprune.runs.run import Run

_UNWANTED = "not chosen by the name patterns"


def chosen_links(
    model: nn.Module, patterns: Iterable[str] | None, *, residual: bool
) -> tuple[dict[str, Link], list[SkippedModule]]:
    """The links of which a producer's name matches and none is left out, and the other modules that hold weights.

    Args:
        model: The network.
        patterns: Of the layers that are to lose neurons; None: all that can.
        residual: Whether layers whose outputs are added to each other lose neurons together (``find_links``).

    Raises:
        NothingToPrune: No neurons can be removed, or a pattern matches none that can.
        UnsupportedModule: The model cannot be traced.
    """
    found, skipped = find_links(model, residual=residual)
    outputs = {name: outputs_of(model.get_submodule(name)) for name in found}
    links = {name: link for name, link in found.items() if link.consumers and outputs[name]}
    for link in (found[name] for name in found if name not in links):
        reason = "only layers without neurons use its outputs" if outputs[link.producer] else "it has no neurons left"
        skipped += [SkippedModule.of(name, model.get_submodule(name), reason) for name in link.producers]
    wanted = ["*"] if patterns is None else list(patterns)
    if not wanted:
        raise NothingToPrune("layers: expected patterns of names, found none; leave it out for every layer")
    names = [name for link in links.values() for name in link.producers]
    idle = unmatched(wanted, names, (module.name for module in skipped))
    chosen = {name: link for name, link in links.items() if is_chosen(link.producers, wanted)}
    if idle or not chosen:
        reasons = "; ".join(f"{module.name}: {module.reason}" for module in skipped) or "it has no layers"
        raise NothingToPrune(f"layers: {idle or wanted} match no layer of which neurons can be removed: {reasons}")
    left = [name for name in links if name not in chosen]
    return chosen, [*skipped, *(SkippedModule.of(n, model.get_submodule(n), _UNWANTED) for n in left)]


def reachable(links: Mapping[str, Link], layers: Mapping[str, Layer]) -> tuple[dict[str, Link], list[SkippedModule]]:
    """The links whose consumers are all fitted in this run, and the first producers of the others, with the reason.

    Raises:
        NothingToPrune: There are none.
    """
    open_ends = {name: [user for user in link.consumers if user not in layers] for name, link in links.items()}
    left = [
        SkippedModule(name, "link", f"its outputs go to {', '.join(users)}, which cannot be fitted in this run")
        for name, users in open_ends.items()
        if users
    ]
    if len(left) == len(links):
        raise NothingToPrune(f"no neurons can be removed: {'; '.join(f'{m.name}: {m.reason}' for m in left)}")
    return {name: link for name, link in links.items() if not open_ends[name]}, left


Sizes = Mapping[str, tuple[tuple[int, ...], int]]
"""By layer the shape of its weight, and how many of its entries are not zero."""


def weight_sizes(model: nn.Module) -> Sizes:
    """Of all layers that may lose neurons or inputs, as they are now."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
    weights = {n: m.get_parameter("weight") for n, m in layers if m._parameters.get("weight") is not None}
    return {name: (tuple(w.shape), int(w.count_nonzero())) for name, w in weights.items()}


def shrink_(run: Run, remove: bool) -> None:
    """Remove the neurons that were not kept, or leave zeros where they were."""
    apply_, widths = remove_neurons_ if remove else mask_neurons_, run.widths()
    for name, kept in run.kept_neurons.items():
        if len(kept) < widths[name]:
            apply_(run.model, run.links[name], torch.tensor(kept, dtype=torch.int64))


def finished_rows(run: Run, before: Sizes, remove: bool) -> tuple[LayerReport, ...]:
    """A row for each layer that changed; neurons that were not kept go first, or become zeros."""
    if not run.links:
        return run.rows()
    with same_outputs(run):
        shrink_(run, remove)
    links = [run.links[name] for name in run.kept_neurons]
    changed = {name for link in links for name in (*link.producers, *link.consumers)}
    return tuple(_row(run, name, *before[name]) for name in before if name in changed)


def _row(run: Run, name: str, shape: tuple[int, ...], nonzeros: int) -> LayerReport:
    weight = run.model.get_submodule(name).get_parameter("weight")
    link = next((run.links[key] for key in run.kept_neurons if name in run.links[key].producers), None)
    row = LayerReport(
        name=name,
        shape=tuple(weight.shape),
        samples=0,
        nonzeros_before=nonzeros,
        nonzeros=int(weight.count_nonzero()),
        output_error=math.nan,
        seconds=0.0,
        status="neurons",
        before=shape,
        neurons=shape[0] if link is None else len(run.kept_neurons[link.producer]),
    )
    if name in run.layers:
        layer = run.layers[name]
        row = replace(row, fit=layer.fit.name, norm=layer.norm_name, notes=layer.notes)
    if name in run.written:  # its inputs were fitted
        fitted = layer_row(run.layers[name], run.goals[name], run.written[name])
        own = {key: getattr(fitted, key) for key in ("samples", "output_error", "seconds", "returned", "notes")}
        row = replace(row, status="inputs and neurons" if link else "inputs", **own)
    return with_extras(row, run.extra.get(name, {}))
