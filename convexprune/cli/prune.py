"""``convexprune prune``: everything is read and checked before anything is solved, then solved, written and shown."""

import ast
import copy
import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
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
)
from convexprune.cli.source import ModelData, labelled_samples, read_source
from convexprune.costs import accuracy
from convexprune.errors import DamagedFile
from convexprune.files.texts import Json
from convexprune.files.weights import check_folder, save_json
from convexprune.network.weights import load_weights_into_, save_weights
from convexprune.options import Options
from convexprune.page.extras import save_extras
from convexprune.preview import preview
from convexprune.prune import Request, prune_, recorded_mode
from convexprune.pruners.pruner import make_pruner
from convexprune.report.report import Report
from convexprune.runs.data import Data
from convexprune.runs.executors import cluster
from convexprune.runs.journal import Journal, check_same
from convexprune.runs.results import read_results, sealed
from convexprune.solvers.errors import ConvexPruneError, InvalidInput
from convexprune.targets import as_target, read_table
from convexprune.verification import verify

_log = logging.getLogger(__name__)
_FILES = {"model": "model.safetensors", "report": "report.json", "extras": "extras.json"}


def prune(flags: Mapping[str, Any]) -> int:
    """With the flags of the command by name; the exit status."""
    scheduler, jobs = flags["scheduler"], flags["jobs"]
    if scheduler is not None and jobs is not None:
        raise InvalidInput("--jobs: a cluster solves as many layers at a time as it has room for; leave it out")
    out, as_json = _checked(flags["out"], flags["dry_run"]), flags["as_json"]
    job = Job.of(flags)
    if out is None or flags["dry_run"]:
        plan = preview(job.read.model, **job.arguments, jobs=jobs or (1 if scheduler is None else 2))
        if as_json:
            print_json({"status": "planned", "exit_status": 0, "plan": plan.to_dict()})
        else:
            console.print(plan.table(console.width))
        return 0
    notes, interrupted, status = list[str](), False, "finished before"
    known = job.finished(out, notes)
    if known is None:
        alone = scheduler is None and jobs in (None, 1)
        workers = nullcontext(jobs or 1) if scheduler is None else cluster(scheduler)
        with workers as pool, interruptible(partial(_say_stopping, alone)) as interrupt, bars(errors) as shown:
            callback = shown.callback if alone else None  # what workers do is not seen here
            call = {"jobs": pool, "stop": interrupt.is_set, "progress": shown.progress, "callback": callback}
            known = job.run(out, notes, **call)
        interrupted = interrupt.is_set()
        status = "finished" if known[0].provenance["stopped"] is None else "stopped"
    report, written = known
    outcome: dict[str, Any] = {"status": status, "exit_status": _exit_status(report, interrupted)}
    outcome["files"] = {what: str(out / name) for what, name in _FILES.items() if (out / name).exists()}
    if as_json:
        print_json({**outcome, "notes": notes, "report": written})
    else:
        _show(report, written["accuracy"], outcome, notes, out)
    return _exit_status(report, interrupted)


@dataclass(frozen=True)
class Job:
    """What the flags mean, checked and read.

    Attributes:
        read: The model and its data.
        arguments: What ``prune_`` is given beside the model.
        labelled: Inputs and labels for the accuracy before and after; None without any.
    """

    read: ModelData
    arguments: Mapping[str, Any]
    labelled: tuple[Any, Any] | None

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> "Job":
        """From the flags by name."""
        values = {name: read_table(f"--{name}", flags[name]) for name in ("eps", "sparsity") if flags[name]}
        target = as_target(flags["target"], **values)
        if flags["no_mask"] and flags["mask"] is not None:
            raise InvalidInput("--mask, --no-mask: one names a mask, the other ignores it; leave one of them out")
        options, mask = _options(flags).checked(), False if flags["no_mask"] else flags["mask"]
        own = ("weights", "calibration", "key", "samples", "max_ratio", "holdout", "labels_key")
        read = read_source(flags["model"], **{name: flags[name] for name in own}, mask=mask)
        # After the model, whose module may hold a method of its own.
        method = make_pruner(flags["method"], target, _named("--method-option", flags["method_option"]))[1]
        for notice in read.notices:
            _log.info("%s", notice)
        needed = method.generalises or method.needs_labels  # else they only balance the samples
        labels = read.labels if needed else None
        data = None if read.inputs is None else Data(read.inputs, mask=mask, holdout=read.holdout, labels=labels)
        labelled = [flags[name] for name in ("data", "data_key", "label_key", "max_ratio")]
        arguments = {"data": data, "target": target, "method": method, "options": options}
        return cls(read, arguments, labelled_samples(read, *labelled) if flags["data"] else None)

    def finished(self, out: Path, notes: list[str]) -> tuple[Report, Json] | None:
        """The results of this very run if the folder holds them all, verified, else None; ``notes`` says why.

        Raises:
            OtherRun: It holds those of another run.
        """
        if not all((out / name).exists() for name in ("run.json", _FILES["model"], _FILES["report"])):
            return None
        model, given = self.read.model, self.arguments
        request = Request.of(model, **given, mode=recorded_mode(out), jobs=1)
        described = Journal.existing(out)[1]
        check_same(out, described, {**described, "recipe": request.recipe()})
        found = None
        try:
            results = read_results(out)
            if results.report.provenance["stopped"] is not None:
                return None
            found = verify(model, given["data"], out, method=request.pruner, options=request.options)
        except DamagedFile as error:
            _log.info("%s", error)
        if found is None or found.results:
            notes.append(f"the results in {out} are not as they were written: written again from its layers")
            return None
        if not (found.complete and all(row.ok for row in found.layers)):
            return None  # the run that goes on says what is wrong
        if self.labelled is None:
            return results.report, results.data
        pruned = copy.deepcopy(model)
        load_weights_into_(pruned, out / _FILES["model"], resize=True)
        return results.report, {**results.data, "accuracy": self.accuracies(before=model, after=pruned)}

    def run(self, out: Path, notes: list[str], **call: Any) -> tuple[Report, Json]:
        """``prune_`` with the folder as run directory, and its results written: the report, and what report.json is."""
        model, dense = self.read.model, copy.deepcopy(self.read.model)
        measured = self.accuracies(before=dense)  # a forward may leave marks on the model, which is to be fingerprinted
        report = prune_(model, **self.arguments, run=out, **call)
        report = replace(report, notices=(*self.read.notices, *report.notices))
        measured |= self.accuracies(after=model)
        save_weights(model, out / _FILES["model"])
        if report.provenance["stopped"] is None:
            try:
                save_extras(out, dense, model, self.read.batch, report)
            except (ConvexPruneError, RuntimeError) as error:  # the results count for more
                notes.append(f"what sparsity buys could not be measured: {error}")
        written = sealed(out, report.to_dict() | {"accuracy": measured})  # last: it vouches for all else
        save_json(written, out / _FILES["report"])
        return report, written

    def accuracies(self, **models: nn.Module) -> dict[str, float]:
        """By name; empty where no labelled samples were given."""
        return {} if self.labelled is None else {name: accuracy(m, *self.labelled) for name, m in models.items()}


def _checked(out: Path | None, dry_run: bool) -> Path | None:
    if out is None:
        if not dry_run:
            raise InvalidInput("--out: expected a folder to write to, found none")
        return None
    check_folder(out)
    existing = [str(out / _FILES[name]) for name in ("model", "report") if (out / _FILES[name]).exists()]
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


def _exit_status(report: Report, interrupted: bool) -> int:
    """One of its own where something is open."""
    if report.provenance["stopped"] is not None:
        return INTERRUPTED if interrupted else TIME_LIMIT
    if not report.certified:
        return UNCERTIFIED
    return 0 if report.pruned else NOTHING_PRUNED


def _show(report: Report, accuracies: Json, outcome: Json, notes: Iterable[str], out: Path) -> None:
    stopped = report.provenance["stopped"]
    if report.layers or stopped is None:
        console.print(report.table(console.width))
    if accuracies:
        console.print("accuracy {before:.2%} before, {after:.2%} after".format(**accuracies), highlight=False)
    names = {"model": "pruned model", "extras": "what sparsity buys"}
    for what, path in outcome["files"].items():
        say(console, f"{names.get(what, what)}: {path}")
    for note in notes:
        say(errors, note)
    if outcome["status"] == "finished before":
        say(console, f"{out} holds this very run, finished. Nothing to do")
    if stopped is not None:
        early = [row.name for row in report.layers if row.status in ("stopped", "time limit")]
        left = [module.name for module in report.skipped if module.reason.startswith("not reached")]
        lines = [f"not finished: {stopped}"]
        lines += [f"ended early, with the best weights so far: {', '.join(early)}"] if early else []
        lines += [f"not reached, and as trained: {', '.join(left)}"] if left else []
        say(errors, f"{'; '.join(lines)}. The same command goes on from here")
    elif outcome["exit_status"] == UNCERTIFIED:
        errors.print("[red]not every certificate or guarantee holds[/red]: see the status column")
