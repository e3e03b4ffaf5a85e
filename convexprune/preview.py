"""What a run would do, and about what it would take: one pass over the data, and nothing is solved or written."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from timeit import repeat
from typing import NoReturn

import torch
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from convexprune.files.weights import listed
from convexprune.options import Options
from convexprune.prune import Request
from convexprune.pruners.net_trim import KeepByPath
from convexprune.pruners.pruner import Pruner
from convexprune.pruners.sizes import in_words, layer_eps
from convexprune.pruners.solving import Solving
from convexprune.pruners.tolerance import Within
from convexprune.report.report import SkippedModule, only_skipped
from convexprune.report.tables import as_text, layer_table
from convexprune.runs.executors import solver_for
from convexprune.runs.layer import Layer
from convexprune.runs.problem import Problem, StoppingRule
from convexprune.runs.run import Run, silent
from convexprune.solvers import L1, LayerProgram, ReluBall, solve
from convexprune.solvers.arrays import working_dtype
from convexprune.solvers.errors import SolverRefused
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.programs import Gram
from convexprune.targets import Eps, NetworkEps, Neurons, Sparsity, Target, as_target

_ITERATIONS: dict[type[Target], int] = {NetworkEps: 400, Sparsity: 800, Neurons: 440}  # typical totals; else 100


@dataclass(frozen=True)
class LayerPreview:
    """A layer that would be pruned.

    ``matrices`` has (P, N, M) of each group: X is [P, N], with a last column of ones where there is a bias, Y [P, M].
    With ``gram`` they are reduced to XᵀX and XᵀY as they come, so that memory does not grow with P. ``data_bytes`` are
    those of X and Y of all groups, or of their products, ``solver_bytes`` what the largest group needs beside them.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    fit: str
    norm: str | None
    goal: str
    matrices: tuple[tuple[int, int, int], ...]
    gram: bool
    data_bytes: int
    solver_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preview:
    """What a run would do: layers in the model's order, and modules that would not be pruned, each with the reason.

    ``memory_bytes`` is about what the layer that needs most takes beside the model; ``seconds`` is the magnitude that
    typical numbers of iterations take at the pace measured here, with ``jobs`` layers at a time.
    """

    layers: tuple[LayerPreview, ...]
    skipped: tuple[SkippedModule, ...]
    samples: int
    weights: int
    memory_bytes: int
    seconds: float
    jobs: int
    recipe: Mapping[str, object]
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)

    def table(self, width: int = 140) -> Table:
        """A rich table, a row a layer."""
        columns = ("layer", "fit", "goal", "P", "N×M", "data", "solver")
        rows = []
        for row in self.layers:
            fit = row.fit if row.norm is None else f"{row.fit} behind {row.norm}"
            sizes = ", ".join(dict.fromkeys(f"{N:,}×{M:,}" for _, N, M in row.matrices))
            cells = [fit, row.goal, f"{max(P for P, _, _ in row.matrices):,}", sizes]
            rows.append([row.name, *map(escape, cells), decimal(row.data_bytes), decimal(row.solver_bytes)])
        most = f"about {decimal(self.memory_bytes)} for the one that takes most"
        pace = f"in the order of {self.seconds:.1g} s, {self.jobs} at a time; {most}"
        lines = [f"{len(self.layers)} layers with {self.weights:,} weights, {self.samples:,} samples; {pace}"]
        lines += [f"{row.name}: {note}" for row in self.layers for note in row.notes]
        lines += [f"not pruned: {module.name} ({module.kind}): {module.reason}" for module in self.skipped]
        return layer_table(self.notices, columns, rows, lines, width)

    def __str__(self) -> str:
        return as_text(self.table)


def preview(
    model: nn.Module,
    data: object = None,
    target: Target | str | None = None,
    *,
    method: str | Pruner | None = None,
    options: Options | None = None,
    eps: object = None,
    sparsity: object = None,
    jobs: object = 1,
) -> Preview:
    """What ``prune_`` would do with the same arguments; it raises what that raises before it solves anything."""
    request = Request.of(model, data, as_target(target, eps, sparsity), method, options, None, jobs)
    solver_for(jobs), StoppingRule(request.options.time_limit)  # these refuse what prune_ refuses
    began = time.perf_counter()
    request, run = request.prepared(Run, partial(silent, "capture"))
    reading, plan, target = time.perf_counter() - began, run.plan, request.target
    layers = [plan.layers[name] for name in plan.order if name not in run.left]
    goals = in_words(target, run)
    rows = [_row(layer, goals[layer.name], run) for layer in layers]
    _check_programs(request, run, rows)
    left = [SkippedModule.of(name, plan.layers[name].module, why) for name, why in run.left.items()]
    notes, skipped = only_skipped({row.name for row in rows}, [*plan.skipped, *left])
    shown = tuple(replace(row, notes=(*row.notes, *notes.get(row.name, ()))) for row in rows)
    memory = max((row.data_bytes + max(row.data_bytes, row.solver_bytes) for row in rows), default=0)
    weights, count = sum(layer.weights for layer in layers), jobs if isinstance(jobs, int) else 1
    seconds, notices = _seconds(rows, request, reading, count), plan.notices
    if isinstance(target, Eps) and (large := [name for name, eps in layer_eps(target, run).items() if eps >= 1]):
        promise = "zero weights keep that promise, whatever was trained; give a smaller eps"
        notices += (f"eps is 1 or more for {listed(large)}: {promise}",)
    return Preview(shown, skipped, plan.samples, weights, memory, seconds, count, request.recipe(), notices)


def _row(layer: Layer, goal: str, run: Run) -> LayerPreview:
    matrices, reduced = tuple(run.matrices(layer.name)), run.reduced(layer.name)
    # 4.4 arrays of the size of Y, unless there are products alone, five matrices N×N, eight of the size of the weights.
    outputs = 0.0 if reduced else 4.4 * working_dtype(layer.read()[0].dtype).itemsize
    solver = max(round(outputs * P * M) + 40 * N * N + 64 * N * M for P, N, M in matrices)
    what = (layer.name, type(layer.module).__name__, layer.shape, layer.fit.name, layer.norm_name, goal)
    return LayerPreview(*what, matrices, reduced, run.nbytes(layer.name), solver, layer.notes)


class _Reached(Exception):
    """The first goals are to be solved."""


def _check_programs(request: Request, run: Run, rows: Iterable[LayerPreview]) -> None:
    """Whether the layers' first programs can be made, and the solver that was named takes them; on two samples each."""
    options, goals = request.options, dict[str, object]()

    def keep(makers: Iterable[Callable[[], object]], _watch: object) -> NoReturn:
        goals.update(maker.args for maker in makers if isinstance(maker, partial))
        raise _Reached

    alike = replace(options, mode="parallel")  # all layers at once
    with suppress(_Reached):
        if isinstance(request.pruner, Solving):
            request.pruner.prune(replace(run, options=alike, solver=keep, left=dict(run.left)), request.target)
    for row in (row for row in rows if row.name in goals):
        goal, layer, stored = goals[row.name], run.layers[row.name], run.trained[row.name][0]
        ones = stored.new_ones(2, sum(stored.shape), dtype=working_dtype(stored.dtype))  # where no set is a point
        X, Y = ones[:, : len(stored)], ones[:, len(stored) :]
        given: tuple[Tensor | Gram, Tensor | None] = (Gram.of([(X, Y)], torch.float64), None) if row.gram else (X, Y)
        problem = Problem(row.name, *given, stored, layer.folds[0], layer.biased, layer.fit, 2)
        program = goal.program(problem, options)  # type: ignore[attr-defined]
        if isinstance(goal, KeepByPath):  # its own program is what a refit is judged by
            program = Within(0.1).program(problem, options)
        if options.solver is not None:
            solver, method = make_solver(options.solver, dict(options.solver_options or {}))
            if reason := method.refuses(program):
                raise SolverRefused(f"solver {solver!r} cannot take this program: {reason}. Choose another solver")


def _seconds(rows: Sequence[LayerPreview], request: Request, reading: float, jobs: int) -> float:
    """Passes, and iterations of 4PNM operations (4N²M with products) after 2PN², within the limits."""
    options, pruner, model = request.options, request.pruner, request.model
    A = torch.ones(1024, 512, device=next(model.parameters()).device)
    pace = min(repeat(lambda: float((A.T @ A)[0, 0]), number=1, repeat=5)) / (2 * 1024 * 512 * 512)
    program = LayerProgram(A[:64, :8], ReluBall(A[:64, :4], 1.0), L1())
    overhead = min(repeat(lambda: solve(program, "admm", tol=1e-12, max_iter=20), number=1, repeat=2)) / 20
    most, limit = options.max_iter or 10**9, options.layer_time_limit or math.inf
    count = min(_ITERATIONS.get(type(request.target), 100), most) if isinstance(pruner, Solving) else 1
    sizes = [(P, N, M, count * (N if row.gram else P)) for row in rows for P, N, M in row.matrices]
    work = [count * overhead + pace * (2 * P * N * N + 4.8 * each * N * M) for P, N, M, each in sizes]
    total = reading * (4 + len(rows) * (1 + options.cascade)) + sum(min(limit, seconds) for seconds in work) / jobs
    return min(total, options.time_limit or math.inf)
