"""``convexprune evaluate``: networks are read and checked, evaluated together, shown and written."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convexprune.cli.live import bars, console, errors, print_json, say
from convexprune.cli.reference import find_model
from convexprune.cli.source import evaluation_samples
from convexprune.evaluation import Evaluation, Noise, Series, evaluate_series
from convexprune.evaluation import evaluate as evaluated
from convexprune.files.weights import check_folder
from convexprune.network.weights import load_weights_into_
from convexprune.solvers.errors import InvalidInput, MissingExtra

_UNKNOWN = (
    "inputs are not (pixels − mean)/std of images in the file, [n, height, width] with 1 or 3 channels behind or before"
)


def evaluate(flags: Mapping[str, Any]) -> int:
    """With the flags of the command by name; the exit status."""
    out: Path | None = flags["out"]
    if out is not None:
        check_folder(out)
    if len(flags["weights"]) > 1 and flags["parent"] is None:
        raise InvalidInput("--weights: several networks are compared with the one they were pruned from: give --parent")
    reference = find_model(flags["model"], Path.cwd)

    def read(path: Path) -> nn.Module:
        model = reference.build()
        load_weights_into_(model, path, resize=True, max_ratio=flags["max_ratio"])
        return model

    models = [read(path) for path in flags["weights"]]
    parent, control = (None if flags[name] is None else read(flags[name]) for name in ("parent", "control"))
    names = ("data", "data_key", "label_key", "samples", "max_ratio")
    data, scale = evaluation_samples(models[0], reference.prepare, *(flags[name] for name in names))
    corruptions: Sequence[str] | None = () if flags["no_corruptions"] else flags["corruption"]
    notices = list[str]()
    if scale is None and corruptions != ():
        if corruptions:
            raise InvalidInput(f"--corruption: {_UNKNOWN}")
        corruptions, notices = (), [f"corruptions are left out: {_UNKNOWN}"]
    numbers = isinstance(data.inputs, Tensor) and data.inputs.is_floating_point()
    noisy = parent is not None and numbers if flags["noise"] is None else flags["noise"]
    own: dict[str, Any] = {"parent": parent, "control": control, "noise": Noise() if noisy else None, **(scale or {})}
    own |= {"corruptions": corruptions, "severities": flags["severity"], "seed": flags["seed"]}
    with nullcontext() if flags["as_json"] else bars(errors) as shown:
        own["progress"] = None if shown is None else shown.progress
        result: Evaluation | Series
        if len(models) == 1:
            result = evaluated(models[0], data, **own)
        else:
            result = evaluate_series(models, data, name=flags["name"] or flags["weights"][0].stem, **own)
    _show(_noted(result, notices), out, flags["as_json"])
    return 0


def _noted(result: Evaluation | Series, notices: Sequence[str]) -> Evaluation | Series:
    """The result, with more of what was left out; that of a series stands with its parent."""
    if isinstance(result, Series):
        return replace(result, parent=replace(result.parent, notices=(*notices, *result.parent.notices)))
    return replace(result, notices=(*notices, *result.notices))


def _show(result: Evaluation | Series, out: Path | None, as_json: bool) -> None:
    """Write the files if there is a folder for them, and print the result."""
    files, notes = dict[str, str](), list[str]()
    if out is not None:
        files["evaluation"] = str(result.save(out / "evaluation.json"))
        try:
            files["figures"] = str(result.to_parquet(out / "evaluation.parquet"))
        except MissingExtra as error:  # the JSON holds them, too
            notes.append(str(error))
    if as_json:
        potential = {"prune_potential": result.prune_potential().to_dict()} if isinstance(result, Series) else {}
        found = {"kind": result.kind, "files": files, "notes": notes, "evaluation": result.to_dict(), **potential}
        print_json({"status": "evaluated", "exit_status": 0, **found})
        return
    console.print(result.table(console.width))
    for what, path in files.items():
        say(console, f"{what}: {path}")
    for note in notes:
        say(errors, note)
