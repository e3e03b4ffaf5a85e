"""What a reader should know of single layers, and what it takes to do a run again."""

import json
from collections.abc import Mapping
from typing import Any

from convexprune.report.page.numerals import DASH
from convexprune.report.page.saved import Saved
from convexprune.report.page.words import layer_name


def remarks(saved: Saved) -> list[tuple[str, str]]:
    """(layer, what a reader should know of it)."""
    words = {True: "holds", False: "does not hold", None: "cannot be checked"}
    found = []
    for row in saved.rows:
        texts = [f"{row['norm']} is part of its program, and takes the bias"] if row.get("norm") else []
        texts += [f"{given['text']}: {words[given['holds']]}" for given in row.get("assumptions") or ()]
        texts += row.get("notes") or ()
        found += [(layer_name(str(row["name"])), str(text)) for text in texts]
    return found


def provenance(saved: Saved) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of (what, how it was)."""
    told = dict(saved.report["provenance"])
    versions = told.pop("versions", {})
    machine = {name: told.pop(name) for name in ("device", "threads", "dtype") if name in told}
    groups = [("Machine", _pairs(machine)), ("Versions", _pairs(versions)), ("Recipe", _pairs(told))]
    if saved.fingerprints:
        groups.append(("Fingerprints (SHA-256)", [*saved.fingerprints.items()]))
    timed = (saved.extras.data.get("latency") if saved.extras else None) or {}
    if saved.report.get("generalisation"):
        groups.append(("What is known of new data", _pairs(saved.report["generalisation"])))
    if timed:
        own = {name: timed["provenance"].get(name) for name in ("device", "threads", "dtype")}
        groups.append(("Times were measured on", _pairs(own)))
    return groups


def _pairs(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _value(value)) for name, value in told.items()]


def _value(value: Any) -> str:
    if value in (None, [], {}, ""):
        return DASH
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return str(value) if isinstance(value, str) else json.dumps(value)
