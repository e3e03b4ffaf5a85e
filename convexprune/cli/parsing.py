"""What the command line's texts mean."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from convexprune.coresets import Guarantee
from convexprune.solvers.errors import ConvexPruneError, InvalidInput


def parsed_table(option: str, texts: Sequence[str], value: Callable[[str], Any] = float) -> Any:
    """["0.1"] or ["features.*=0.05", "0.1"]: patterns in their order, then the plain value for the rest.

    Raises:
        InvalidInput: A value is no number, or none that ``value`` takes, or two are given for the same.
    """
    table: dict[str, Any] = {}
    for text in texts:
        pattern, equals, given = text.rpartition("=")
        pattern = pattern if equals else "*"
        if pattern in table:
            raise InvalidInput(f"{option}: a second value for {pattern!r}, {text!r}; give one for each pattern")
        try:
            table[pattern] = value(given)
        except ConvexPruneError:
            raise  # it is a number, but not one that will do
        except ValueError:
            raise InvalidInput(f"{option}: expected a number or PATTERN=number, found {text!r}") from None
    rest = table.pop("*", None)
    return table | ({} if rest is None else {"*": rest}) if table else rest


def parsed_sparsity(texts: Sequence[str]) -> Any:
    """["0.8"], ["2:4"], or by name: ["stem=0", "features.*=0.9", "2:4"], as for eps.

    Raises:
        InvalidInput: Something else.
    """
    return parsed_table("--sparsity", texts, lambda text: text if re.fullmatch(r"\d+:\d+", text) else float(text))


def parsed_size(keep: Sequence[str] | None, eps: Sequence[str] | None, delta: float | None) -> Any:
    """The size of a coreset: from --keep, or from --eps and --delta.

    Raises:
        InvalidInput: Both or neither were given, or something that is no size.
        InvalidTolerance: An eps or delta out of its range.
    """
    if delta is not None and eps and not keep:
        return parsed_table("--eps", eps, lambda text: Guarantee(float(text), delta))
    if delta is not None or eps:
        raise InvalidInput("a coreset's size is either --keep, or --eps with --delta")
    if not keep:
        raise InvalidInput("--keep: expected a ratio (0.1) or a count (30) to keep, or --eps with --delta; found none")
    return parsed_table("--keep", keep, _ratio_or_count)


def parsed_options(texts: Sequence[str]) -> dict[str, Any]:
    """["beta=2", "points=incoming"] as a method's options: numbers where they are numbers.

    Raises:
        InvalidInput: Something that is not NAME=VALUE.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidInput(f"--option: expected NAME=VALUE, found {text!r}")
        try:
            found[name] = _ratio_or_count(value)
        except ValueError:
            found[name] = value
    return found


def _ratio_or_count(text: str) -> float | int:
    return float(text) if any(mark in text.lower() for mark in ".e") else int(text)
