"""Net-Trim over a model: layers to programs, programs to sparse weights.

Parallel mode (Aghasi et al. 2017, 2020): every layer's program is built from the original network's inputs to it, so
the layers are independent.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.capture import Capture, Forward, LayerCapture, as_batches, capture, network_outputs
from convexprune.errors import NothingToPrune, PruningFailed
from convexprune.matrices import input_matrices, weight_matrices, write_back_
from convexprune.plan import choose_layers, layer_eps, layer_fits, looked_up
from convexprune.report import Report, SkippedModule
from convexprune.solved import NetTrimLayer, SolvedGroup, layer_report
from convexprune.solvers import L1, Ball, LayerProgram, NetTrimSet, ReluBall, Solution, Status, solve
from convexprune.solvers.arrays import as_matrix, checked_radius, norm, working_dtype
from convexprune.solvers.errors import EmptyInput, Infeasible, InvalidInput
from convexprune.solvers.interface import Solver
from convexprune.solvers.registry import make_solver
from convexprune.solvers.solution import TracePoint
from convexprune.solvers.solve import environment

__all__ = ["FITS", "layer_program", "prune_", "silent"]

FITS = {"relu-ball": ReluBall, "net-trim": NetTrimSet, "ball": Ball}
"""Fits by name."""

_log = logging.getLogger(__name__)


def layer_program(
    layer: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    eps: float = 0.1,
    *,
    fit: str = "relu-ball",
    ceiling: float = 0.0,
    penalise_bias: bool = False,
    group: int | None = None,
) -> LayerProgram:
    """The program that sparsifies one layer: minimise ‖U‖₁ while X U stays within eps·‖Y‖_F of the layer's output.

    Args:
        layer: A Linear or Conv2d.
        inputs: The module's own input tensor, or several of them.
        eps: Relative to ‖Y‖_F.
        fit: "relu-ball" or "net-trim" where a ReLU follows (Y = ReLU(X W)), "ball" elsewhere (Y = X W).
        ceiling: V of ``NetTrimSet``.
        penalise_bias: Whether the bias counts in the penalty; by default it is free.
        group: Which group of a grouped convolution; each is a program of its own.

    Raises:
        UnsupportedModule, ShapeMismatch, NonFinite, EmptyInput: The layer or its inputs cannot be used.
        InvalidTolerance: eps is negative, NaN or infinite.
        InvalidInput: Unknown fit, or a group that the layer does not have.
    """
    weights = weight_matrices(layer)
    if group is None and len(weights) > 1:
        raise InvalidInput(f"the layer has {len(weights)} groups, each a program of its own: choose one with group=")
    if not 0 <= (group or 0) < len(weights):
        raise InvalidInput(f"group: expected one of 0 to {len(weights) - 1}, found {group}")
    W = weights[group or 0]
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not tensors:
        raise EmptyInput("inputs: expected at least one tensor, found none")
    X = torch.cat([input_matrices(layer, tensor)[group or 0] for tensor in tensors]).to(W.device)
    penalty = L1() if penalise_bias or layer.bias is None else L1.free_bias(X.shape[1])
    return LayerProgram(X, _targets_fit(fit, X, W, checked_radius("eps", eps), ceiling), penalty)


def _targets_fit(fit: str, X: Tensor, W: Tensor, eps: float, ceiling: float) -> ReluBall | NetTrimSet | Ball:
    if fit not in FITS:
        raise InvalidInput(f"fit: expected one of {', '.join(FITS)}, found {fit!r}")
    dtype = working_dtype(X.dtype)
    Y = as_matrix("inputs of the layer", X).to(dtype) @ W.to(dtype)
    if fit != "ball":
        Y.clamp_(min=0)
    radius = eps * float(norm(Y))
    return NetTrimSet(Y, radius, ceiling) if fit == "net-trim" else FITS[fit](Y, radius)


@dataclass(frozen=True)
class _Recipe:
    """How the layers are to be solved, the same for each."""

    solver: str | Solver
    options: Mapping[str, Any]  # of ``solve``: limits and the solver's own
    eps: Mapping[str, float]  # relative, by layer
    ceiling: float
    penalise_bias: bool
    callback: Callable[[str, TracePoint], bool | None] | None


def prune_(
    model: nn.Module,
    calibration: Any,
    eps: float | Sequence[float] | Mapping[str, float] = 0.1,
    *,
    mode: str = "parallel",
    fit: str | Mapping[str, str] | None = None,
    solver: str | Solver = "admm",
    layers: str | Iterable[str] | None = None,
    activations: Mapping[str, str] | None = None,
    ceiling: float = 0.0,
    penalise_bias: bool = False,
    tol: float = 1e-3,
    feas_tol: float = 1e-4,
    max_iter: int | None = None,
    time_limit: float | None = None,
    batch_size: int = 256,
    forward: Forward | None = None,
    keep_solutions: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    callback: Callable[[str, TracePoint], bool | None] | None = None,
    **options: Any,
) -> Report:
    """Prune a trained model in place; if anything fails the model is as it was.

    Args:
        model: Any module; its Linear and Conv2d layers are pruned.
        calibration: Inputs: a tensor or array [samples, ...], or an iterable of batches (tensor, tuple of positional
            arguments, or mapping of keyword arguments).
        eps: Allowed output error of each layer relative to ‖Y‖_F: a number, one a layer in the model's order, or a
            mapping from layer names or patterns.
        mode: "parallel": every layer from the original network's inputs.
        fit: None: "relu-ball" where only ReLU follows, "ball" elsewhere; or a fit's name, or a mapping from patterns.
        solver: As in ``solve``.
        layers: Patterns ("features.*", "fc?") of qualified names; None: every layer that can be pruned.
        activations: What follows a layer, by name pattern, where watching the model is not enough: {"fc1": "relu"}.
        ceiling: As in ``layer_program``.
        penalise_bias: As in ``layer_program``.
        tol: As in ``solve``, for each layer (each group of a convolution); likewise the next three.
        feas_tol: As in ``solve``.
        max_iter: As in ``solve``.
        time_limit: As in ``solve``.
        batch_size: Samples at a time where ``calibration`` is one tensor.
        forward: Called as ``forward(model, batch)`` in place of ``model(batch)``.
        keep_solutions: Keep each layer's solutions, multipliers included, in the report.
        progress: Called as ``progress(stage, done, total)``, with the stage "capture" or a layer's name.
        callback: Called as ``callback(layer, trace_point)`` while a layer is solved; a true answer stops that layer.
        **options: The solver's own.

    Returns:
        The report. A layer whose certificate did not close within the limits is written all the same, and its status
        says so.

    Raises:
        NothingToPrune: No layer can be pruned, or the patterns choose none.
        EmptyCalibration, NonFinite, ShapeMismatch: The calibration data cannot be used.
        InvalidTolerance: An eps or a limit out of its range.
        UnknownSolver, UnknownOption, SolverRefused, MissingExtra: As in ``solve``.
        Infeasible: A layer's fit (a Net-Trim ceiling) leaves no weights.
        PruningFailed: The solver returned nothing usable for a layer.
    """
    began = time.perf_counter()
    _check_call(mode, solver, options)
    chosen, skipped = choose_layers(model, layers)
    limits = {"tol": tol, "feas_tol": feas_tol, "max_iter": max_iter, "time_limit": time_limit}
    recipe = _Recipe(solver, limits | options, layer_eps(eps, list(chosen)), ceiling, penalise_bias, callback)
    before = {name: weight_matrices(layer) for name, layer in chosen.items()}  # NaN in any layer is found first
    batches = as_batches(calibration, batch_size)
    tell = progress or silent
    seen = capture(model, batches, chosen, forward=forward, progress=partial(tell, "capture"))
    called, uncalled = _reached(chosen, seen)
    follows = {name: looked_up(activations or {}, name) or seen.layers[name].activation for name in called}
    fits = layer_fits(fit, follows, FITS)
    rows: list[NetTrimLayer] = []
    after: dict[nn.Module, list[Tensor]] = {}
    solutions: dict[str, tuple[Solution, ...]] = {}
    for number, name in enumerate(called):
        tell(name, number, len(called))
        groups = _solve_layer(name, chosen[name], seen.layers.pop(name), fits[name], recipe)
        rows.append(layer_report(name, chosen[name], fits[name], recipe.eps[name], groups))
        after[chosen[name]] = [group.after for group in groups]
        if keep_solutions:
            solutions[name] = tuple(group.solution for group in groups)
        del groups  # one layer's data in memory, not the network's
        _log.info("%s: %s", name, rows[-1])
    tell(called[-1], len(called), len(called))
    outputs = _write_all_(model, {chosen[name]: before[name] for name in called}, after, batches, forward)
    return Report(
        layers=tuple(rows),
        skipped=(*skipped, *uncalled),
        output_error=seen.error(outputs),
        samples=seen.samples,
        seconds=time.perf_counter() - began,
        provenance=_provenance(model, mode, recipe),
        solutions=solutions,
    )


def _reached(chosen: Mapping[str, nn.Module], seen: Capture) -> tuple[list[str], list[SkippedModule]]:
    """The layers that the calibration data reached, and the others with the reason."""
    called = [name for name in chosen if name in seen.layers]
    if not called:
        raise NothingToPrune(f"the calibration data reaches none of {', '.join(chosen)}: check layers and forward")
    rest = [name for name in chosen if name not in seen.layers]
    return called, [SkippedModule(name, type(chosen[name]).__name__, _UNCALLED) for name in rest]


def _check_call(mode: str, solver: str | Solver, options: dict[str, Any]) -> None:
    if mode != "parallel":
        raise InvalidInput(f"mode: expected 'parallel', found {mode!r}")
    make_solver(solver, options)


_UNCALLED = "its forward was not called on the calibration data, so its inputs are not known"


def silent(stage: str, done: int, total: int) -> None:
    """No progress is shown."""


def _solve_layer(name: str, layer: nn.Module, seen: LayerCapture, fit: str, recipe: _Recipe) -> list[SolvedGroup]:
    """Every group of the layer, solved; memory is one group's program."""
    groups = []
    for number, before in enumerate(weight_matrices(layer)):
        program = layer_program(
            layer,
            seen.inputs,
            recipe.eps[name],
            fit=fit,
            ceiling=recipe.ceiling,
            penalise_bias=recipe.penalise_bias,
            group=number,
        )
        callback = None if recipe.callback is None else partial(recipe.callback, name)
        # No start: ADMM's own, a ridge solution, needs 10 to 25 % fewer iterations than the trained weights.
        solution = solve(program, recipe.solver, callback=callback, **recipe.options)
        _check(name, solution)
        groups.append(SolvedGroup(program, solution, before, solution.weights.to(before)))
    return groups


def _check(name: str, solution: Solution) -> None:
    if solution.status is Status.INFEASIBLE:
        raise Infeasible(f"layer {name!r}: {solution.status.advice} The model is unchanged")
    if not solution.weights.isfinite().all():
        message = solution.provenance["message"] or solution.status.advice
        raise PruningFailed(f"layer {name!r}: the solver ended {solution.status}: {message} The model is unchanged")
    if solution.status is not Status.SOLVED:
        _log.warning("layer %r ended %s: %s", name, solution.status, solution.status.advice)


def _write_all_(
    model: nn.Module,
    before: Mapping[nn.Module, Sequence[Tensor]],
    after: Mapping[nn.Module, Sequence[Tensor]],
    batches: list[Any],
    forward: Forward | None,
) -> Tensor:
    """Write every layer and return the network's outputs; on any failure every layer is as before."""
    try:
        for layer, matrices in after.items():
            write_back_(layer, matrices)
        return network_outputs(model, batches, forward)
    except BaseException:
        for layer, matrices in before.items():
            write_back_(layer, matrices)
        raise


def _provenance(model: nn.Module, mode: str, recipe: _Recipe) -> dict[str, Any]:
    return {
        "mode": mode,
        "solver": recipe.solver if isinstance(recipe.solver, str) else type(recipe.solver).__name__,
        "options": {
            name: str(value) if isinstance(value, torch.dtype) else value for name, value in recipe.options.items()
        },
        "eps": dict(recipe.eps),
        "ceiling": recipe.ceiling,
        "penalise_bias": recipe.penalise_bias,
    } | environment(next(model.parameters()))
