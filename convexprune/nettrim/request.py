"""From what is asked of the network to the target that pursues it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from convexprune.nettrim.goals import Keep, KeepByPath, Within
from convexprune.nettrim.network import NetworkEps, NetworkSparsity
from convexprune.nettrim.planning import Plan, make_plan
from convexprune.nettrim.recipe import Recipe
from convexprune.nettrim.search import MeasuredEps
from convexprune.nettrim.sparsities import budget, left_as_trained, shared_budgets, sparsity_of
from convexprune.nettrim.structured import NeuronSparsity, chosen_links, reachable
from convexprune.nettrim.targets import Each, Target
from convexprune.network.calibration import Calibration
from convexprune.network.choosing import check_module, layer_eps
from convexprune.network.forwards import Forward
from convexprune.network.links import Link
from convexprune.network.patterns import by_first_names
from convexprune.network.ties import find_ties
from convexprune.report.report import SkippedModule


def planned(
    model: nn.Module,
    calibration: Calibration,
    recipe: Recipe,
    forward: Forward | None,
    progress: Callable[[int, int], None],
) -> tuple[Plan, Target, tuple[SkippedModule, ...]]:
    """What a run solves, found out by one pass over the data: its layers, the target, and the modules that it leaves.

    Args:
        model: The trained network; left as found.
        calibration: Gone through once.
        recipe: What is asked.
        forward: As for ``prune_``.
        progress: Called as ``progress(done, total)``.

    Raises:
        NothingToPrune: No layer can be pruned, or the patterns choose none.
        UnsupportedModule: Neurons are asked for, and the model cannot be traced.
        NonFinite: Weights, or what reaches a layer, hold NaN or infinity.
        InvalidInput, InvalidTolerance: Numbers or patterns that do not fit the layers, or a model that cannot be called
            on a batch.
    """
    recipe = _by_first_names(recipe, find_ties(check_module(model)).several)
    if recipe.unit == "weights":
        plan = make_plan(model, calibration, recipe, forward, progress)
        if recipe.sparsity is not None:
            plan = plan.without(left_as_trained(recipe, plan.sites))
        return plan, target_of(recipe, plan, None), plan.skipped
    links, left = chosen_links(model, recipe.layers)
    plan = make_plan(model, calibration, recipe, forward, progress, names=_consumers(links))
    links, unreached = reachable(links, plan.sites)
    users = set(_consumers(links))
    sites = {name: site for name, site in plan.sites.items() if name in users}
    plan = replace(plan, sites=sites, order=tuple(name for name in plan.order if name in users))
    return plan, target_of(recipe, plan, links), (*left, *unreached)


def _by_first_names(recipe: Recipe, uses: Iterable[Sequence[str]]) -> Recipe:
    """The recipe with tables in which a layer of several names goes by the first, as it does in a plan."""
    tables: dict[str, Any] = {
        name: by_first_names(name, getattr(recipe, name), uses) for name in ("eps", "sparsity", "fit", "activations")
    }
    return replace(recipe, **tables)


def _consumers(links: Mapping[str, Link]) -> list[str]:
    return [user for link in links.values() for user in link.consumers]


def target_of(recipe: Recipe, plan: Plan, links: Mapping[str, Link] | None) -> Target:
    """The target that the recipe asks for; of neurons if there are links.

    Raises:
        InvalidInput, InvalidTolerance: Numbers that do not fit the layers.
    """
    if recipe.network_eps is not None and recipe.guarantee == "measured":
        return MeasuredEps(recipe.network_eps, recipe.objective == "nonzeros")
    if recipe.network_eps is not None:
        return NetworkEps(recipe.network_eps, plan.size, recipe.objective == "nonzeros")
    if links is not None:
        return NeuronSparsity(links, recipe.sparsity, recipe.scope == "network")
    if recipe.sparsity is not None:
        return _sparse(recipe, plan)
    eps = layer_eps(recipe.eps, list(plan.order))
    return Each({name: Within(eps[name]) for name in plan.sites})


def _sparse(recipe: Recipe, plan: Plan) -> Target:
    asked = {name: sparsity_of(recipe, name) for name in plan.sites}
    kind = KeepByPath if recipe.search == "path" else Keep
    counts = shared_budgets(plan.sites, asked) if recipe.scope == "network" else {}
    shared = {name for names in counts for name in names}
    own = {name: budget(site, asked[name], kind) for name, site in plan.sites.items() if name not in shared}
    return NetworkSparsity(counts, kind, own) if counts else Each(own)
