"""``convexprune evaluate``: networks are read and checked, evaluated together, shown and written."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from convexprune.cli.live import bars, console, errors, print_json, say
from convexprune.cli.reference import find_model
from convexprune.cli.source import evaluation_samples
from convexprune.evaluation import Evaluation, Noise, Series, evaluate_series
from convexprune.evaluation import evaluate as evaluated
from convexprune.files.weights import check_folder
from convexprune.network.weights import load_weights_into_
from convexprune.solvers.errors import InvalidInput

FILES = {"evaluation": "evaluation.json", "figures": "evaluation.parquet"}


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
    found = evaluation_samples(models[0], reference.prepare, *(flags[name] for name in names))
    own: dict[str, Any] = {"mean": found.mean, "std": found.std, "shape": found.shape, "seed": flags["seed"]}
    own |= {"corruptions": () if flags["no_corruptions"] else flags["corruption"], "severities": flags["severity"]}
    own |= {"parent": parent, "control": control, "noise": Noise() if parent is not None and flags["noise"] else None}
    with nullcontext() if flags["as_json"] else bars(errors) as shown:
        progress = None if shown is None else shown.progress
        samples = (found.inputs, found.labels)
        result: Evaluation | Series
        if len(models) == 1:
            result = evaluated(models[0], samples, progress=progress, **own)
        else:
            name = flags["name"] or flags["weights"][0].stem
            result = evaluate_series(models, samples, name=name, progress=progress, **own)
    written = {} if out is None else _written(result, out)
    if flags["as_json"]:
        print_json({"status": "evaluated", "exit_status": 0, "files": written, "evaluation": result.to_dict()})
        return 0
    console.print(result.table(console.width))
    for what, path in written.items():
        say(console, f"{what}: {path}")
    return 0


def _written(result: Evaluation | Series, out: Path) -> dict[str, str]:
    """The files in the folder, by what they are."""
    paths = {"evaluation": result.save(out / FILES["evaluation"])}
    paths["figures"] = result.to_parquet(out / FILES["figures"])
    return {what: str(path) for what, path in paths.items()}
