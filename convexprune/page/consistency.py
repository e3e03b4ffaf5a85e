"""What a run's results say, checked as far as that goes without the model and the data.

A report's totals and verdict follow from its rows, and these from the journal; nonzeros and shapes are counted in the
file of weights; a SHA-256 over the report and that file tells of changes by accident. Errors, bounds and the network's
figures are about data: ``verify`` recomputes those.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from convexprune.errors import DamagedFile
from convexprune.files.texts import Json
from convexprune.files.weights import StrPath, as_path, plain
from convexprune.report.report import Assumption, LayerReport, Report, SkippedModule
from convexprune.runs.answer import Answer, layer_figures
from convexprune.runs.journal import Journal, read_json, recipe_fingerprint
from convexprune.runs.layer import Fold
from convexprune.runs.outcome import NetworkPromise
from convexprune.runs.records import recalled
from convexprune.solvers.errors import InvalidInput

_NAMES = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_CUT = ("stopped", "time limit")  # statuses of layers that the end of a run cut short, which no journal keeps


@dataclasses.dataclass(frozen=True)
class Checks:
    """What was found to agree, and what rests on the report's word: sentences; and the report, made of its rows."""

    done: tuple[str, ...]
    open: tuple[str, ...]
    report: Report


@dataclasses.dataclass(frozen=True)
class Results:
    """A run's folder, read and checked.

    Attributes:
        title: The folder's name.
        data: report.json: ``Report.to_dict`` and what was added to it.
        checks: What was compared.
        records: The journal's entries without their tensors.
        fingerprints: Of model, data and recipe; empty without a journal.
    """

    title: str
    data: Json
    checks: Checks
    records: Sequence[Json]
    fingerprints: Mapping[str, str]


def read_results(folder: StrPath) -> Results:
    """Read and check a run's folder.

    Raises:
        InvalidInput: It holds no report.json.
        OtherRun: Its journal is of another format.
        DamagedFile: A file in it is not what convexprune writes, or report.json is not what the others say.
    """
    place = as_path(folder)
    path = place / "report.json"
    if not path.is_file():
        found = "no such folder" if not place.is_dir() else "no report.json in it"
        raise InvalidInput(f"{folder}: {found}; give the folder of a run that ended, or save_json(report.to_dict(), …)")
    data, journal, records = read_json(path, "write it again"), None, list[Json]()
    run: Json = {}
    if (place / "run.json").exists():
        journal, run = Journal.existing(place)
        # One at a time: multipliers are as large as the calibration data, and none is kept here.
        records = [record.data for record in journal.entries()]
    try:
        prints = {name: str(run[name]) for name in ("model", "data")} if run else {}
        prints |= {"recipe": recipe_fingerprint(run["recipe"])} if run else {}
        checks = check_results(place, data, journal, run.get("recipe"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wrong = f"report.json or an entry of the journal is not as convexprune writes it ({error!r})"
        raise DamagedFile(f"{place}: {wrong}; restore it, or prune again") from error
    return Results(place.resolve().name, data, checks, records, prints)


def seal(report: Json, weights: Path) -> str:
    """SHA-256 of the file of weights and of all else in the report."""
    digest = hashlib.sha256(weights.read_bytes())
    own = {key: value for key, value in report.items() if key != "sha256"}
    digest.update(json.dumps(plain(own), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def check_results(folder: Path, report: Json, journal: Journal | None = None, recipe: Json | None = None) -> Checks:
    """Compare a report with all that lies beside it.

    Args:
        folder: Of the run.
        report: report.json, as read.
        journal: The run's entries, if there are any.
        recipe: That of run.json.

    Raises:
        DamagedFile: Something does not agree; the message names the first of it. Or an entry was damaged.
        KeyError, TypeError, ValueError, AttributeError: The report is not such as ``Report.to_dict`` gives.
    """
    weights = folder / "model.safetensors"
    done, left = list[str](), list[str]()
    if "sha256" not in report:
        left.append("report.json has no checksum, as it was not written by `convexprune prune`")
    elif not weights.is_file() or report["sha256"] != seal(report, weights):
        raise _refusal(folder, ["report.json or model.safetensors was changed after they were written"])
    else:
        done.append("report.json and model.safetensors are as they were written (SHA-256)")
    tensors = _tensors(weights)
    known, found = _rows_from_entries(report, journal, tensors)
    found += [text for row in report["layers"] for text in _of_a_row(row, report["provenance"], tensors, known)]
    if tensors is not None:
        held = ", which holds the weights of the journal" if any(known.values()) else ""
        done.append(f"shapes and nonzeros were counted in model.safetensors{held}")
    rebuilt = _rebuilt(report)
    found += _differences("", report, plain(rebuilt.to_dict()))
    done.append("totals and verdict follow from the layers' rows")
    left.append("seconds, accuracies and costs are as recorded")
    if journal is None:
        left.append("there is no journal: errors and certificates are as recorded")
    else:
        cut = [row["name"] for row in report["layers"] if not row.get("goal") or row["status"] in _CUT]
        lacking = [row["name"] for row in report["layers"] if row["name"] not in (*known, *cut)]
        found += [f"layer {name!r} has no entry in the journal" for name in lacking]
        done.append("the layers' rows are those of the journal's entries, whose nonzeros were counted")
        left.append(
            "errors, bounds and the network's figures are as recorded: `convexprune verify` recomputes them from the "
            "trained model and the data"
        )
    if recipe is not None:
        claimed = {key: value for key, value in report["provenance"].items() if key in recipe}
        found += _differences("provenance.", _without_infinity(claimed), _without_infinity(recipe))
        done.append("the recipe is that of run.json")
    if found:
        raise _refusal(folder, found)
    return Checks(tuple(done), tuple(left), rebuilt)


def _refusal(folder: Path, found: Sequence[str]) -> DamagedFile:
    more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    return DamagedFile(
        f"{folder / 'report.json'}: not what lies beside it: {'; '.join(found[:4])}{more}. Restore it, or run the same "
        "prune again: of a run with a journal it judges the entries and writes the results anew"
    )


def _tensors(path: Path) -> dict[str, Tensor] | None:
    """Those of the file of weights; None where there is none."""
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except Exception as error:  # damaged bytes make the parser raise nearly anything
        raise DamagedFile(f"{path} holds no tensors ({error}); restore it, or prune again") from error


def _weights_of(layer: str, tensors: Mapping[str, Tensor] | None) -> list[Tensor]:
    """A module's weight, or the projections of its attention; empty where they are not in the file."""
    keys = [f"{layer}.{name}" if layer else name for name in _NAMES]
    found = {key: tensors[key] for key in keys if tensors is not None and key in tensors}
    return [found[keys[0]]] if keys[0] in found else list(found.values())


def _rows_from_entries(
    report: Json, journal: Journal | None, tensors: Mapping[str, Tensor] | None
) -> tuple[dict[str, bool | None], list[str]]:
    """Rows compared with what the journal's entries come to, of which each row has to be one.

    Returns, by layers that have entries, whether the file holds the weights of one, None where it has none that could
    be compared; and what does not agree.
    """
    claimed = {str(row["name"]): row for row in report["layers"]}
    wrong, held = dict[str, list[str]](), dict[str, bool | None]()
    for record in () if journal is None else journal.entries():
        name = record.data["layer"]
        row = claimed.get(name)
        if row is None or record.data["measured"]:
            continue
        shrunk, sampled = row.get("before") is not None, row.get("items", "") not in ("", "inputs")
        if shrunk and sampled:  # the entry is about the inputs of this layer, and the row about its neurons
            continue
        answers = recalled(record, [Fold()] * len(record.data["groups"]))
        figures = dict(layer_figures(str(record.data["wanted"]), record.data["allowed"], answers))
        held.setdefault(name, None)
        if shrunk:  # of a run that removes neurons: the weights are smaller than those of the entry
            figures = {key: figures[key] for key in ("samples", "output_error", "seconds")}
        else:
            figures["nonzeros"] = _counted(answers, figures["nonzeros"])
            if set(figures["notes"]) <= set(row["notes"]):  # others may be about the layer's place in the network
                del figures["notes"]
            if sampled and row["status"] == "assumption fails":  # of a promise about all layers together
                del figures["status"]
            if weights := _weights_of(name, tensors):
                same = figures["nonzeros"] == row["nonzeros"] and _same_weights(answers, weights)
                held[name] = held[name] or same
        differing = list(_differences(f"layers.{name!r}.", row, plain(figures)))
        if name not in wrong or not differing:
            wrong[name] = differing
    return held, [text for texts in wrong.values() for text in texts]


def _of_a_row(
    row: Json, provenance: Json, tensors: Mapping[str, Tensor] | None, held: Mapping[str, bool | None]
) -> Iterator[str]:
    """What the file of weights, or the row itself, says otherwise than a row."""
    name, weights = str(row["name"]), _weights_of(str(row["name"]), tensors)
    if tensors is not None and not weights:
        yield f"layer {name!r} has no weight in model.safetensors"
    if len(weights) == 1 and list(weights[0].shape) != list(row["shape"]):
        yield f"layer {name!r}: shape {row['shape']}, in model.safetensors {list(weights[0].shape)}"
    count = sum(int(weight.count_nonzero()) for weight in weights)
    if weights and count != row["nonzeros"]:
        yield f"layer {name!r}: nonzeros {row['nonzeros']}, in model.safetensors {count}"
    elif weights and held.get(name) is False:
        yield f"layer {name!r}: model.safetensors holds other weights than the journal"
    for figure, limit in (("gap", "tol"), ("violation", "feas_tol")):
        most = provenance.get(limit)
        value = math.inf if row.get(figure) is None else row[figure]
        if row["status"] == "solved" and most is not None and value > most:
            yield f"layer {name!r}: status 'solved' with a {figure} of {value:g}, above {limit} {most:g}"


def _counted(answers: Sequence[Answer], claimed: int) -> int:
    """Nonzeros in the arrays; whether their last row is a bias, which does not count, the entry does not say."""
    every = sum(int(answer.stored.count_nonzero()) for answer in answers)
    without = sum(int(answer.stored[:-1].count_nonzero()) for answer in answers)
    return claimed if claimed in (every, without) else without


def _same_weights(answers: Sequence[Answer], weights: Sequence[Tensor]) -> bool:
    """Whether an entry's weights are those of the file, in whatever layout."""
    stored, count = [answer.stored for answer in answers], sum(weight.numel() for weight in weights)
    if sum(each.numel() for each in stored) != count:  # the last row is a bias
        stored = [each[:-1] for each in stored]
    one, other = (torch.cat([each.flatten() for each in parts]).sort().values for parts in (stored, weights))
    return torch.equal(one, other)


def _rebuilt(report: Json) -> Report:
    """The report made of its rows: totals, verdict and head follow from them."""
    network = report.get("network")
    error = math.nan if report["output_error"] is None else report["output_error"]
    if network is not None:
        own = {field.name: network[field.name] for field in dataclasses.fields(NetworkPromise)}
        bound = math.inf if own["bound"] is None else own["bound"]
        network = NetworkPromise(**{**own, "bound": bound, "error": error})
    return Report(
        layers=tuple(map(_row, report["layers"])),
        skipped=tuple(SkippedModule(**module) for module in report["skipped"]),
        output_error=error,
        samples=report["samples"],
        seconds=report["seconds"],
        provenance=report["provenance"],
        network=network,
        notices=tuple(report.get("notices", ())),
        mask=report.get("mask"),
    )


def _row(claimed: Json) -> LayerReport:
    """A row as the report gives it."""
    values = dict(claimed) | {name: tuple(value) for name, value in claimed.items() if isinstance(value, list)}
    for field in dataclasses.fields(LayerReport):
        if field.type is float and values.get(field.name, 0.0) is None:  # JSON has no infinity, and no NaN
            values[field.name] = math.nan if field.default is dataclasses.MISSING else field.default
    values["assumptions"] = tuple(Assumption(**each) for each in values.get("assumptions", ()))
    return LayerReport(**values)


def _differences(where: str, claimed: object, computed: object) -> Iterator[str]:
    """What is claimed otherwise than computed; entries that one of them lacks are not compared."""
    if isinstance(claimed, Mapping) and isinstance(computed, Mapping):
        for key, value in computed.items():
            if key in claimed:
                yield from _differences(f"{where}{key}.", claimed[key], value)
    elif isinstance(claimed, list | tuple) and isinstance(computed, list | tuple) and len(claimed) == len(computed):
        for number, (one, other) in enumerate(zip(claimed, computed, strict=True)):
            name = repr(other["name"]) if isinstance(other, Mapping) and "name" in other else number
            yield from _differences(f"{where}{name}.", one, other)
    elif claimed != computed:
        yield f"{where.rstrip('.')} is {claimed!r}, expected {computed!r}"


def _without_infinity(value: object) -> object:
    """Infinity is a text in run.json, and null in report.json."""
    if isinstance(value, Mapping):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(item) for item in value]
    return None if value in ("inf", "-inf", "nan") else plain(value)
