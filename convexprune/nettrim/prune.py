"""Net-Trim over a model: layers to programs, programs to sparse weights (Aghasi et al. 2017, 2020).

Parallel mode: every layer's program is built from the original network's inputs to it, so layers are independent.
Cascade: from what the network pruned so far computes, with the original network's outputs as targets.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from convexprune.files.texts import visible
from convexprune.files.weights import StrPath
from convexprune.nettrim.outcome import NetworkPromise, amplified, network_promise, same_outputs
from convexprune.nettrim.planning import Plan
from convexprune.nettrim.recipe import Recipe, recipe_of_call
from convexprune.nettrim.request import planned
from convexprune.nettrim.rows import layer_row
from convexprune.nettrim.run import Run
from convexprune.nettrim.stopping import Stop
from convexprune.nettrim.structured import NeuronSparsity
from convexprune.nettrim.targets import Target
from convexprune.nettrim.tasks import executor, mode_for
from convexprune.network.calibration import Calibration
from convexprune.network.choosing import check_module
from convexprune.network.compiled import uncompiled
from convexprune.network.fitting import fitted
from convexprune.network.forwards import Forward
from convexprune.network.padding import Mask
from convexprune.network.shrink import restoring
from convexprune.progress import silent
from convexprune.report.report import LayerReport, Report, SkippedModule, emptied_layers, reported_once
from convexprune.runs.journal import Journal, described_run
from convexprune.solvers.certificate.solution import TracePoint
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.methods.interface import Solver
from convexprune.solvers.methods.solve import environment

_log = logging.getLogger(__name__)


def prune_(
    model: nn.Module,
    calibration: Any,
    eps: float | Sequence[float] | Mapping[str, float] | None = None,
    *,
    sparsity: float | str | Mapping[str, float | str] | None = None,
    network_eps: float | None = None,
    guarantee: str = "measured",
    mode: str | None = None,
    objective: str = "l1",
    scope: str = "layer",
    search: str = "budget",
    unit: str = "weights",
    remove: bool = True,
    refit: bool = False,
    keep_zeros: bool = False,
    fit: str | Mapping[str, str] | None = None,
    norms: str = "fold",
    solver: str | Solver | None = None,
    layers: str | Iterable[str] | None = None,
    activations: Mapping[str, str] | None = None,
    ceiling: float = 0.0,
    gamma: float = 1.1,
    penalise_bias: bool = False,
    tol: float = 1e-3,
    feas_tol: float = 1e-4,
    max_iter: int | None = None,
    layer_time_limit: float | None = None,
    time_limit: float | None = None,
    batch_size: int = 256,
    mask: Mask = None,
    seed: int = 0,
    holdout: Any = None,
    forward: Forward | None = None,
    run: StrPath | None = None,
    jobs: int = 1,
    keep_solutions: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    callback: Callable[[str, TracePoint], bool | None] | None = None,
    stop: Callable[[], bool] | None = None,
    **options: Any,
) -> Report:
    """Prune a trained model in place; if anything fails the model is as it was.

    What is asked for is one of ``eps`` (0.1 if nothing is), ``network_eps`` and ``sparsity``.

    Args:
        model: Any module; its layers that are matrix products are pruned: Linear, Conv1d, Conv2d, Conv3d, the
            Transformers library's Conv1D, and the projections of MultiheadAttention.
        calibration: Inputs: a tensor or array [samples, ...], or an iterable of batches (tensor, tuple of positional
            arguments, or mapping of keyword arguments), which is gone through once a layer and need not fit into
            memory.
        eps: Allowed output error of each layer relative to ‖Y‖_F: a number, one a layer in the model's order, or a
            mapping from layer names or patterns (an exact name counts first, then the first pattern that matches).
        sparsity: The part of each layer's weights to be zero, 0 to leave it as trained; or "2:4" for at most 2 of 4
            consecutive inputs, where a layer whose inputs are no multiple of 4 is left, and said, unless it was named;
            or a mapping as for ``eps`` to either: {"stem": 0.0, "*": "2:4"}. Not convex: what comes back is good, and
            no bound is claimed. Of each group of a convolution at least one weight stays.
        network_eps: Allowed error of the network's outputs on the calibration data, relative to their norm: eps is
            allocated to layers so that what ``guarantee`` says is within it.
        guarantee: With ``network_eps``, what is within it: "measured": the error that the pruned network has on the
            calibration data, and on ``holdout``. "bound": a bound on it that follows from the layers' errors and norms,
            with which hardly anything can be pruned in deep networks.
        mode: "parallel": every layer from the original network's inputs. "cascade": from those of the network pruned so
            far, layer after layer. None: "parallel" with ``eps``, which is then kept as it was asked for; else
            "cascade", but "parallel" with ``jobs`` > 1, or where a layer is called more than once in a forward, and the
            report says so. A run that goes on keeps the mode that it began with.
        objective: With ``network_eps``: "l1" gives all layers the same relative eps, "nonzeros" minimises the total
            of nonzeros over the layers' measured paths.
        scope: With ``sparsity``: "layer": of each layer. "network": of all layers together, in a mapping of those of
            the same number, split by their measured paths.
        search: With ``sparsity``: "budget" looks for the best support of the size itself, "path" takes that of the ℓ1
            program at the least eps that leaves so many; either is followed by a refit.
        unit: With ``sparsity``: "weights", or "neurons": whole neurons and channels, those that vanish first along the
            path of the layers that take their outputs; these are then fitted again. ``layers`` are those that lose
            neurons. The model must be traceable by torch.fx.
        remove: Whether such neurons are really removed, with all that belongs to them, through residual additions as
            well; otherwise they are zeros, and shapes stay.
        refit: With ``eps``: fit the weights again on the support that was found: a smaller error at as many nonzeros,
            and a larger ℓ1 norm.
        keep_zeros: Weights that are zero stay zero, as in a model that was pruned before: every program is restricted
            to the others, and so is what is certified. Without it some may come back; the report says how many.
        fit: None: "relu-ball" where only ReLU follows, "ball" elsewhere; or a fit's name, or a mapping from patterns.
        norms: "fold": a BatchNorm that alone follows a layer is part of the layer's program, so that errors count
            behind it; its shift takes the program's bias. "leave": errors count before it.
        solver: As in ``solve``; None: "quadratic" for fits that see products of the data alone, "continuation" for
            budgets, else "admm".
        layers: Patterns ("features.*", "fc?") of qualified names, and of those to leave out ("!stem"); None: every
            layer that can be pruned.
        activations: What follows a layer, by name pattern, where watching the model is not enough: {"fc1": "relu"}.
        ceiling: As in ``layer_program``; in cascade the least ceiling.
        gamma: In cascade: the squared radius is at least gamma ≥ 1 times what the trained weights miss on the pruned
            network's inputs, so that they are feasible.
        penalise_bias: As in ``layer_program``.
        tol: As in ``solve``, for each layer (each group of a convolution); likewise the next two.
        feas_tol: As in ``solve``.
        max_iter: As in ``solve``.
        layer_time_limit: Seconds for a layer at most.
        time_limit: Seconds for everything: the layer that is being solved then ends with the best feasible weights so
            far, the others stay as they are, and the report says so.
        batch_size: Samples at a time where ``calibration`` is one tensor.
        mask: Which positions of a batch count, where some are padding: the key of batches that are mappings, or a
            function of the batch; either gives 1 where a position counts and 0 where not, [samples, positions]. What
            is hidden is left out of programs, errors and bounds. None: "attention_mask", a decoder's, and torch's own
            "src_key_padding_mask" and the like, where batches have them; False: all positions count.
        seed: Of the random choice of rows that paths are measured on, ≥ 0.
        holdout: Inputs, as ``calibration``, that nothing is fitted to. The network's error on them is reported, and
            kept within ``network_eps`` where that is measured.
        forward: Called as ``forward(model, batch)`` in place of ``model(batch)``.
        run: A folder that keeps each layer as soon as it is solved. Started again with the same model, data and recipe,
            the run goes on where it was.
        jobs: Layers solved at the same time, in processes of their own, through joblib: inside
            ``joblib.parallel_config("dask")`` on a cluster. In parallel mode only.
        keep_solutions: Keep each layer's solutions, multipliers included, in the report.
        progress: Called as ``progress(stage, done, total)``, with the stage "capture" or a layer's name.
        callback: Called as ``callback(layer, trace_point)`` while a layer is solved; a true answer stops it. With
            ``jobs`` > 1 it is refused.
        stop: Asked between iterations; a true answer ends the run as ``time_limit`` does.
        **options: The solver's own.

    Returns:
        The report. A layer whose certificate did not close within the limits is written all the same, and its status
        says so.

    Raises:
        NothingToPrune: No layer can be pruned, or the patterns choose none.
        EmptyCalibration, NonFinite, ShapeMismatch: The calibration data cannot be used.
        InvalidTolerance: An eps, a sparsity or a limit out of its range.
        InvalidInput: Arguments that contradict each other, or a word that is none of those above.
        UnknownSolver, UnknownOption, SolverRefused, MissingExtra: As in ``solve``.
        Infeasible: A layer's fit (a Net-Trim ceiling) leaves no weights, or ``network_eps`` cannot be met.
        PruningFailed: The solver returned nothing usable for a layer.
        OtherRun, DamagedFile: ``run`` holds another run, or was damaged.
        WorkerLost: Workers died again and again.
    """
    given, began, tell = dict(locals()), time.perf_counter(), progress or silent
    _check_callers(run, jobs, forward=forward, progress=progress, callback=callback)
    recipe = recipe_of_call({**given, "mode": mode_for(_recorded_mode(run) if mode is None else mode, jobs)})
    own: dict[str, Any] = {"execute": executor(jobs, recipe.mode == "cascade"), "stop": Stop(time_limit, stop)}
    own |= {"tell": tell, "callback": callback, "multipliers": keep_solutions}
    model, data = uncompiled(model), Calibration(calibration, batch_size, mask)
    held_out = None if holdout is None else Calibration(holdout, batch_size, mask)
    forward, fittings = fitted(check_module(model), data, forward)
    described = None if run is None else described_run(model, data, recipe.to_dict(), held_out)
    plan, target, skipped = planned(model, data, recipe, forward, partial(tell, "capture"))
    recipe = replace(recipe, mode=plan.mode)
    with ExitStack() as stack:
        if described is not None and run is not None:
            own["journal"] = stack.enter_context(Journal(run, described | {"recipe": recipe.to_dict()}))
        work = Run.planned(model, data, forward, plan, recipe.how(), holdout=held_out, **own)
        rows, promise = _pursued(work, plan, target, recipe, remove)
    noticed = (*_side_by_side(mode, jobs, eps=recipe.eps is not None), *fittings)
    return replace(_report(work, plan, recipe, rows, skipped, promise, noticed), seconds=time.perf_counter() - began)


def _report(
    run: Run,
    plan: Plan,
    recipe: Recipe,
    rows: Sequence[LayerReport],
    skipped: Sequence[SkippedModule],
    promise: NetworkPromise,
    noticed: Sequence[str],
) -> Report:
    """What is told of a run, but for the seconds."""
    if empty := emptied_layers(rows):
        _log.warning("%s", visible(empty))
    layers_told, skipped_told = reported_once(rows, [*skipped, *_not_reached(run, plan)])
    own = {**recipe.to_dict(), "plan_tests": dict(plan.tests), "stopped": run.stopped}
    return Report(
        layers=layers_told,
        skipped=skipped_told,
        output_error=promise.error,
        network=promise,
        mask=plan.counted.to_dict(),
        samples=plan.samples,
        seconds=0.0,
        provenance=own | environment(next(run.model.parameters())),
        solutions=run.solutions() if run.multipliers else {},
        notices=(*noticed, *plan.notices, *amplified(promise.error, rows, recipe.mode)),
    )


def _recorded_mode(run: StrPath | None) -> str | None:
    """That of a run which goes on; None where there is none yet."""
    if run is None or not (Path(run) / "run.json").is_file():
        return None
    recorded: str | None = Journal.existing(run)[1].get("recipe", {}).get("mode")
    return recorded


def _side_by_side(mode: str | None, jobs: int, *, eps: bool) -> tuple[str, ...]:
    """What several layers at a time make of a mode that was left open, and would else be cascade."""
    if mode is not None or jobs == 1 or eps:
        return ()
    return (
        f"parallel mode, since of {jobs} layers at a time none can wait for another; with jobs=1, in cascade, each "
        "makes up for those before it",
    )


def _check_callers(run: object, jobs: int, **functions: object) -> None:
    for name, given in functions.items():
        if given is not None and not callable(given):
            raise InvalidInput(f"{name}: expected a function, found {given!r}")
    if run is not None and not isinstance(run, str | os.PathLike):
        raise InvalidInput(f"run: expected the path of a folder, found {run!r}")
    if jobs > 1 and functions["callback"] is not None:
        raise InvalidInput("callback: what other processes do is not seen here; leave it out, or give jobs=1")


def _pursued(
    run: Run, plan: Plan, target: Target, recipe: Recipe, remove: bool
) -> tuple[tuple[LayerReport, ...], NetworkPromise]:
    """The model pruned, or as it was if anything fails: its layers' rows, and what holds of its outputs."""
    neurons = target if isinstance(target, NeuronSparsity) else None
    with run.versions.restoring() if neurons is None else restoring(run.model):
        goals = target.pursue(run)
        promise = network_promise(run, plan.size, recipe.network_eps, recipe.guarantee)
        if neurons is None:
            done = [name for name in plan.order if name in goals]
            return tuple(layer_row(plan.sites[name], goals[name], run.written[name]) for name in done), promise
        with same_outputs(run):
            neurons.shrink_(run.model, remove)
        return tuple(neurons.rows(run)), promise


def _not_reached(run: Run, plan: Plan) -> list[SkippedModule]:
    return [
        SkippedModule(name, type(plan.sites[name].layer).__name__, run.left.get(name, f"not reached: {run.stopped}"))
        for name in plan.order
        if name not in run.written
    ]
