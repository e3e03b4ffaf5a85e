"""What a run would do, and about what it would take, before anything is solved."""

import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from io import StringIO
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from convexprune.calibration import Calibration
from convexprune.forecast import Pace, forecast
from convexprune.matrices import input_matrices
from convexprune.nettrim import prune_
from convexprune.nettrim.asked import target_of
from convexprune.nettrim.network import NetworkEps, NetworkSparsity
from convexprune.nettrim.planning import Plan, make_plan
from convexprune.nettrim.recipe import Recipe, checked_recipe
from convexprune.nettrim.sites import Site
from convexprune.nettrim.structured import NeuronSparsity, chosen_links
from convexprune.nettrim.targets import Each, Target
from convexprune.nettrim.tasks import executor
from convexprune.progress import silent
from convexprune.report import SkippedModule
from convexprune.taps import Received

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LayerPreview", "Preview", "preview", "recipe_of"]

_NARROW = ("layer", "goal", "P", "N×M", "data", "solver", "about")
_WIDE = 120


@dataclass(frozen=True)
class LayerPreview:
    """A layer that would be pruned.

    Attributes:
        name: Qualified module name.
        kind: The module's class.
        shape: Of its weight.
        fit: What is kept.
        norm: The BatchNorm that would be part of the program, or None.
        goal: What is asked.
        matrices: (P, N, M) of each group: X is [P, N] with a last column of ones where there is a bias, Y [P, M].
        gram: Whether X and Y are reduced to XᵀX and XᵀY as they come, so that memory does not grow with P.
        data_bytes: X and Y of all groups, or their products.
        solver_bytes: What the solver keeps beside them for the largest group.
        seconds: About; None for a solver of which nothing is known.
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
    seconds: float | None

    @property
    def groups(self) -> int:
        """How many programs the layer is."""
        return len(self.matrices)

    def cells(self) -> dict[str, str]:
        """Texts by column."""
        sizes = dict.fromkeys(f"{N:,}×{M:,}" for _, N, M in self.matrices)
        return {
            "layer": self.name,
            "kind": self.kind,
            "shape": "×".join(map(str, self.shape)),
            "groups": f"{self.groups}",
            "fit": self.fit,
            "norm": self.norm or "–",
            "goal": self.goal,
            "P": f"{max(P for P, _, _ in self.matrices):,}",
            "N×M": ", ".join(sizes),
            "as": "Gram" if self.gram else "samples",
            "data": _size(self.data_bytes),
            "solver": _size(self.solver_bytes),
            "about": _duration(self.seconds),
        }


@dataclass(frozen=True)
class Preview:
    """What a run would do.

    Attributes:
        layers: In the model's order.
        skipped: Modules that hold weights and would not be pruned, each with the reason.
        samples: Calibration samples.
        weights: Entries of the layers' weights, biases not counted.
        memory_bytes: About what the layer that needs most takes beside the model, one layer at a time.
        seconds: About, for everything; None if a layer's is not known.
        jobs: Layers at a time; ``seconds`` counts on as many free cores.
        pace: The speeds that were measured here.
        recipe: What is asked.
    """

    layers: tuple[LayerPreview, ...]
    skipped: tuple[SkippedModule, ...]
    samples: int
    weights: int
    memory_bytes: int
    seconds: float | None
    jobs: int
    pace: Pace
    recipe: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"layers": [asdict(row) | {"groups": row.groups} for row in self.layers]}

    def table(self, width: int = 140) -> "Table":
        """A rich table, a row a layer; the columns that matter least are left out below 120 characters."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(caption=escape(self._caption()), caption_justify="left")
        columns = list(self.layers[0].cells()) if width >= _WIDE else _NARROW
        for name in columns:
            left = name == columns[0]
            table.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
        for row in self.layers:
            table.add_row(*(escape(row.cells()[name]) for name in columns))
        return table

    def _caption(self) -> str:
        together = f" with {self.jobs} at a time" if self.jobs > 1 else ""
        lines = [
            f"{len(self.layers)} layers with {self.weights:,} weights, {self.samples:,} samples; about "
            f"{_duration(self.seconds)}{together}, within a factor of three if the machine stays as busy; about "
            f"{_size(self.memory_bytes)} for the layer that takes most"
        ]
        lines += [f"not pruned: {module.name} ({module.kind}): {module.reason}" for module in self.skipped]
        return "\n".join(lines)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=max(80, get_terminal_size().columns))
        console.print(self.table(console.width))
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text


def preview(model: nn.Module, calibration: Any, eps: Any = None, **arguments: Any) -> Preview:
    """What ``prune_`` would do with the same arguments: one pass over the data, and nothing is solved or written.

    Seconds are those of documented operation counts at the speed of this machine, measured on one product and on a few
    iterations of a tiny program (``convexprune.forecast``): rather a magnitude than a promise.

    Args:
        model: As for ``prune_``; left as found.
        calibration: As for ``prune_``.
        eps: As for ``prune_``.
        **arguments: As for ``prune_``.

    Raises:
        ConvexPruneError: As ``prune_`` before it solves anything.
    """
    asked = _bound(model, calibration, eps, arguments)
    recipe = _recipe(asked)
    executor(asked["jobs"], recipe.mode == "cascade")  # refuses what prune_ refuses
    data = Calibration(calibration, recipe.batch_size)
    links, left = (None, None) if recipe.unit == "weights" else chosen_links(model, recipe.layers)
    users = None if links is None else [user for link in links.values() for user in link.consumers]
    progress = partial(asked["progress"] or silent, "capture")
    rows: dict[str, list[int]] = {}
    began = time.perf_counter()
    plan = make_plan(model, data, recipe, asked["forward"], progress, names=users, see=_counting(model, rows))
    a_pass = time.perf_counter() - began
    goals = _goals(target_of(recipe, plan, links), plan)
    pace = Pace.measured(next(model.parameters()).device)
    layers = [_layer(plan.sites[name], goals[name], rows[name], recipe, pace, a_pass) for name in plan.order]
    return Preview(
        layers=tuple(layers),
        skipped=plan.skipped if left is None else tuple(left),
        samples=plan.samples,
        weights=sum(site.weights for site in plan.sites.values()),
        memory_bytes=max(max(2 * row.data_bytes, row.data_bytes + row.solver_bytes) for row in layers),
        seconds=_total([row.seconds for row in layers], asked["jobs"], 4 * a_pass, asked["time_limit"]),
        jobs=asked["jobs"],
        pace=pace,
        recipe=recipe.to_dict(),
    )


def recipe_of(model: nn.Module, calibration: Any, eps: Any = None, **arguments: Any) -> Recipe:
    """The recipe of ``prune_`` with these arguments, checked as it checks it.

    Raises:
        InvalidInput, InvalidTolerance, UnknownSolver, UnknownOption: As in ``prune_``.
    """
    return _recipe(_bound(model, calibration, eps, arguments))


def _bound(model: nn.Module, calibration: Any, eps: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of ``prune_`` by name, defaults included."""
    bound = inspect.signature(prune_).bind(model, calibration, eps, **arguments)
    bound.apply_defaults()
    return bound.arguments


def _recipe(asked: Mapping[str, Any]) -> Recipe:
    own = {field.name: asked[field.name] for field in fields(Recipe) if field.name != "limits"}
    limits = {name: asked[name] for name in ("tol", "feas_tol", "max_iter")}
    return checked_recipe(**own, limits=limits | {"time_limit": asked["layer_time_limit"]})


def _counting(model: nn.Module, rows: dict[str, list[int]]) -> Callable[[str, Received], None]:
    """Adds up P of each group of the layers as their inputs pass by."""

    def see(name: str, raw: Received) -> None:
        found = [len(X) for X in input_matrices(model.get_submodule(name), raw)]
        rows[name] = [a + b for a, b in zip(rows.get(name, [0] * len(found)), found, strict=True)]

    return see


def _goals(target: Target, plan: Plan) -> dict[str, tuple[str, tuple[tuple[str, float], ...]]]:
    """By layer, what is asked in words, and the kinds of goals that it is solved for, each with its eps."""
    if isinstance(target, Each):
        return {
            name: (str(goal), ((goal.kind, getattr(goal, "eps", math.nan)),)) for name, goal in target.goals.items()
        }
    if isinstance(target, NetworkEps):
        measured = (("measure", math.nan),) if target.nonzeros else ()
        told, kinds = f"share of network eps {target.eps:g}", (*measured, ("within", target.eps))
    elif isinstance(target, NetworkSparsity):
        told = f"share of {target.count:,}"
        kinds = (("measure", math.nan), ("keep-by-path" if target.path else "keep", math.nan))
    else:
        assert isinstance(target, NeuronSparsity)  # noqa: S101 - there is no other
        told, kinds = f"inputs: {target.part:.0%} fewer", (("rank-inputs", math.nan), ("keep-inputs", math.nan))
    return dict.fromkeys(plan.sites, (told, kinds))


def _layer(
    site: Site,
    goal: tuple[str, tuple[tuple[str, float], ...]],
    rows: list[int],
    recipe: Recipe,
    pace: Pace,
    a_pass: float,
) -> LayerPreview:
    told, kinds = goal
    stored: tuple[Tensor, ...] = site.read()
    matrices = tuple((P, *W.shape) for P, W in zip(rows, stored, strict=True))
    cost = forecast(matrices, kinds, site.fit == "ball", recipe, pace, stored[0].dtype)
    passes = (2 if recipe.mode == "cascade" else 1) * len(kinds) * a_pass
    return LayerPreview(
        name=site.name,
        kind=type(site.layer).__name__,
        shape=site.shape,
        fit=site.fit,
        norm=site.norm_name,
        goal=told,
        matrices=matrices,
        gram=cost.gram,
        data_bytes=cost.data_bytes,
        solver_bytes=cost.solver_bytes,
        seconds=None if cost.seconds is None else cost.seconds + passes,
    )


def _total(seconds: list[float | None], jobs: int, around: float, limit: float | None) -> float | None:
    """All layers, ``jobs`` at a time, and the passes of the run itself."""
    known = [each for each in seconds if each is not None]
    if len(known) < len(seconds):
        return limit
    total = around + max(max(known), sum(known) / jobs)
    return total if limit is None else min(total, limit)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"
