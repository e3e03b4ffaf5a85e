"""``prune_``: a model pruned in place, by whatever method, with a report of what was done and what is proven."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from convexprune.errors import NothingToPrune
from convexprune.files.texts import visible
from convexprune.files.weights import StrPath
from convexprune.network.calibration import Calibration, fitted
from convexprune.network.choosing import choose_layers
from convexprune.network.forwards import check_module, restoring, uncompiled
from convexprune.network.links import Link
from convexprune.network.passes import network_outputs
from convexprune.options import Options
from convexprune.pruners.pruner import Pruner, make_pruner
from convexprune.pruners.sizes import without_idle
from convexprune.report.report import Report, SkippedModule, emptied_layers, only_skipped
from convexprune.runs.data import Data, as_data
from convexprune.runs.executors import several, solver_for
from convexprune.runs.fingerprints import data_fingerprint, model_fingerprint
from convexprune.runs.fits import layer_fit
from convexprune.runs.journal import Journal
from convexprune.runs.outcome import amplified, network_errors, network_promise
from convexprune.runs.plan import first_names, make_plan
from convexprune.runs.problem import StoppingRule
from convexprune.runs.removal import chosen_links, finished_rows, reachable, weight_sizes
from convexprune.runs.run import LayerCallback, Progress, Run, silent
from convexprune.solvers.errors import InvalidInput, SolverRefused
from convexprune.solvers.methods.solve import environment
from convexprune.targets import Eps, Sparsity, Target, as_target

_log = logging.getLogger(__name__)
R = TypeVar("R", bound=Run)
_SIDE_BY_SIDE = (
    "parallel mode, since of {} layers at a time none can wait for another; with jobs=1, in cascade, each makes up for "
    "those before it"
)


def prune_(
    model: nn.Module,
    data: object = None,
    target: Target | str | None = None,
    *,
    method: str | Pruner | None = None,
    options: Options | None = None,
    eps: object = None,
    sparsity: object = None,
    run: StrPath | None = None,
    jobs: object = 1,
    progress: Progress | None = None,
    callback: LayerCallback | None = None,
    stop: Callable[[], bool] | None = None,
) -> Report:
    """Prune a trained model in place; if anything fails the model is as it was.

    Args:
        model: Any module; its layers that are matrix products are pruned: Linear, Conv1d, Conv2d, Conv3d, the
            Transformers library's Conv1D, and the projections of MultiheadAttention.
        data: Inputs, or ``Data``, which says how to read them, what is held out, and how to call the model. A tensor or
            array [samples, ...], or an iterable of batches, which is gone through once a layer and need not fit into
            memory. None: methods that need none go without.
        target: How far to prune: ``Eps``, ``NetworkEps``, ``Sparsity``, ``Neurons``, ``Guarantee``, or a text such as
            "sparsity 0.9 scope=network"; nothing is ``Eps(0.1)``.
        method: A pruner's name (``available_pruners``) or a pruner; None: "net-trim" for errors and neurons, "budget"
            for sparsities, "lowner" for guarantees.
        options: How to prune.
        eps: In the place of ``target``: that of ``Eps``.
        sparsity: In the place of ``target``: that of ``Sparsity``.
        run: A folder that keeps each layer as soon as it is solved. Started again with the same model, data, target,
            method and options, the run goes on where it was.
        jobs: Layers solved at the same time: a number of processes, an ``Executor`` of concurrent.futures, or a
            ``distributed.Client``. In parallel mode only.
        progress: Called as ``progress(stage, done, total)``, with the stage "capture" or a layer's name.
        callback: Called as ``callback(layer, trace_point)`` while a layer is solved in this process; a true answer
            stops it.
        stop: Called between iterations; a true answer ends the run as ``Options.time_limit`` does.

    Returns:
        The report. A layer whose certificate did not close within the limits is written all the same, and its status
        says so.

    Raises:
        NothingToPrune: No layer can be pruned, or the patterns choose none.
        UnsupportedModule: Neurons are to go, and the model cannot be traced.
        EmptyCalibration, NonFinite, ShapeMismatch: The calibration data cannot be used.
        InvalidTolerance: A target, an option or a limit out of its range.
        InvalidInput: Arguments that contradict each other, or a word that is none of those above.
        UnknownSolver, UnknownOption, SolverRefused, MissingExtra: A solver or a method is not known, or cannot do it.
        Infeasible: A layer's fit (a Net-Trim ceiling) leaves no weights, or ``NetworkEps`` cannot be met.
        PruningFailed: The solver returned nothing usable for a layer.
        OtherRun, DamagedFile: ``run`` holds another run, or was damaged.
        WorkerLost: Workers died again and again.
    """
    began, show = time.perf_counter(), progress or silent
    for name, given in (("progress", progress), ("callback", callback)):
        if given is not None and not callable(given):
            raise InvalidInput(f"{name}: expected a function, found {given!r}")
    if run is not None and not isinstance(run, str | PathLike):
        raise InvalidInput(f"run: expected the path of a folder, found {run!r}")
    if callback is not None and several(jobs):
        raise InvalidInput("callback: what other processes do is not seen here; leave it out, or give jobs=1")
    request = Request.of(model, data, as_target(target, eps, sparsity), method, options, recorded_mode(run), jobs)
    solver, watch = solver_for(jobs), StoppingRule(request.options.time_limit, stop)
    described = None if run is None else request.described()
    settled, work = request.prepared(Run, partial(show, "capture"))
    work.watch, work.solver, work.progress, work.callback = watch, solver, show, callback
    with ExitStack() as stack:
        if described is not None and run is not None:
            work.journal = stack.enter_context(Journal(run, described | {"recipe": settled.recipe()}))
        report = _pruned(work, settled)
    return replace(report, seconds=time.perf_counter() - began)


@dataclass(frozen=True, eq=False)
class Request:
    """What is wanted, checked.

    Attributes:
        model: The network, uncompiled.
        data: How the data are read; None without any.
        calibration, holdout: The data.
        target, options: As in ``prune_``; in tables a layer of several names goes by the first.
        method, pruner: The method's name, and the pruner.
        notices: What a reader should know.
    """

    model: nn.Module
    data: Data | None
    calibration: Calibration | None
    holdout: Calibration | None
    target: Target
    method: str
    pruner: Pruner
    options: Options
    notices: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: object,
        target: Target,
        method: str | Pruner | None,
        options: Options | None,
        mode: str | None,
        jobs: object,
    ) -> "Request":
        """Checked, before the model is run.

        ``mode`` is that of the run that goes on, or None; all else is as in ``prune_``.

        Raises:
            As ``prune_``, of what it is given.
        """
        chosen = (options or Options()).checked()
        for pattern, fit in (chosen.fit if isinstance(chosen.fit, Mapping) else {"": chosen.fit}).items():
            if fit is not None:
                layer_fit(fit, f"fit of {pattern}" if pattern else "fit")
        name, pruner = make_pruner(method, target)
        notices = []
        if chosen.mode is None:
            if several(jobs) and not isinstance(target, Eps):
                notices = [_SIDE_BY_SIDE.format(jobs if isinstance(jobs, int) else "several")]
            default = pruner.default_mode(target, chosen) or ("parallel" if several(jobs) else None)
            chosen = replace(chosen, mode=mode or default)
        if chosen.cascade and several(jobs):
            raise InvalidInput(
                f"jobs: expected 1 in cascade, where each layer waits for the one before, found {jobs!r}"
            )
        if reason := pruner.refuses(target, chosen):
            raise SolverRefused(f"method {name!r} refuses: {reason}")
        how = as_data(data)
        if how is None and pruner.needs_data:
            what, more = ("a loss", " with labels") if pruner.needs_labels else ("what layers compute", "")
            raise InvalidInput(f"data: method {name!r} looks at {what}: give calibration data{more}")
        if how is not None and pruner.needs_labels:
            next(how.labelled())
        elif how is not None and how.labels is not None and not pruner.generalises:
            raise InvalidInput(f"labels: method {name!r} looks at no loss and has no bound on errors; leave them out")
        if pruner.norms is not None:
            chosen = replace(chosen, norms=pruner.norms)
        calibration = None if how is None else how.calibration()
        holdout = None if how is None else how.held_out()
        own = uncompiled(check_module(model))
        chosen, target = first_names(own, chosen, target)
        return cls(own, how, calibration, holdout, target, name, pruner, chosen, tuple(notices))

    def recipe(self) -> dict[str, object]:
        """What decides the results, as plain data."""
        own = {"target": self.target.to_dict(), "method": self.method, "method_options": self.pruner.to_dict()}
        return own | self.options.to_dict() | ({} if self.data is None else self.data.to_dict())

    def described(self) -> dict[str, object]:
        """What a run directory says of it: fingerprints of the model and the data, and the recipe."""
        own: dict[str, object] = {"model": model_fingerprint(self.model), "data": None, "recipe": self.recipe()}
        if self.calibration is not None and self.data is not None:
            labelled = self.data.labelled() if self.pruner.needs_labels else ()
            own["data"] = data_fingerprint(chain(self.calibration.content(), (labels for _, labels in labelled)))
        return own if self.holdout is None else own | {"holdout": data_fingerprint(self.holdout.content())}

    def prepared(self, kind: type[R], progress: Callable[[int, int], None]) -> "tuple[Request, R]":
        """This with the mode that suits the model, and the run, with what one pass over the data finds out.

        Args:
            kind: ``Run``, or what derives from it.
            progress: Called as ``progress(done, total)``.

        Raises:
            As ``prune_``, of the model and the data.
        """
        forward, fittings = None if self.data is None else self.data.forward, tuple[str, ...]()
        if self.calibration is not None:
            forward, fittings = fitted(self.model, self.calibration, forward)
        make = partial(make_plan, self.model, self.calibration, self.options, self.target, forward, progress)
        make = partial(make, default_fit=self.pruner.fit)
        links, left = dict[str, Link](), dict[str, str]()
        if self.pruner.by_neurons(self.target):
            links, unlinked = chosen_links(self.model, self.options.layers, residual=self.pruner.residual)
            ends = ("producers" if self.pruner.needs_samples else "consumers", "consumers")
            plan = make(names=_ends(links, *ends))
            links, unreached = reachable(links, plan.layers)
            plan = replace(plan.only(_ends(links, *ends)), skipped=(*unlinked, *unreached))
        elif self.pruner.whole_network and self.options.layers is not None:
            left_out = choose_layers(self.model, self.options.layers)[1]
            whole = choose_layers(self.model)[0]
            left = {module.name: module.reason for module in left_out if module.name in whole}
            plan = make(names=list(whole))
        else:
            plan = make()
        if not links and isinstance(self.target, Sparsity):
            plan = without_idle(plan, self.target, self.options)
        settled = replace(self, options=replace(self.options, mode=plan.mode))
        plan = replace(plan, notices=(*self.notices, *fittings, *plan.notices))
        samples_needed = self.pruner.needs_samples
        run = kind(self.model, self.calibration, forward, plan, settled.options, samples_needed=samples_needed)
        run.holdout, run.source, run.links, run.left = self.holdout, self.data, links, left
        return settled, run


def _ends(links: Mapping[str, Link], *kinds: str) -> list[str]:
    """The producers, or the consumers, of links."""
    return list(dict.fromkeys(name for link in links.values() for kind in kinds for name in getattr(link, kind)))


def recorded_mode(run: StrPath | None) -> str | None:
    """That of a run which goes on; None where there is none yet."""
    if run is None or not (Path(run) / "run.json").is_file():
        return None
    mode = Journal.existing(run)[1]["recipe"].get("mode")
    return mode if isinstance(mode, str) else None


def _pruned(run: Run, request: Request) -> Report:
    """The model pruned, or as it was if anything fails; and what is said of it, but for the seconds."""
    plan, pruner = run.plan, request.pruner
    truth = request.data.truth() if request.data is not None and pruner.generalises else None
    before = weight_sizes(run.model) if run.links else {}
    parameter = next(run.model.parameters(), None)
    if parameter is None:
        raise NothingToPrune("the model has no parameters")
    with restoring(run.model) if run.links else run.versions.restoring():
        original = None if truth is None else _outputs(run)
        pruner.prune(run, request.target)
        promise = network_promise(run, request.target) if pruner.proves else None
        error = network_errors(run)[0] if promise is None else promise.error
        bound = None
        if truth is not None and original is not None:
            bound = pruner.generalisation(run, original, _outputs(run), truth)
        rows = finished_rows(run, before, request.options.remove)
    if empty := emptied_layers(rows):
        _log.warning("%s", visible(empty))
    left = [
        SkippedModule.of(name, plan.layers[name].module, run.left.get(name, f"not reached: {run.stopped}"))
        for name in plan.order
        if name not in run.written and (name in run.left or run.stopped is not None or not run.links)
    ]
    notes, skipped = only_skipped({row.name for row in rows}, [*plan.skipped, *left])
    own = {**request.recipe(), "plan_tests": dict(plan.tests), "stopped": run.stopped}
    return Report(
        layers=tuple(replace(row, notes=(*row.notes, *notes.get(row.name, ()))) for row in rows),
        skipped=skipped,
        output_error=error,
        network=promise,
        generalisation=bound,
        mask=plan.counted.to_dict(),
        samples=plan.samples,
        seconds=0.0,
        provenance=own | environment(parameter),
        solutions=run.solutions() if request.options.keep_solutions else {},
        notices=(
            *plan.notices,
            *run.notices,
            *(() if promise is None else amplified(error, rows, request.options.mode)),
        ),
    )


def _outputs(run: Run) -> Tensor:
    """What the network computes on the calibration data now [samples, values]."""
    mask = None if run.data is None else run.data.mask
    return network_outputs(run.model, list(run.data or ()), run.forward, mask, run.plan.counted)
