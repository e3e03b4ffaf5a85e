"""Layers by name: those that shell patterns ("features.*", "fc?") choose, what tables say of them, shared weights.

A pattern that begins with "!" leaves out what it matches, whatever else chooses it; where there are no others,
everything else is chosen. In a table a layer's exact name counts first, then the first pattern that matches. Shared
weights are found by the memory they lie in, not by the objects that hold them.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor, nn

from convexprune.errors import NothingToPrune
from convexprune.layers.memory import Holders, place_of
from convexprune.layers.support import kind_of, unsupported
from convexprune.network.forwards import check_module
from convexprune.network.taps import tap
from convexprune.report.report import SkippedModule
from convexprune.solvers.errors import InvalidInput

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Ties:
    """What the modules of a model share; those that share nothing are in none of the mappings.

    Attributes:
        uses: For each layer that has the very same weight and bias as others, the names of all of them, in the model's
            order. They are one layer, to be solved once for all its uses.
        shared: For each module that shares a parameter in whatever way, the names of those it shares it with, as text.
    """

    uses: Mapping[str, tuple[str, ...]]
    shared: Mapping[str, str]

    @property
    def refused(self) -> dict[str, str]:
        """For each module that shares a parameter in another way than as one layer, with whom, and what to do."""
        only = "only layers of one kind with the very same weight, bias and settings are pruned together"
        return {name: untied(others, only) for name, others in self.shared.items() if name not in self.uses}

    def uses_of(self, name: str) -> tuple[str, ...]:
        """All names of the layer; its own if it shares nothing."""
        return self.uses.get(name, (name,))


def untied(others: str, only: str = "weights can be pruned for one use only") -> str:
    """Why a module that shares a parameter with others is left out, and what to do about it."""
    return f"shares a parameter with {others}, and {only}: untie them, by a copy of the parameter"


def find_ties(model: nn.Module) -> Ties:
    """Which modules of a model share parameters, as one layer or otherwise.

    Memory is shared where tensors have an entry in common. Modules are one layer if all tensors of their products lie
    in the same places, in the same shapes, and they are of one kind, with the same settings (stride and so on).
    UnsupportedModule is raised for what ``torch.jit`` compiled.
    """
    modules = named_uses(model)
    shared = _overlaps(modules)
    same = {name: _identity(modules[name]) for name in shared}
    uses, text = {}, {}
    for name, others in shared.items():
        if same[name] is not None and all(same[other] == same[name] for other in others):
            uses[name] = tuple(other for other in modules if other in others | {name})
        text[name] = ", ".join(repr(other) if other else "the model itself" for other in modules if other in others)
    return Ties(uses, text)


def named_uses(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by qualified name, each once, as in ``model.named_modules()``.

    A module of two names is one module, called twice; only an ``out_proj`` of two MultiheadAttentions is listed for
    both, which call no module.
    """
    found: dict[tuple[int, int], tuple[str, nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault((id(module), id(tap(model, name).module)), (name, module))
    return dict(found.values())


def _overlaps(modules: Mapping[str, nn.Module]) -> dict[str, set[str]]:
    """Which modules each module shares memory with, if any; what only buffers share is never pruned."""
    held: list[tuple[Tensor, str]] = []
    for name, module in modules.items():
        held += [(own, name) for own in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    everyone = Holders((tensor, (name, isinstance(tensor, nn.Parameter))) for tensor, name in held)
    shared: dict[str, set[str]] = {}
    for tensor, name in held:
        for other, trained in everyone.of(tensor):
            if other != name and (trained or isinstance(tensor, nn.Parameter)):
                shared.setdefault(name, set()).add(other)
    return shared


def _identity(module: nn.Module) -> tuple[object, ...] | None:
    """What modules agree in if they are one layer; None if this one cannot be pruned."""
    kind = kind_of(module)
    if kind is None or unsupported(module) is not None:
        return None
    places = [None if own is None else place_of(own) for group in kind.groups(module) for own in group]
    return (kind.base, *places, *(getattr(module, setting) for setting in kind.settings))


def choose_layers(
    model: nn.Module, patterns: str | Iterable[str] | None = None
) -> tuple[dict[str, nn.Module], list[SkippedModule]]:
    """The layers to prune by qualified name, and every other module that holds weights, with the reason.

    Layers that share weight and bias are one layer with several uses. It goes by the name of its first use, and is
    chosen, or left out, by a pattern of any of them.

    Raises:
        NothingToPrune: No layer can be pruned, or a pattern matches none of them.
        InvalidInput: The model is no module, or a pattern no text.
    """
    wanted = None if patterns is None else name_patterns(patterns)
    holders = {name: module for name, module in named_uses(check_module(model)).items() if holds_weights(module)}
    ties = find_ties(model)
    refused = ties.refused

    def left_out(name: str, module: nn.Module) -> str | None:
        first, *more = uses = ties.uses_of(name)
        if wanted is not None and not is_chosen(uses, wanted):
            pattern = excluding(uses, wanted)
            return f"left out by the name pattern {pattern!r}" if pattern else "not chosen by the name patterns"
        shared = f"its weight is that of {first!r}: solved there for {'all' if more[1:] else 'both'}"
        return unsupported(module) or refused.get(name) or (None if name == first else shared)

    reasons = {name: left_out(name, module) for name, module in holders.items()}
    chosen = {name: module for name, module in holders.items() if reasons[name] is None}
    skipped = [SkippedModule(name, type(holders[name]).__name__, why) for name, why in reasons.items() if why]
    idle = unmatched(wanted or [], [use for name in chosen for use in ties.uses_of(name)], holders)
    if idle or not chosen:
        what = f"no layer that can be pruned matches {idle}" if idle else "the model has no layer that can be pruned"
        listing = "; ".join(f"{s.name or 'the model'} ({s.kind}): {s.reason}" for s in skipped) or "no weights at all"
        raise NothingToPrune(f"{what}. These can be: {', '.join(chosen) or 'none'}. These not: {listing}")
    return chosen, skipped


def holds_weights(module: nn.Module) -> bool:
    """Whether the module is of a kind that can be pruned, or holds a matrix, or a parameter without values yet."""
    own = module.parameters(recurse=False)
    return kind_of(module) is not None or any(nn.parameter.is_lazy(p) or p.ndim >= 2 for p in own)


def name_patterns(patterns: str | Iterable[str]) -> list[str]:
    """Patterns of qualified names as a list; of a set in their own order, which is the same in every process.

    InvalidInput is raised for anything but texts.
    """
    if isinstance(patterns, str):
        return [patterns]
    found = list(patterns) if isinstance(patterns, Iterable) else [patterns]
    if not all(isinstance(pattern, str) for pattern in found):
        raise InvalidInput(f"layers: expected patterns of names ('features.*', '!stem'), found {patterns!r}")
    return sorted(found) if isinstance(patterns, Set) else found


def is_chosen(names: str | Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether patterns choose something that goes by one name or by several: one matches, and no exclusion does."""
    known = [names] if isinstance(names, str) else list(names)
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    return bool(patterns) and excluding(known, patterns) is None and bool(_matching(wanted, known))


def excluding(names: Iterable[str], patterns: Sequence[str]) -> str | None:
    """The first "!pattern" that leaves out something of these names; None if none does."""
    known = list(names)
    return next((p for p in patterns if p.startswith("!") and _matching([p[1:]], known)), None)


def unmatched(patterns: Iterable[str], names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """The patterns that match none of the names; what exclusions leave out may be one of the others, too."""
    known = list(names)
    every = [*known, *others]
    return [p for p in patterns if not _matching([p.removeprefix("!")], every if p.startswith("!") else known)]


def looked_up(table: Mapping[str, T], name: str) -> T | None:
    """The entry of the name itself, else that of the first pattern that matches, else None."""
    found = [name] if name in table else _matching(table, [name])
    return table[found[0]] if found else None


def by_first_names(argument: str, table: object, uses: Iterable[Sequence[str]]) -> object:
    """The table with an entry for the first name of each of these layers of several names, if any of them has one.

    An exact name counts before a pattern; of patterns the first that matches one of the names does. What is no table
    stays as it is. InvalidInput is raised where two names of one layer have entries that differ.
    """
    if not isinstance(table, Mapping):
        return table
    own = {}
    for names in uses:
        exact = {name: table[name] for name in names if name in table}
        if len(set(exact.values())) > 1:
            raise InvalidInput(f"{argument}: these are names of one layer, which shares its weight: {exact}; give one")
        if found := list(exact) or _matching(table, names):
            own[names[0]] = table[found[0]]
    return {**table, **own}


def is_named(name: str, *given: object) -> bool:
    """Whether a list or a table among those given has the exact name, rather than a pattern that matches it."""
    return any(isinstance(each, Collection) and not isinstance(each, str) and name in each for each in given)


def check_patterns(argument: str, table: object, names: Iterable[str]) -> None:
    """Each pattern of a table matches a layer, or InvalidInput is raised; what is no table passes."""
    known, patterns = list(names), list(table) if isinstance(table, Mapping) else []
    if idle := [pattern for pattern in patterns if pattern not in _matching(patterns, known)]:
        advice = "; leave layers out with layers='!…'" if any(pattern.startswith("!") for pattern in idle) else ""
        raise InvalidInput(f"{argument}: no layer matches {idle}; the layers are {', '.join(known)}{advice}")


def _matching(patterns: Iterable[str], names: Collection[str]) -> list[str]:
    """The patterns that match one of the names."""
    return [p for p in patterns if any(name == p or fnmatchcase(name, p) for name in names)]
