"""Coreset pruning of whole models: neurons and filters that are really removed, or single weights set to zero."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convexprune.coresets.base import Method
from convexprune.coresets.edges import prune_edges_
from convexprune.coresets.generalisation import CodedLayer, GeneralisationBound, generalisation_terms
from convexprune.coresets.methods import make_method
from convexprune.coresets.neurons import prune_neurons_
from convexprune.coresets.recipe import Order, Recipe, Scope
from convexprune.coresets.rows import Pruned
from convexprune.coresets.sizes import Size
from convexprune.network.calibration import Calibration
from convexprune.network.capture import Capture, capture, network_outputs
from convexprune.network.choosing import check_module
from convexprune.network.compiled import uncompiled
from convexprune.network.fitting import fitted
from convexprune.network.forwards import Forward
from convexprune.network.padding import Counted, Mask
from convexprune.network.shrink import restoring
from convexprune.progress import silent
from convexprune.report.report import Report, reported_once
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.methods.solve import environment


def coreset_prune_(
    model: nn.Module,
    calibration: Any = None,
    method: str | Method = "lowner",
    size: Size | Mapping[str, Size] = 0.5,
    *,
    scope: Scope = "layer",
    order: Order = "bottom-up",
    layers: str | Iterable[str] | None = None,
    remove: bool = True,
    baseline: bool = False,
    seed: int = 0,
    labels: Any = None,
    margin: float = 1.0,
    batch_size: int = 256,
    mask: Mask = None,
    forward: Forward | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Report:
    """Prune a trained model in place by a coreset of its neurons or weights; on failure the model is as it was.

    Args:
        model: Any module that torch.fx can trace (for neurons), or with Linear and Conv2d layers (for weights).
        calibration: Inputs, as for ``prune_``. "corenet", "sipp" and "pfp" need them; with the others they measure
            errors, and how large a layer's inputs get where a method asks for that.
        method: "lowner", "mussay", "pfp" (neurons); "corenet", "sipp" (weights); "uniform", "magnitude" (either, by
            their option ``items``); or an instance.
        size: A ratio to keep, a count, or a ``Guarantee(eps, delta)``: for every layer, or by name pattern. Guarantees
            are met by independent draws, and a layer for which they ask for at least as many draws as it has items is
            kept whole.
        scope: "layer": the size is each layer's. "network": one ratio, of all weights of the layers concerned, which
            the method splits over layers.
        order: In which neurons are removed: from the input on, so that a layer is scored with the inputs that are left
            to it, or from the output back, with the outputs.
        layers: Patterns of qualified names; None: every layer that can be pruned.
        remove: Whether neurons are really removed; otherwise they are zeros, and shapes stay.
        baseline: Whether to report the error of uniform sampling at the same size, too, on the calibration data.
        seed: Of the sampling, ≥ 0.
        labels: Of the calibration data, if these are training data of a classifier: "corenet" then reports what its
            theory, and the size of the pruned network, say of errors on new data. Whole numbers, one a sample.
        margin: γ of that bound.
        batch_size: As for ``prune_``.
        mask: As for ``prune_``.
        forward: As for ``prune_``.
        progress: As for ``prune_``.
        **options: The method's own.

    Returns:
        The report: a row for each layer that changed.

    Raises:
        NothingToPrune: No layer can be pruned, or the patterns choose none.
        UnsupportedModule: The model cannot be traced, and neurons are to be removed.
        InvalidInput, InvalidTolerance: Of size, scope, order, seed, labels, method or options; or data are needed and
            not given.
        EmptyCalibration, NonFinite, ShapeMismatch: The calibration data cannot be used.
    """
    began = time.perf_counter()
    name, pruner = make_method(method, options)
    recipe = Recipe(pruner, size, scope, order, remove, baseline, _generator(seed), progress or silent)
    truth = None if labels is None else _as_labels(labels)
    model, batches, fittings = uncompiled(check_module(model)), None, tuple[str, ...]()
    if calibration is not None:
        batches = list(Calibration(calibration, batch_size, mask))
        forward, fittings = fitted(model, batches, forward)
    if batches is None:
        _check_unneeded({name: pruner.needs_inputs, "baseline": baseline, "labels": truth is not None})

    def see(names: Iterable[str]) -> Capture | None:
        if batches is None:
            return None
        return capture(model, batches, names, forward=forward, progress=partial(recipe.tell, "capture"), mask=mask)

    bound, error = None, math.nan
    with restoring(model):
        prune = prune_neurons_ if pruner.items == "neurons" else prune_edges_
        pruned = prune(model, layers, recipe, see)
        seen = pruned.capture
        if seen is not None:
            after = network_outputs(model, batches, forward, mask, seen.counted)
            error = seen.error(after)
            bound = None if truth is None else _bound(model, pruned, seen.outputs, after, truth, margin)
    rows, skipped = reported_once(pruned.rows, pruned.skipped)
    counted = Counted() if seen is None else seen.counted
    return Report(
        layers=rows,
        skipped=skipped,
        output_error=error,
        samples=0 if seen is None else seen.samples,
        seconds=time.perf_counter() - began,
        provenance=_provenance(model, name, recipe, seed),
        generalisation=bound,
        notices=(*fittings, *counted.notices()),
        mask=counted.to_dict(),
    )


def _check_unneeded(needs: Mapping[str, bool]) -> None:
    for what, needed in needs.items():
        if needed:
            raise InvalidInput(f"{what}: nothing can be said without what the network computes: give calibration data")


def _generator(seed: int) -> np.random.Generator:
    if not isinstance(seed, Integral) or seed < 0:
        raise InvalidInput(f"seed: expected a whole number ≥ 0, found {seed!r}")
    return np.random.default_rng(int(seed))


def _as_labels(labels: Any) -> Tensor:
    try:
        return labels if isinstance(labels, Tensor) else torch.tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"labels: expected whole numbers, one a sample, found {type(labels).__name__}") from error


def _bound(
    model: nn.Module, pruned: Pruned, before: Tensor, after: Tensor, labels: Tensor, margin: float
) -> GeneralisationBound:
    """Of all layers that were scored; whatever else the network stores counts beside the last one."""
    if not (pruned.terms and all("Delta" in terms for terms in pruned.terms.values())):
        raise InvalidInput("labels: only 'corenet' has a generalisation bound; leave them out")
    weights = {name: model.get_submodule(name).get_parameter("weight").numel() for name in pruned.terms}
    kept = weights | {row.name: row.kept_items for row in pruned.rows}
    stored = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
    others = sum(tensor.numel() for tensor in stored) - sum(weights.values())
    coded = [
        CodedLayer(name, weights[name], kept[name], extra, terms["S"], terms["Delta"])
        for (name, terms), extra in zip(pruned.terms.items(), [0] * (len(weights) - 1) + [others], strict=True)
    ]
    widest = 8 * max(tensor.element_size() for tensor in stored)
    return generalisation_terms(before, after, labels, coded, margin, bits_per_value=widest)


def _provenance(model: nn.Module, name: str, recipe: Recipe, seed: int) -> dict[str, Any]:
    return {
        "method": name,
        "options": dataclasses.asdict(recipe.method),  # type: ignore[call-overload]
        "size": recipe.size if isinstance(recipe.size, int | float) else str(recipe.size),
        "scope": recipe.scope,
        "order": recipe.order,
        "removed": recipe.remove and recipe.method.items == "neurons",
        "baseline": recipe.baseline,
        "seed": seed,
    } | environment(next(model.parameters()))
