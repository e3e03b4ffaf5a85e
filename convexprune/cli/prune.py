"""``convexprune prune``: from options to a folder with results, and what the terminal is told."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from convexprune.cli.job import Job
from convexprune.cli.live import (
    INTERRUPTED,
    NOTHING_PRUNED,
    TIME_LIMIT,
    UNCERTIFIED,
    bars,
    console,
    deaf,
    errors,
    interruptible,
    print_json,
    say,
)
from convexprune.cli.parsing import parsed_options, parsed_size, parsed_sparsity, parsed_table
from convexprune.cli.source import Labelled, Source
from convexprune.coresets.methods import make_method
from convexprune.report.report import Report
from convexprune.runs.preview import Preview
from convexprune.solvers.errors import InvalidInput


def net_trim(given: dict[str, Any]) -> int:
    """With the options of ``convexprune prune`` by name; the exit status."""
    if not given["remove"] and given["unit"] != "neurons":
        raise InvalidInput("--no-remove: it goes with --unit neurons; leave it out")
    if given["scheduler"] is not None and given["jobs"] == 1:
        raise InvalidInput("--jobs: expected at least 2 with --scheduler, for one at a time is solved here; found 1")
    arguments = _arguments(given)
    job = Job(_source(given), given["out"], resumes=True, labelled=_labelled(given))
    if given["dry_run"]:
        _show_plan(job.plan(**arguments, jobs=_jobs(given)), given["as_json"])
        return 0
    if (told := job.finished(**arguments)) is not None:
        return _nothing_to_do(job, told, given["as_json"])
    with _workers(given) as jobs, interruptible(partial(_say_stopping, jobs == 1)) as interrupt, bars(errors) as shown:
        callback = shown.callback if jobs == 1 else None  # what workers do is not seen here
        report = job.net_trim(**arguments, jobs=jobs, stop=interrupt, progress=shown.progress, callback=callback)
    return _finish(job, report, given, interrupted=interrupt.asked)


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Those of ``prune_`` that go by the same names here, and those that are read from texts."""
    eps, sparsity = given["eps"], given["sparsity"]
    texts = {
        "eps": parsed_table("--eps", eps) if eps else None,
        "sparsity": parsed_sparsity(sparsity) if sparsity else None,
    }
    return {name: given[name] for name in _SAME} | texts | {"mask": _mask(given)}


_SAME = (
    *("network_eps", "guarantee", "objective", "scope", "search", "unit", "remove", "mode", "fit", "norms"),
    *("gamma", "refit", "keep_zeros", "seed", "solver", "layers", "tol", "feas_tol", "max_iter"),
    *("layer_time_limit", "time_limit"),
)


def coreset(given: dict[str, Any]) -> int:
    """With the options of ``convexprune prune`` by name; the exit status."""
    _, pruner = make_method(given["method"], parsed_options(given["option"] or []))
    size = parsed_size(given["keep"], given["eps"], given["delta"])
    job = Job(_source(given), given["out"], labels_key=given["labels_key"], labelled=_labelled(given))
    recipe = {name: given[name] for name in ("layers", "scope", "order", "remove", "baseline", "seed")}
    recipe["mask"] = _mask(given)
    with bars(errors) as shown:
        report = job.coreset(pruner, size, progress=shown.progress, **recipe)
    return _finish(job, report, given)


def _source(given: dict[str, Any]) -> Source:
    names = ("model", "weights", "calibration", "key", "samples", "max_ratio", "holdout")
    return Source(**{name: given[name] for name in names}, mask=_mask(given))


def _mask(given: dict[str, Any]) -> str | bool | None:
    """The array that says which positions count; False for none, None for the one of the usual name."""
    if given["no_mask"] and given["mask"] is not None:
        raise InvalidInput("--mask, --no-mask: one names a mask, the other ignores it; leave one of them out")
    mask: str | None = given["mask"]
    return False if given["no_mask"] else mask


def _labelled(given: dict[str, Any]) -> Labelled | None:
    if given["data"] is None:
        return None
    return Labelled(*(given[name] for name in ("data", "data_key", "label_key", "max_ratio")))


def _jobs(given: dict[str, Any], workers: int = 1) -> int:
    """How many layers at a time; on a cluster as many as it has workers, unless told otherwise."""
    least = 1 if given["scheduler"] is None else 2  # one at a time would be solved here
    jobs: int = given["jobs"] or max(least, workers)
    return jobs


@contextmanager
def _workers(given: dict[str, Any]) -> Iterator[int]:
    """Whoever solves layers, ready; how many at a time."""
    if given["scheduler"] is None:
        jobs = _jobs(given)
        if jobs > 1:
            with deaf():
                _start(jobs)
        yield jobs
        return
    from convexprune.nettrim.pool import cluster

    with cluster(given["scheduler"]) as workers:
        yield _jobs(given, workers)


def _start(jobs: int) -> None:
    """joblib's workers, which then stay."""
    from joblib import Parallel, delayed

    Parallel(n_jobs=jobs)(delayed(int)() for _ in range(jobs))


def _say_stopping(alone: bool) -> None:
    rest = "" if alone else "; layers that workers are solving are waited for"
    errors.print(
        f"stopping in order{rest}. Press Ctrl-C again to abort at once: what is solved is kept", soft_wrap=True
    )


def _show_plan(plan: Preview, as_json: bool) -> None:
    if as_json:
        print_json({"status": "planned", "exit_status": 0, "plan": plan.to_dict()})
    else:
        console.print(plan.table(console.width))


def _nothing_to_do(job: Job, told: dict[str, Any], as_json: bool) -> int:
    assert job.out is not None  # noqa: S101 - a report was found there
    status = _status(certified=told["certified"], pruned=told["pruned"])
    if as_json:
        print_json({"status": "finished before", "exit_status": status, "files": _files(job.out), "report": told})
        return status
    kept = f"{told['nonzeros']:,} of {told['nonzeros_before']:,} weights kept"
    say(console, f"{job.out} holds this very run, finished: {kept}. Nothing to do")
    for line in told.get("head", ()):
        say(console, line)
    _show_accuracy(job)
    return status


def _files(out: Path) -> dict[str, str]:
    names = {"model": "model.safetensors", "report": "report.json", "extras": "extras.json"}
    return {what: str(out / name) for what, name in names.items() if (out / name).exists()}


def _finish(job: Job, report: Report, given: dict[str, Any], *, interrupted: bool = False) -> int:
    """Write and show; an exit status of its own where something is open."""
    own = {"removed": given["remove"]} if given["method"] == "net-trim" else {}
    files = job.write(report, **own)
    stopped = report.provenance.get("stopped")
    status = _status(certified=report.certified, pruned=report.pruned)
    if stopped is not None:
        status = INTERRUPTED if interrupted else TIME_LIMIT
    if given["as_json"]:
        told: dict[str, Any] = {"status": "finished" if stopped is None else "stopped", "exit_status": status}
        told |= {"files": files, "notes": job.notes, "report": job.told}
        print_json(told)
        return status
    _show_report(job, report, files)
    if stopped is not None:
        say(errors, _unfinished(report, stopped))
    elif status == UNCERTIFIED:
        errors.print("[red]not every certificate or guarantee holds[/red]: see the status column")
    return status


def _status(*, certified: bool, pruned: bool) -> int:
    """The exit status of a run that came to its end."""
    return (0 if pruned else NOTHING_PRUNED) if certified else UNCERTIFIED


def _show_report(job: Job, report: Report, files: dict[str, Path]) -> None:
    if report.layers or report.provenance.get("stopped") is None:
        console.print(report.table(console.width))
    _show_accuracy(job)
    names = {"model": "pruned model", "extras": "what sparsity buys"}
    for what, path in files.items():
        say(console, f"{names.get(what, what)}: {path}")
    for note in job.notes:
        say(errors, note)


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
