"""From what is asked of the network to the target that pursues it."""

import re
from collections.abc import Mapping

from convexprune.links import Link
from convexprune.nettrim.goals import Goal, Keep, KeepByPath, Pattern, Within
from convexprune.nettrim.network import NetworkEps, NetworkSparsity
from convexprune.nettrim.planning import Plan
from convexprune.nettrim.recipe import Recipe
from convexprune.nettrim.sites import Site
from convexprune.nettrim.structured import NeuronSparsity
from convexprune.nettrim.targets import Each, Target
from convexprune.plan import layer_eps, looked_up
from convexprune.solvers.errors import InvalidInput

__all__ = ["target_of"]


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
        count = round((1 - recipe.sparsity) * sum(site.weights for site in plan.sites.values()))
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
