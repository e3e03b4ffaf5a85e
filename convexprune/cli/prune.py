"""``convexprune prune``: everything is read and checked before anything is solved, then solved, written and shown."""

import ast
import copy
import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from convexprune.cli.live import (
    INTERRUPTED,
    NOTHING_PRUNED,
    TIME_LIMIT,
    UNCERTIFIED,
    bars,
    console,
    errors,
    interruptible,
    print_json,
    say,
    show,
)
from convexprune.cli.source import Source, chosen_mask, labelled_samples
from convexprune.costs import accuracy
from convexprune.errors import DamagedFile
from convexprune.files.texts import Json
from convexprune.files.weights import check_folder, save_json
from convexprune.network.weights import load_weights_into_, save_weights
from convexprune.options import Options
from convexprune.page.consistency import seal
from convexprune.page.extras import read_extras, save_extras
from convexprune.preview import preview
from convexprune.prune import Request, prune_, recorded_mode
from convexprune.pruners.pruner import make_pruner
from convexprune.report.report import Report
from convexprune.runs.data import Data
from convexprune.runs.executors import cluster
from convexprune.runs.journal import Journal, check_same, read_json
from convexprune.solvers.errors import ConvexPruneError, InvalidInput
from convexprune.targets import as_target, read_table
from convexprune.verification import verify

_log = logging.getLogger(__name__)
_RESULTS = ("model.safetensors", "report.json")


def prune(flags: Mapping[str, Any]) -> int:
    """With the flags of the command by name; the exit status."""
    if flags["scheduler"] is not None and flags["jobs"] is not None:
        raise InvalidInput("--jobs: a cluster solves as many layers at a time as it has room for; leave it out")
    job, as_json = Job(flags), flags["as_json"]
    if flags["dry_run"]:
        plan = preview(job.model, **job.arguments, jobs=flags["jobs"] or (1 if flags["scheduler"] is None else 2))
        show({"status": "planned", "exit_status": 0, "plan": plan.to_dict()} if as_json else plan)
        return 0
    if (finished := job.finished()) is not None:
        return _nothing_to_do(job, finished, as_json)
    alone = flags["scheduler"] is None and flags["jobs"] in (None, 1)
    workers = nullcontext(flags["jobs"] or 1) if flags["scheduler"] is None else cluster(flags["scheduler"])
    with workers as jobs, interruptible(partial(_say_stopping, alone)) as interrupt, bars(errors) as shown:
        callback = shown.callback if alone else None  # what workers do is not seen here
        report = job.run(jobs=jobs, stop=interrupt.is_set, progress=shown.progress, callback=callback)
    return _finish(job, report, as_json, interrupted=interrupt.is_set())


class Job:
    """What the flags mean, checked and read: a model, what ``prune_`` is given, and the folder for the results."""

    def __init__(self, flags: Mapping[str, Any]) -> None:
        self.out = _checked(flags["out"], flags["dry_run"])
        values = {name: read_table(f"--{name}", flags[name]) for name in ("eps", "sparsity") if flags[name]}
        target = as_target(flags["target"], **values)
        options, mask = _options(flags).checked(), chosen_mask(flags["mask"], flags["no_mask"])
        own = ("model", "weights", "calibration", "key", "samples", "max_ratio", "holdout")
        self.read = Source(**{name: flags[name] for name in own}, mask=mask).read(flags["labels_key"])
        # After the model, whose module may hold a method of its own.
        method = make_pruner(flags["method"], target, _named("--method-option", flags["method_option"]))[1]
        self.model, self.dense = self.read.model, copy.deepcopy(self.read.model)
        for notice in self.read.notices:
            _log.info("%s", notice)
        labels = self.read.labels if method.generalises else None  # else they only balance the samples
        data = Data(self.read.inputs, mask=mask, holdout=self.read.holdout, labels=labels)
        self.data = None if self.read.inputs is None else data
        self.arguments: dict[str, Any] = {"data": self.data, "target": target, "method": method, "options": options}
        labelled = [flags[name] for name in ("data", "data_key", "label_key", "max_ratio")]
        self.labelled = labelled_samples(self.read, *labelled) if flags["data"] else None
        self.accuracy: dict[str, float] = {}
        self.written: dict[str, Any] = {}
        self.notes: list[str] = []

    def finished(self) -> Json | None:
        """The report of this very run if the folder holds all its results, verified, else None; ``notes`` says why.

        Raises:
            OtherRun: It holds those of another run.
        """
        if self.out is None or not all((self.out / name).exists() for name in ("run.json", *_RESULTS)):
            return None
        request = Request.of(self.model, **self.arguments, mode=recorded_mode(self.out), jobs=1)
        described = Journal.existing(self.out)[1]
        check_same(self.out, described, {**described, "recipe": request.recipe()})
        try:
            report = read_json(self.out / "report.json")
            read_extras(self.out)
        except DamagedFile:
            report = {}
        sound = report.get("sha256") == seal(report, self.out / "model.safetensors")
        if sound and report["provenance"]["stopped"] is not None:
            return None
        found = (
            verify(self.model, self.data, self.out, method=request.pruner, options=request.options) if sound else None
        )
        if found is None or found.results:
            self.notes.append(f"the results in {self.out} are not as they were written: written again from its layers")
            return None
        if not (found.complete and all(row.ok for row in found.layers)):
            return None  # the run that goes on says what is wrong
        if self.labelled is None:
            return report
        load_weights_into_(self.model, self.out / "model.safetensors", resize=True)
        self._measure(self.dense, "before")
        self._measure(self.model, "after")
        return {**report, "accuracy": self.accuracy}

    def run(self, **call: Any) -> Report:
        """``prune_`` with the folder as run directory, and the accuracy before and after."""
        self._measure(self.dense, "before")  # a forward may leave its marks on the model, which is to be fingerprinted
        report = prune_(self.model, **self.arguments, run=self.out, **call)
        self._measure(self.model, "after")
        return replace(report, notices=(*self.read.notices, *report.notices))

    def write(self, report: Report) -> dict[str, Path]:
        """Write the results, the report sealed with a SHA-256 of itself and the model; paths by what they are."""
        assert self.out is not None  # noqa: S101 - without a folder nothing was pruned
        files = {"model": save_weights(self.model, self.out / "model.safetensors")}
        data = report.to_dict() | {"accuracy": self.accuracy}
        self.written = data | {"sha256": seal(data, files["model"])}
        files["report"] = save_json(self.written, self.out / "report.json")
        if report.provenance.get("stopped") is None:
            try:
                files["extras"] = save_extras(self.out, self.dense, self.model, self.read.batch, report)
            except (ConvexPruneError, RuntimeError) as error:  # the results are written, and count for more
                self.notes.append(f"what sparsity buys could not be measured: {error}")
        return files

    def _measure(self, model: nn.Module, when: str) -> None:
        if self.labelled is not None:
            self.accuracy[when] = accuracy(model, *self.labelled)


def _checked(out: Path | None, dry_run: bool) -> Path | None:
    if out is None:
        if not dry_run:
            raise InvalidInput("--out: expected a folder to write to, found none")
        return None
    check_folder(out)
    existing = [str(out / name) for name in _RESULTS if (out / name).exists()]
    if existing and not (out / "run.json").exists():
        raise InvalidInput(f"{', '.join(existing)}: there already, and not overwritten; choose another --out")
    return out


def _options(flags: Mapping[str, Any]) -> Options:
    """The options that were given as flags of the same names; tables as NAME=VALUE."""
    values = {each.name: flags[each.name] for each in fields(Options) if each.name in flags}
    for name in ("activations", "solver_options"):
        values[name] = _named(f"--{name[:-1].replace('_', '-')}", values[name]) or None
    return Options(**values)


def _named(flag: str, texts: Iterable[str] | None) -> dict[str, object]:
    """["beta=2", "points=incoming"] by name: Python's own numbers, True, False and None where they are such.

    Raises:
        InvalidInput: Something that is not NAME=VALUE.
    """
    found: dict[str, object] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidInput(f"{flag}: expected NAME=VALUE, found {text!r}")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _say_stopping(alone: bool) -> None:
    rest = "" if alone else "; layers that workers are solving are waited for"
    say(errors, f"stopping in order{rest}. Press Ctrl-C again to abort at once: what is solved is kept")


def _nothing_to_do(job: Job, report: Mapping[str, Any], as_json: bool) -> int:
    assert job.out is not None  # noqa: S101 - a report was found there
    status = _status(certified=report["certified"], pruned=report["pruned"])
    if as_json:
        names = {"model": "model.safetensors", "report": "report.json", "extras": "extras.json"}
        files = {what: str(job.out / name) for what, name in names.items() if (job.out / name).exists()}
        print_json({"status": "finished before", "exit_status": status, "files": files, "report": report})
        return status
    kept = f"{report['nonzeros']:,} of {report['nonzeros_before']:,} weights kept"
    say(console, f"{job.out} holds this very run, finished: {kept}. Nothing to do")
    for line in report.get("head", ()):
        say(console, line)
    _show_accuracy(job)
    return status


def _finish(job: Job, report: Report, as_json: bool, *, interrupted: bool) -> int:
    """Write and show; an exit status of its own where something is open."""
    files = job.write(report)
    stopped = report.provenance.get("stopped")
    status = _status(certified=report.certified, pruned=report.pruned)
    if stopped is not None:
        status = INTERRUPTED if interrupted else TIME_LIMIT
    if as_json:
        shown: dict[str, Any] = {"status": "finished" if stopped is None else "stopped", "exit_status": status}
        print_json(shown | {"files": files, "notes": job.notes, "report": job.written})
        return status
    if report.layers or stopped is None:
        console.print(report.table(console.width))
    _show_accuracy(job)
    names = {"model": "pruned model", "extras": "what sparsity buys"}
    for what, path in files.items():
        say(console, f"{names.get(what, what)}: {path}")
    for note in job.notes:
        say(errors, note)
    if stopped is not None:
        say(errors, _unfinished(report, stopped))
    elif status == UNCERTIFIED:
        errors.print("[red]not every certificate or guarantee holds[/red]: see the status column")
    return status


def _status(*, certified: bool, pruned: bool) -> int:
    """The exit status of a run that came to its end."""
    return (0 if pruned else NOTHING_PRUNED) if certified else UNCERTIFIED


def _show_accuracy(job: Job) -> None:
    if job.accuracy:
        console.print("accuracy {before:.2%} before, {after:.2%} after".format(**job.accuracy), highlight=False)


def _unfinished(report: Report, stopped: str) -> str:
    early = [row.name for row in report.layers if row.status in ("stopped", "time limit")]
    left = [module.name for module in report.skipped if module.reason.startswith("not reached")]
    lines = [f"not finished: {stopped}"]
    lines += [f"ended early, with the best weights so far: {', '.join(early)}"] if early else []
    lines += [f"not reached, and as trained: {', '.join(left)}"] if left else []
    return "; ".join(lines) + ". The same command goes on from here"
