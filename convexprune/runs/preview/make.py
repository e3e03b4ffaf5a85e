"""One pass over the data, for sizes, and a forecast from these."""

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from convexprune.nettrim import prune_
from convexprune.nettrim.recipe import Recipe, recipe_of_call
from convexprune.nettrim.request import planned
from convexprune.nettrim.sites import Site
from convexprune.nettrim.stopping import Stop
from convexprune.nettrim.tasks import executor, mode_for
from convexprune.network.calibration import Calibration, fitted
from convexprune.network.choosing import check_module
from convexprune.network.forwards import uncompiled
from convexprune.progress import silent
from convexprune.report.report import reported_once
from convexprune.runs.preview.forecast import Kinds, forecast
from convexprune.runs.preview.goals import goals_of, large_eps
from convexprune.runs.preview.pace import Pace
from convexprune.runs.preview.records import LayerPreview, Preview
from convexprune.runs.preview.refusals import check_bound, check_goals


def preview(model: nn.Module, calibration: Any, eps: Any = None, **arguments: Any) -> Preview:
    """What ``prune_`` would do with the same arguments: one pass over the data, and nothing is solved or written.

    Seconds are those of documented operation counts at the speed of this machine, measured on one product and on a few
    iterations of a tiny program (``convexprune.runs.preview.forecast``): rather a magnitude than a promise.

    Args:
        model: As for ``prune_``; left as found.
        calibration: As for ``prune_``.
        eps: As for ``prune_``.
        **arguments: As for ``prune_``.

    Raises:
        ConvexPruneError: As ``prune_`` before it solves anything.
    """
    asked = _bound(model, calibration, eps, arguments)
    recipe = _recipe(asked)
    executor(asked["jobs"], recipe.mode == "cascade")  # these two refuse what prune_ refuses
    Stop(asked["time_limit"], asked["stop"])
    data = Calibration(calibration, recipe.batch_size, asked["mask"])
    model = uncompiled(model)
    forward, fittings = fitted(check_module(model), data, asked["forward"])
    if asked["holdout"] is not None:
        Calibration(asked["holdout"], recipe.batch_size, asked["mask"])
    progress = partial(asked["progress"] or silent, "capture")
    began = time.perf_counter()
    plan, target, left = planned(model, data, recipe, forward, progress)
    recipe = replace(recipe, mode=plan.mode)
    took = time.perf_counter() - began
    if recipe.network_eps is not None and recipe.guarantee == "bound":
        check_bound(model, data, forward, plan, recipe)
    goals = goals_of(target, plan)
    pace = Pace.measured(next(model.parameters()).device, took)
    layers = [
        _layer(plan.sites[name], goals[name].told, goals[name].kinds, plan.rows[name], recipe, pace)
        for name in plan.order
    ]
    for row in layers:
        check_goals(plan.sites[row.name], goals[row.name].goals, row.gram, recipe)
    rows_told, skipped = reported_once(layers, left)
    return Preview(
        layers=rows_told,
        skipped=skipped,
        samples=plan.samples,
        weights=sum(site.weights for site in plan.sites.values()),
        memory_bytes=max((row.data_bytes + max(row.data_bytes, row.solver_bytes) for row in layers), default=0),
        seconds=_total([row.seconds for row in layers], asked["jobs"], 4 * pace.reading, asked["time_limit"]),
        jobs=asked["jobs"],
        pace=pace,
        recipe=recipe.to_dict(),
        notices=(*fittings, *plan.notices, *large_eps(target)),
    )


def recipe_of(model: nn.Module, calibration: Any, eps: Any = None, **arguments: Any) -> Recipe:
    """The recipe of ``prune_`` with these arguments, checked as it checks it.

    Raises:
        InvalidInput, InvalidTolerance, UnknownSolver, UnknownOption: As in ``prune_``.
    """
    return _recipe(_bound(model, calibration, eps, arguments))


def _bound(model: nn.Module, calibration: Any, eps: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of ``prune_`` by name, defaults included."""
    bound = inspect.signature(prune_).bind(model, calibration, eps, **arguments)
    bound.apply_defaults()
    return bound.arguments


def _recipe(asked: Mapping[str, Any]) -> Recipe:
    return recipe_of_call({**asked, "mode": mode_for(asked["mode"], asked["jobs"])})


def _layer(site: Site, goal: str, kinds: Kinds, rows: Sequence[int], recipe: Recipe, pace: Pace) -> LayerPreview:
    stored = site.read()
    matrices = tuple((P, *W.shape) for P, W in zip(rows, stored, strict=True))
    cost = forecast(matrices, kinds, site.fit == "ball", recipe, pace, stored[0].dtype)
    return LayerPreview(
        name=site.name,
        kind=type(site.layer).__name__,
        shape=site.shape,
        fit=site.fit,
        norm=site.norm_name,
        goal=goal,
        matrices=matrices,
        gram=cost.gram,
        data_bytes=cost.data_bytes,
        solver_bytes=cost.solver_bytes,
        seconds=cost.seconds,
        notes=site.notes,
    )


def _total(seconds: list[float | None], jobs: int, around: float, limit: float | None) -> float | None:
    """All layers, ``jobs`` at a time, and the passes of the run itself."""
    known = [each for each in seconds if each is not None]
    if len(known) < len(seconds):
        return limit
    total = around + max([*known, sum(known) / jobs])
    return total if limit is None else min(total, limit)
