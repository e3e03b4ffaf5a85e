"""``prune_``: a model pruned in place, by whatever method, with a report of what was done and what is proven."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from convexprune.errors import NothingToPrune
from convexprune.files.texts import visible
from convexprune.files.weights import StrPath
from convexprune.network.calibration import Calibration
from convexprune.network.choosing import choose_layers
from convexprune.network.forwards import Forward, check_module, restoring, uncompiled
from convexprune.network.links import Link
from convexprune.network.passes import network_outputs
from convexprune.options import Options
from convexprune.pruners.pruner import Pruner, make_pruner
from convexprune.pruners.sizes import without_idle
from convexprune.report.report import LayerReport, Promise, Report, SkippedModule, emptied_layers, reported_once
from convexprune.runs.data import Data, as_data, called_on
from convexprune.runs.executors import several, solver_for
from convexprune.runs.fits import layer_fit
from convexprune.runs.journal import Journal, described_run
from convexprune.runs.outcome import NetworkPromise, amplified, network_errors, network_promise, same_outputs
from convexprune.runs.plan import Plan, first_names, make_plan
from convexprune.runs.problem import StoppingRule
from convexprune.runs.removal import chosen_links, reachable, removal_rows, shrink_, weight_sizes
from convexprune.runs.run import LayerCallback, Progress, Run, check_callers, silent
from convexprune.solvers.errors import InvalidInput, SolverRefused
from convexprune.solvers.methods.solve import environment
from convexprune.targets import Eps, NetworkEps, Sparsity, Target, as_target

_log = logging.getLogger(__name__)


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
        stop: Asked between iterations; a true answer ends the run as ``Options.time_limit`` does.

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
    check_callers(run, progress=progress, callback=callback)
    if callback is not None and several(jobs):
        raise InvalidInput("callback: what other processes do is not seen here; leave it out, or give jobs=1")
    request = Request.of(model, data, as_target(target, eps, sparsity), method, options, recorded_mode(run), jobs)
    solver, watch = solver_for(jobs), StoppingRule(request.options.time_limit, stop)
    described = None if run is None else request.described()
    prepared = request.prepared(partial(show, "capture"))
    with ExitStack() as stack:
        journal = None
        if described is not None and run is not None:
            journal = stack.enter_context(Journal(run, described | {"recipe": prepared.recipe()}))
        work = prepared.run(journal=journal, watch=watch, solver=solver, progress=show, callback=callback)
        rows, outcome = _pruned(work, prepared)
        report = _report(work, prepared, rows, outcome, _side_by_side(request, options, jobs))
    return replace(report, seconds=time.perf_counter() - began)


@dataclass(frozen=True, eq=False)
class Request:
    """What is wanted, checked, before the model is looked at.

    Attributes:
        model: The network, uncompiled.
        data: How the data are read; None without any.
        calibration, holdout: The data.
        target, method, pruner, options: As in ``prune_``.
    """

    model: nn.Module
    data: Data | None
    calibration: Calibration | None
    holdout: Calibration | None
    target: Target
    method: str
    pruner: Pruner
    options: Options

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
        """Checked.

        ``mode`` is that of the run that goes on, or None; all else is as in ``prune_``.

        Raises:
            As ``prune_``, of what it is given.
        """
        chosen = (options or Options()).checked()
        for pattern, fit in (chosen.fit if isinstance(chosen.fit, Mapping) else {"": chosen.fit}).items():
            if fit is not None:
                layer_fit(fit, f"fit of {pattern}" if pattern else "fit")
        name, pruner = make_pruner(method, target)
        if chosen.mode is None:
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
            raise InvalidInput(f"data: method {name!r} fits layers to what they compute: give calibration data")
        if pruner.norms is not None:
            chosen = replace(chosen, norms=pruner.norms)
        calibration = None if how is None else how.calibration()
        holdout = None if how is None else how.held_out()
        return cls(uncompiled(check_module(model)), how, calibration, holdout, target, name, pruner, chosen)

    def recipe(self) -> dict[str, object]:
        """What decides the results, as plain data."""
        own = {"target": self.target.to_dict(), "method": self.method, "method_options": self.pruner.to_dict()}
        return own | self.options.to_dict() | ({} if self.data is None else self.data.to_dict())

    def described(self) -> dict[str, object]:
        """What a run directory says of it: fingerprints of the model and the data, and the recipe."""
        return described_run(self.model, self.calibration, self.recipe(), self.holdout)

    def prepared(self, progress: Callable[[int, int], None]) -> "Prepared":
        """With what one pass over the data finds out.

        Args:
            progress: Called as ``progress(done, total)``.

        Raises:
            As ``prune_``, of the model and the data.
        """
        forward, fittings = None if self.data is None else self.data.forward, tuple[str, ...]()
        if self.data is not None and self.calibration is not None:
            forward, fittings = called_on(self.model, self.data, self.calibration)
        options, target = first_names(self.model, self.options, self.target)
        make = partial(
            make_plan, self.model, self.calibration, options, target, forward, progress, default_fit=self.pruner.fit
        )
        links, left_alone, skipped = dict[str, Link](), dict[str, str](), tuple[SkippedModule, ...]()
        if self.pruner.by_neurons(target):
            links, left = chosen_links(self.model, options.patterns, residual=self.pruner.residual)
            looked_at = "producers" if self.pruner.needs_samples else "consumers"
            plan = make(names=_ends(links, looked_at, "consumers"))
            links, unreached = reachable(links, plan.layers)
            plan, skipped = plan.only(_ends(links, looked_at, "consumers")), (*left, *unreached)
        else:
            if self.pruner.whole_network and options.layers is not None:
                chosen, left_out = choose_layers(self.model, options.patterns)
                whole = choose_layers(self.model)[0]
                reasons = {module.name: module.reason for module in left_out}
                left_alone = {name: reasons[name] for name in whole if name not in chosen}
                make = partial(make, names=list(whole))
            plan = make()
            if isinstance(target, Sparsity):
                plan = without_idle(plan, target, options)
            skipped = plan.skipped
        settled = replace(self, options=replace(options, mode=plan.mode), target=target)
        return Prepared(settled, plan, links, skipped, forward, fittings, left_alone)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request with what is known of the model.

    Attributes:
        request: With the mode of the plan.
        plan: The layers.
        links: Of layers that are to lose neurons.
        skipped: Modules that hold weights and are left.
        forward, fittings: How the model is called, and what is thereby done to batches.
        left: Layers that are looked at and not pruned, with the reason.
    """

    request: Request
    plan: Plan
    links: dict[str, Link]
    skipped: tuple[SkippedModule, ...]
    forward: Forward | None
    fittings: tuple[str, ...]
    left: dict[str, str]

    def outputs(self) -> Tensor:
        """What the network computes on the data now [samples, values]."""
        batches = list(self.request.calibration or ())
        mask = None if self.request.data is None else self.request.data.mask
        return network_outputs(self.request.model, batches, self.forward, mask, self.plan.counted)

    def recipe(self) -> dict[str, object]:
        """What decides the results, with the mode."""
        return self.request.recipe()

    def run(self, **own: object) -> Run:
        """The run, before anything is solved."""
        request = self.request
        return Run(
            request.model,
            request.calibration,
            self.forward,
            self.plan,
            request.options,
            holdout=request.holdout,
            samples_needed=request.pruner.needs_samples,
            links=self.links,
            left=dict(self.left),
            **own,  # type: ignore[arg-type]
        )


def _ends(links: dict[str, Link], *kinds: str) -> list[str]:
    """The producers, or the consumers, of links."""
    return list(dict.fromkeys(name for link in links.values() for kind in kinds for name in getattr(link, kind)))


def recorded_mode(run: StrPath | None) -> str | None:
    """That of a run which goes on; None where there is none yet."""
    if run is None or not (Path(run) / "run.json").is_file():
        return None
    mode = Journal.existing(run)[1].get("recipe", {}).get("mode")
    return mode if isinstance(mode, str) else None


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What became of the network: the error of its outputs, a bound on it, and what is known of new data."""

    error: float
    promise: NetworkPromise | None
    generalisation: Promise | None


def _pruned(run: Run, prepared: Prepared) -> tuple[tuple[LayerReport, ...], _Outcome]:
    """The model pruned, or as it was if anything fails: its layers' rows, and what holds of its outputs."""
    request, target = prepared.request, prepared.request.target
    truth = None if request.data is None else request.data.truth()
    before = weight_sizes(run.model) if run.links else {}
    with restoring(run.model) if run.links else run.versions.restoring():
        original = None if truth is None else prepared.outputs()
        request.pruner.prune(run, target)
        promise = None
        if request.pruner.proves:
            allowed, guarantee = None, "measured"
            if isinstance(target, NetworkEps):
                allowed, guarantee = target.value, target.guarantee
            promise = network_promise(run, prepared.plan.size, allowed, guarantee)
        error = network_errors(run)[0] if promise is None else promise.error
        bound = None
        if truth is not None and original is not None:
            bound = request.pruner.generalisation(run, original, prepared.outputs(), truth)
        outcome = _Outcome(error, promise, bound)
        if not run.links:
            return run.rows(), outcome
        with same_outputs(run):
            shrink_(run, request.options.remove)
        return removal_rows(run, before), outcome


def _report(
    run: Run,
    prepared: Prepared,
    rows: Sequence[LayerReport],
    outcome: _Outcome,
    notices: Sequence[str],
) -> Report:
    """What is said of a run, but for the seconds."""
    if empty := emptied_layers(rows):
        _log.warning("%s", visible(empty))
    plan, request = prepared.plan, prepared.request
    left = [
        SkippedModule(name, type(plan.layers[name].module).__name__, run.left.get(name, f"not reached: {run.stopped}"))
        for name in plan.order
        if name not in run.written and (name in run.left or run.stopped is not None or not run.links)
    ]
    layers, skipped = reported_once(rows, [*prepared.skipped, *left])
    own = {**request.recipe(), "plan_tests": dict(plan.tests), "stopped": run.stopped}
    parameter = next(run.model.parameters(), None)
    if parameter is None:
        raise NothingToPrune("the model has no parameters")
    said = amplified(outcome.error, rows, request.options.mode) if outcome.promise is not None else ()
    return Report(
        layers=layers,
        skipped=skipped,
        output_error=outcome.error,
        network=outcome.promise,
        generalisation=outcome.generalisation,
        mask=plan.counted.to_dict(),
        samples=plan.samples,
        seconds=0.0,
        provenance=own | environment(parameter),
        solutions=run.solutions() if request.options.keep_solutions else {},
        notices=(*notices, *prepared.fittings, *plan.notices, *said),
    )


def _side_by_side(request: Request, options: Options | None, jobs: object) -> tuple[str, ...]:
    """What several layers at a time make of a mode that was left open, and would else be cascade."""
    chosen = options is not None and options.mode is not None
    if chosen or not several(jobs) or isinstance(request.target, Eps):
        return ()
    count = jobs if isinstance(jobs, int) else "several"
    return (
        f"parallel mode, since of {count} layers at a time none can wait for another; with jobs=1, in cascade, each "
        "makes up for those before it",
    )
