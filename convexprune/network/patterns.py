"""Names by shell patterns ("features.*", "fc?"): which are chosen, and what a table says of one.

A pattern that begins with "!" leaves out what it matches, whatever else chooses it; where there are no others,
everything else is chosen. In a table a layer's exact name counts first, then the first pattern that matches.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import TypeVar

from convexprune.solvers.errors import InvalidInput

T = TypeVar("T")


def name_patterns(patterns: str | Iterable[str]) -> list[str]:
    """Patterns of qualified names as a list; of a set in their own order, which is the same in every process.

    Raises:
        InvalidInput: Something else than texts.
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
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    if not wanted and patterns:
        wanted = ["*"]
    return excluding(known, patterns) is None and any(_matches(known, pattern) for pattern in wanted)


def excluding(names: Iterable[str], patterns: Sequence[str]) -> str | None:
    """The first "!pattern" that leaves out something of these names; None if none does."""
    known = list(names)
    return next((p for p in patterns if p.startswith("!") and _matches(known, p[1:])), None)


def unmatched(patterns: Iterable[str], names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """The patterns that match none of the names; what exclusions leave out may be one of the others, too."""
    known = list(names)
    every = [*known, *others]
    return [p for p in patterns if not (_matches(every, p[1:]) if p.startswith("!") else _matches(known, p))]


def looked_up(table: Mapping[str, T], name: str) -> T | None:
    """The entry of the name itself, else that of the first pattern that matches, else None."""
    if name in table:
        return table[name]
    return next((value for pattern, value in table.items() if fnmatchcase(name, pattern)), None)


def by_first_names(argument: str, table: object, uses: Iterable[Sequence[str]]) -> object:
    """The table with an entry for the first name of each of these layers of several names, if any of them has one.

    An exact name counts before a pattern, as in ``looked_up``; of patterns the first that matches one of the names
    does. What is no table stays as it is.

    Raises:
        InvalidInput: Two names of one layer have entries that differ.
    """
    if not isinstance(table, Mapping):
        return table
    own = {}
    for names in uses:
        exact = {name: table[name] for name in names if name in table}
        if len(set(exact.values())) > 1:
            raise InvalidInput(f"{argument}: these are names of one layer, which shares its weight: {exact}; give one")
        found = exact or {p: v for p, v in table.items() if any(fnmatchcase(name, p) for name in names)}
        if found:
            own[names[0]] = next(iter(found.values()))
    return {**table, **own}


def is_named(name: str, *given: object) -> bool:
    """Whether a list or a table among those given has the exact name, rather than a pattern that matches it."""
    return any(isinstance(each, Collection) and not isinstance(each, str) and name in each for each in given)


def check_patterns(argument: str, table: object, names: Iterable[str]) -> None:
    """Whether each pattern of a table matches a layer; what is no table passes.

    Raises:
        InvalidInput: Some match none.
    """
    known = list(names)
    patterns = list(table) if isinstance(table, Mapping) else []
    if idle := [pattern for pattern in patterns if not _matches(known, pattern)]:
        advice = "; leave layers out with layers='!…'" if any(pattern.startswith("!") for pattern in idle) else ""
        raise InvalidInput(f"{argument}: no layer matches {idle}; the layers are {', '.join(known)}{advice}")


def _matches(names: Iterable[str], pattern: str) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for name in names)
