"""What a target means for layers: the eps of each, how many weights it keeps, its pattern, and which are left."""

from collections.abc import Mapping

from convexprune.errors import NothingToPrune
from convexprune.network.choosing import is_named, looked_up
from convexprune.options import Options
from convexprune.runs.layer import Layer
from convexprune.runs.plan import Plan
from convexprune.runs.run import Run
from convexprune.solvers.errors import InvalidInput
from convexprune.targets import Eps, Neurons, Sparsity, Target, pattern_of

Wanted = float | int | tuple[int, int]
"""The part to be zero, a whole number that stay, or a pattern (n, m)."""


def value_of(target: Target, name: str) -> object:
    """What the target says of a layer.

    Raises:
        InvalidInput: A table that says nothing of it.
    """
    if target.table is None:
        return target.value
    value = looked_up(target.table, name)
    if value is None:
        raise InvalidInput(
            f"{target.kind}: no pattern among {list(target.table)} matches {name}; add one, or '*', or leave it as "
            f"trained with layers='!{name}'"
        )
    return value


def wanted_of(target: Sparsity, name: str) -> Wanted:
    """What is wanted of a layer's weights."""
    value = value_of(target, name)
    return pattern_of(value) or value  # type: ignore[return-value]


def without_idle(plan: Plan, target: Sparsity, options: Options) -> Plan:
    """The plan without layers of which nothing is wanted, and without those that cannot take their pattern.

    Raises:
        InvalidInput: A layer that cannot take its pattern, and was named rather than matched by "*" or another pattern.
        NothingToPrune: Patterns are wanted, and no layer can take one, nor is anything wanted of another.
    """
    left = {}
    for name, layer in plan.layers.items():
        wanted = wanted_of(target, name)
        if isinstance(wanted, tuple):
            n, m = wanted
            if wrong := [count for count in layer.fan_in if count % m]:
                reason = f"{n}:{m} needs a multiple of {m} inputs, and it has {wrong[0]}"
                if is_named(name, options.layers, target.table):
                    raise InvalidInput(
                        f"sparsity: {name!r} was named, and {reason}: leave it out with layers='!{name}', or give it a "
                        f"number, sparsity={{{name!r}: 0.5, '*': '{n}:{m}'}}"
                    )
                left[name] = f"left as trained: {reason}"
        elif wanted == 0:
            left[name] = "left as trained: its sparsity is 0"
    patterns = any(isinstance(wanted_of(target, name), tuple) for name in plan.layers)
    if len(left) == len(plan.layers) and patterns:
        raise NothingToPrune(f"no layer can be pruned: {'; '.join(f'{name}: {why}' for name, why in left.items())}")
    return plan.without(left)


def kept_of(value: object, items: int) -> int:
    """How many of so many items stay: a whole number of them, or all but a part; at least 1, at most all."""
    if isinstance(value, int):
        return min(items, value)
    return max(1, round((1 - float(value)) * items))  # type: ignore[arg-type]


def count_of(wanted: float | int, layer: Layer) -> int:
    """How many weights of a layer stay; of each of its groups at least one does."""
    return max(layer.groups, kept_of(wanted, layer.weights))


def shared_counts(layers: Mapping[str, Layer], target: Sparsity) -> dict[tuple[str, ...], int]:
    """How many weights the layers of one number keep together; of each group of a layer at least one."""
    wanted = {name: wanted_of(target, name) for name in layers}
    found = {}
    for part in sorted({value for value in wanted.values() if not isinstance(value, tuple)}):
        sharing = [layer for name, layer in layers.items() if wanted[name] == part]
        count = part if isinstance(part, int) else round((1 - part) * sum(layer.weights for layer in sharing))
        found[tuple(layer.name for layer in sharing)] = max(count, sum(layer.groups for layer in sharing))
    return found


def compared_counts(layers: Mapping[str, Layer], target: Target) -> dict[tuple[str, ...], int]:
    """Which layers' weights are compared with each other, and how many stay; nothing of neurons and patterns."""
    if not isinstance(target, Sparsity):
        return {}
    if target.scope == "network":
        return shared_counts(layers, target)
    wanted = {name: wanted_of(target, name) for name in layers}
    return {(name,): count_of(part, layers[name]) for name, part in wanted.items() if not isinstance(part, tuple)}


def layer_eps(target: Eps, run: Run) -> dict[str, float]:
    """The eps of each layer: one for all, one a layer in the model's order, or by name pattern.

    Raises:
        InvalidInput: Their number is not that of the layers, or a layer has none.
    """
    names, value = run.plan.order, target.value
    if not isinstance(value, tuple):
        return {name: float(value_of(target, name)) for name in run.layers}  # type: ignore[arg-type]
    if len(value) != len(names):
        raise InvalidInput(f"eps: expected {len(names)} numbers, one for each of {list(names)}; found {len(value)}")
    own = dict(zip(names, value, strict=True))
    return {name: own[name] for name in run.layers}


def in_words(target: Target, run: Run) -> dict[str, str]:
    """What is wanted of each layer, in words."""
    goals = dict.fromkeys(run.layers, str(target))
    if isinstance(target, Eps):
        goals |= {name: f"{eps:g}" for name, eps in layer_eps(target, run).items()}
    elif isinstance(target, Sparsity):
        for name, layer in run.layers.items():
            wanted = wanted_of(target, name)
            goals[name] = "{}:{}".format(*wanted) if isinstance(wanted, tuple) else f"keep {count_of(wanted, layer):,}"
        shared = shared_counts(run.layers, target) if target.scope == "network" else {}
        goals |= {name: f"share of {count:,}" for names, count in shared.items() for name in names}
    elif isinstance(target, Neurons) and target.scope == "layer":
        kept = {name: f"{kept_of(value_of(target, name), size):,} of {size:,}" for name, size in run.widths().items()}
        goals |= {name: f"{words} neurons" for name, words in kept.items()}
        goals |= {user: f"{kept[name]} inputs" for name, link in run.links.items() for user in link.consumers}
    return goals
