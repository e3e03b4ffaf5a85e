"""A run's results in its folder: sealed when they are written, checked by the seal when they are read.

The seal tells of changes by accident, and in which file. What is said of data, errors, bounds and the network's
figures, only ``verify`` can tell.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convexprune.errors import DamagedFile
from convexprune.files.texts import Json
from convexprune.files.weights import StrPath, as_path, listed, plain
from convexprune.report.report import Assumption, LayerReport, Report, SkippedModule
from convexprune.runs.journal import Journal, read_json, recipe_fingerprint
from convexprune.runs.outcome import NetworkPromise
from convexprune.solvers.errors import InvalidInput

_SEALED = ("model.safetensors", "maps.safetensors", "extras.json", "run.json", "layers/*.json", "layers/*.safetensors")
_TOTALS = ("nonzeros_before", "nonzeros", "pruned", "certified", "head")
_REMEDY = "restore it, or run the same prune again, which judges the entries of its journal and writes the results anew"


@dataclasses.dataclass(frozen=True)
class Results:
    """A run's folder, read and checked.

    Attributes:
        title: The folder's name.
        data: report.json: ``Report.to_dict`` and what was added to it.
        report: Made of its rows, so that totals, verdict and head follow from them.
        entries: Those of the journal, without their tensors.
        fingerprints: Of model, data and recipe; empty without a journal.
    """

    title: str
    data: Json
    report: Report
    entries: Sequence[Json]
    fingerprints: Mapping[str, str]


def sealed(folder: Path, report: Json) -> dict[str, object]:
    """The report as it is to be written, with the SHA-256 of each file of the run beside it, and of all this itself."""
    digests = _digests(folder)
    return {**report, "sha256": digests | {"report.json": _report_digest(report, digests)}}


def read_results(folder: StrPath) -> Results:
    """Read and check a run's folder.

    Raises:
        InvalidInput: It holds no report.json.
        OtherRun: Its journal is of another format.
        DamagedFile: A file in it is not what convexprune writes, was changed since it was sealed, or report.json has
            totals that are not those of its rows.
    """
    place = as_path(folder)
    path = place / "report.json"
    if not path.is_file():
        found = "no such folder" if not place.is_dir() else "no report.json in it"
        raise InvalidInput(f"{folder}: {found}; give the folder of a run that ended, or save_json(report.to_dict(), …)")
    data = read_json(path, "write it again")
    try:
        wrong = _changes(place, data) if "sha256" in data else []
        report = _rebuilt(data)
        known = plain(report.to_dict())
        differing = [name for name in _TOTALS if data[name] != known[name]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{path} is not as convexprune writes it ({error!r}): {_REMEDY}") from error
    wrong += [f"{name} is {data[name]!r}, expected {known[name]!r} from the rows" for name in differing]
    if wrong:
        raise DamagedFile(f"{path}: {listed(wrong, 4)}: {_REMEDY}")
    if not (place / "run.json").exists():
        return Results(place.resolve().name, data, report, (), {})
    journal, run = Journal.existing(place)
    prints = {name: str(run[name]) for name in ("model", "data")} | {"recipe": recipe_fingerprint(run["recipe"])}
    # One at a time: multipliers are as large as the calibration data, and none is kept here.
    return Results(place.resolve().name, data, report, [record.data for record in journal.entries()], prints)


def _changes(folder: Path, report: Json) -> list[str]:
    """Files that are not those that the report was sealed with."""
    then = dict(report["sha256"])
    now = _digests(folder) | {"report.json": _report_digest(report, then)}
    ends = dict.fromkeys(then.keys() - now.keys(), "is missing")
    ends |= dict.fromkeys(now.keys() - then.keys(), "was added after the results were written")
    ends |= {name: "was changed after it was written" for name in then if now.get(name, then[name]) != then[name]}
    return [f"{name} {end}" for name, end in sorted(ends.items())]


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that a report is sealed with, by name."""
    found = {}
    for path in sorted(path for pattern in _SEALED for path in folder.glob(pattern)):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _report_digest(report: Json, digests: Mapping[str, str]) -> str:
    """SHA-256 of the report with the digests of the other files."""
    own = {name: value for name, value in report.items() if name != "sha256"}
    others = {name: digest for name, digest in digests.items() if name != "report.json"}
    return hashlib.sha256(json.dumps(plain([own, others]), sort_keys=True).encode()).hexdigest()


def _rebuilt(data: Json) -> Report:
    """The report made of its rows."""
    error = math.nan if data["output_error"] is None else data["output_error"]
    network = data.get("network")
    if network is not None:
        own = {field.name: network[field.name] for field in dataclasses.fields(NetworkPromise)}
        bound = math.inf if own["bound"] is None else own["bound"]
        network = NetworkPromise(**{**own, "bound": bound, "error": error})
    return Report(
        layers=tuple(map(_row, data["layers"])),
        skipped=tuple(SkippedModule(**module) for module in data["skipped"]),
        output_error=error,
        samples=data["samples"],
        seconds=data["seconds"],
        provenance=data["provenance"],
        network=network,
        notices=tuple(data.get("notices", ())),
        mask=data.get("mask"),
    )


def _row(claimed: Json) -> LayerReport:
    """A row from plain data, where lists stand for tuples, and null for what JSON has no number for: its default."""
    known = {name: value for name, value in claimed.items() if value is not None}
    values: dict[str, Any] = {"output_error": math.nan}
    values |= {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    return LayerReport(**values | {"assumptions": tuple(Assumption(**each) for each in known.get("assumptions", ()))})
