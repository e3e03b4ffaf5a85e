"""What ``sparsity`` asks of each layer: a part of its weights to be zero, a pattern, or nothing."""

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from convexprune.errors import NothingToPrune
from convexprune.nettrim.goals import Goal, Keep, KeepByPath, Pattern
from convexprune.nettrim.recipe import Recipe
from convexprune.nettrim.sites import Site
from convexprune.network.patterns import is_named, looked_up
from convexprune.solvers.errors import InvalidInput

Sparsity: TypeAlias = float | Pattern


def sparsity_of(recipe: Recipe, name: str) -> Sparsity:
    """What the recipe asks of a layer.

    Raises:
        InvalidInput: A table that says nothing of it.
    """
    given: Any = recipe.sparsity
    value = looked_up(given, name) if isinstance(given, Mapping) else given
    if value is None:
        raise InvalidInput(f"sparsity: no pattern among {list(given)} matches {name}; add one, or '*'")
    if not isinstance(value, str):
        return float(value)
    n, m = map(int, re.findall(r"\d+", value))
    return Pattern(n, m)


def left_as_trained(recipe: Recipe, sites: Mapping[str, Site]) -> dict[str, str]:
    """The layers that nothing is asked of, and those that cannot take their pattern, each with the reason.

    Raises:
        InvalidInput: A layer that cannot take its pattern, and was named rather than matched by "*" or another pattern.
        NothingToPrune: Patterns are asked for, and no layer can take one, nor is anything asked of another.
    """
    left = {}
    for name, site in sites.items():
        asked = sparsity_of(recipe, name)
        if isinstance(asked, Pattern):
            if wrong := [count for count in site.fan_in if count % asked.m]:
                reason = f"{asked} needs a multiple of {asked.m} inputs, and it has {wrong[0]}"
                if is_named(name, recipe.layers, recipe.sparsity):
                    raise InvalidInput(
                        f"sparsity: {name!r} was named, and {reason}: leave it out with layers='!{name}', or give it a "
                        f"number, sparsity={{{name!r}: 0.5, '*': '{asked}'}}"
                    )
                left[name] = f"left as trained: {reason}"
        elif asked == 0:
            left[name] = "left as trained: its sparsity is 0"
    if len(left) == len(sites) and any(isinstance(sparsity_of(recipe, name), Pattern) for name in sites):
        raise NothingToPrune(f"no layer can be pruned: {'; '.join(f'{name}: {why}' for name, why in left.items())}")
    return left


def budget(site: Site, asked: Sparsity, kind: type[Keep] | type[KeepByPath]) -> Goal:
    """The goal of one layer; of each group at least one weight stays."""
    return asked if isinstance(asked, Pattern) else kind(max(site.groups, round((1 - asked) * site.weights)))


def shared_budgets(sites: Mapping[str, Site], asked: Mapping[str, Sparsity]) -> dict[tuple[str, ...], int]:
    """How many weights the layers of one number may keep together; of each group of a layer at least one."""
    found = {}
    for part in sorted({part for part in asked.values() if not isinstance(part, Pattern)}):
        sharing = [site for name, site in sites.items() if asked[name] == part]
        count = round((1 - part) * sum(site.weights for site in sharing))
        found[tuple(site.name for site in sharing)] = max(count, sum(site.groups for site in sharing))
    return found
