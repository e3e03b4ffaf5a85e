"""From what is asked of the network to the target that pursues it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from convexprune.calibration import Calibration
from convexprune.forwards import Forward
from convexprune.links import Link
from convexprune.nettrim.goals import Goal, Keep, KeepByPath, Pattern, Within
from convexprune.nettrim.network import NetworkEps, NetworkSparsity
from convexprune.nettrim.planning import Plan, make_plan
from convexprune.nettrim.recipe import Recipe
from convexprune.nettrim.sites import Site
from convexprune.nettrim.structured import NeuronSparsity, chosen_links, reachable
from convexprune.nettrim.targets import Each, Target
from convexprune.plan import layer_eps, looked_up
from convexprune.report import SkippedModule
from convexprune.solvers.errors import InvalidInput
from convexprune.taps import Received

__all__ = ["planned", "target_of"]


def planned(
    model: nn.Module,
    calibration: Calibration,
    recipe: Recipe,
    forward: Forward | None,
    progress: Callable[[int, int], None],
    see: Callable[[str, Received], None] | None = None,
) -> tuple[Plan, Target, tuple[SkippedModule, ...]]:
    """What a run solves, found out by one pass over the data: its layers, the target, and the modules that it leaves.

    Args:
        model: The trained network; left as found.
        calibration: Gone through once.
        recipe: What is asked.
        forward: As for ``prune_``.
        progress: Called as ``progress(done, total)``.
        see: As for ``observe``.

    Raises:
        NothingToPrune: No layer can be pruned, or the patterns choose none.
        UnsupportedModule: Neurons are asked for, and the model cannot be traced.
        NonFinite: Weights, or what reaches a layer, hold NaN or infinity.
        InvalidInput, InvalidTolerance: Numbers or patterns that do not fit the layers, or a model that cannot be called
            on a batch.
    """
    if recipe.unit == "weights":
        plan = make_plan(model, calibration, recipe, forward, progress, see=see)
        return plan, target_of(recipe, plan, None), plan.skipped
    links, left = chosen_links(model, recipe.layers)
    plan = make_plan(model, calibration, recipe, forward, progress, names=_consumers(links), see=see)
    links, unreached = reachable(links, plan.sites)
    users = set(_consumers(links))
    sites = {name: site for name, site in plan.sites.items() if name in users}
    plan = replace(plan, sites=sites, order=tuple(name for name in plan.order if name in users))
    return plan, target_of(recipe, plan, links), (*left, *unreached)


def _consumers(links: Mapping[str, Link]) -> list[str]:
    return [user for link in links.values() for user in link.consumers]


def target_of(recipe: Recipe, plan: Plan, links: Mapping[str, Link] | None) -> Target:
    """The target that the recipe asks for; of neurons if there are links.

    Raises:
        InvalidInput, InvalidTolerance: Numbers that do not fit the layers.
    """
    if recipe.network_eps is not None:
        return NetworkEps(recipe.network_eps, plan.size, recipe.objective == "nonzeros")
    if links is not None:
        return NeuronSparsity(links, recipe.sparsity, recipe.scope == "network")
    if recipe.scope == "network":
        every = plan.sites.values()
        count = max(sum(site.groups for site in every), round((1 - recipe.sparsity) * sum(s.weights for s in every)))
        return NetworkSparsity(count, recipe.search == "path")
    if recipe.sparsity is not None:
        return Each({name: _budget(site, recipe) for name, site in plan.sites.items()})
    eps = layer_eps(recipe.eps, list(plan.order))
    return Each({name: Within(eps[name]) for name in plan.sites})


def _budget(site: Site, recipe: Recipe) -> Goal:
    if isinstance(recipe.sparsity, str):
        found = re.fullmatch(r"(\d+):(\d+)", recipe.sparsity)
        if not found:
            raise InvalidInput(f"sparsity: expected a number, or a pattern such as '2:4', found {recipe.sparsity!r}")
        pattern, inputs = Pattern(int(found[1]), int(found[2])), site.inputs_of_group
        if pattern.m and inputs % pattern.m:
            raise InvalidInput(
                f"sparsity: {recipe.sparsity!r} needs a multiple of {pattern.m} inputs; {site.name!r} has {inputs}: "
                "leave it out with layers="
            )
        return pattern
    given = recipe.sparsity
    part = looked_up(given, site.name) if isinstance(given, Mapping) else given
    if part is None:
        raise InvalidInput(f"sparsity: no pattern among {list(given)} matches {site.name}; add one, or '*'")
    count = max(site.groups, round((1 - part) * site.weights))
    return (KeepByPath if recipe.search == "path" else Keep)(count)
