"""What pruning did, as data, as a table, as JSON."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

from convexprune.files.weights import plain
from convexprune.report.tables import as_text, layer_table
from convexprune.solvers import Solution

if TYPE_CHECKING:
    from rich.table import Table

    from convexprune.coresets.generalisation import GeneralisationBound
    from convexprune.nettrim.outcome import NetworkPromise


@dataclass(frozen=True)
class LayerReport:
    """One layer of a pruned model; each method's row adds what it has to say.

    Attributes:
        name: Qualified module name.
        shape: Of the module's weight as it is now.
        samples: Rows of inputs that the layer saw (positions of a convolution count each).
        nonzeros_before, nonzeros: Entries of the module's weight that are not zero; the bias is not counted.
        output_error: Of the layer alone, on the calibration data; NaN without any.
        seconds: All that it took.
        status: How it ended.
    """

    name: str
    shape: tuple[int, ...]
    samples: int
    nonzeros_before: int
    nonzeros: int
    output_error: float
    seconds: float
    status: str

    columns: ClassVar[tuple[tuple[str, bool], ...]] = ()  # (heading, whether it is shown on a narrow terminal too)

    @property
    def certified(self) -> bool:
        """Whether what was promised of this layer holds."""
        raise NotImplementedError

    def cells(self) -> list[str]:
        """One text for each of the columns."""
        raise NotImplementedError

    def remarks(self) -> tuple[str, ...]:
        """What a reader should know, below the table."""
        return ()

    def with_remark(self, text: str) -> Self:
        """The row with one remark more."""
        raise NotImplementedError

    @property
    def proven(self) -> bool:
        """Whether something is promised of this layer that was proven, and not only measured or counted."""
        raise NotImplementedError

    @property
    def raised(self) -> tuple[float, float] | None:
        """The eps that was asked for and the larger one that is kept, where it had to be raised; else None."""
        return None

    @property
    def came_back(self) -> int:
        """How many of its weights were zero before and are not any more, as far as that is known."""
        return 0

    @property
    def emptied(self) -> bool:
        """Whether no weight is left of those that there were."""
        return self.nonzeros == 0 < self.nonzeros_before

    @property
    def empty_allowed(self) -> bool:
        """Whether what was asked for is kept by no weights at all, whatever was trained."""
        return False

    @property
    def kept(self) -> str:
        """The part of the weights that is left."""
        return f"{self.nonzeros / max(self.nonzeros_before, 1):.1%}"


@dataclass(frozen=True)
class SkippedModule:
    """A module with weights that was left as it is, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What pruning a model did.

    Attributes:
        layers: A row a pruned layer, in the model's order.
        skipped: Modules that hold weights and were not pruned, each with the reason.
        output_error: The network's own: ‖f̂(x) − f(x)‖_F/‖f(x)‖_F over the calibration data; NaN without any.
        samples: Calibration samples.
        seconds: For everything.
        provenance: Method or solver, options, seed, tolerances, dtype, device, threads, versions.
        solutions: The solutions by layer name, one a group, if they were asked for.
        network: The bound on ``output_error``, by Net-Trim.
        generalisation: What is known of errors on new data, if labels were given to "corenet".
        mask: What a mask of the positions that count left out, as ``Counted.to_dict``; None without one.
        notices: What was done otherwise than asked, or limits what the figures say: sentences for the head.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedModule, ...]
    output_error: float
    samples: int
    seconds: float
    provenance: Mapping[str, Any]
    solutions: Mapping[str, tuple[Solution, ...]] = field(default_factory=dict, repr=False)
    generalisation: "GeneralisationBound | None" = None
    network: "NetworkPromise | None" = None
    notices: tuple[str, ...] = ()
    mask: Mapping[str, Any] | None = None

    @property
    def nonzeros_before(self) -> int:
        """Nonzero weights of the pruned layers before."""
        return sum(row.nonzeros_before for row in self.layers)

    @property
    def nonzeros(self) -> int:
        """Nonzero weights of the pruned layers now."""
        return sum(row.nonzeros for row in self.layers)

    @property
    def pruned(self) -> bool:
        """Whether any layer has fewer weights than before."""
        return any(row.nonzeros < row.nonzeros_before for row in self.layers)

    @property
    def certified(self) -> bool:
        """Whether what was promised holds, of every layer and of the network, and the run came to its end."""
        finished = self.provenance.get("stopped") is None and not (self.samples and math.isnan(self.output_error))
        return finished and all(row.certified for row in self.layers) and (self.network is None or self.network.kept)

    @property
    def head(self) -> tuple[str, ...]:
        """What a reader should know first: the verdict, what is odd about layers, and ``notices``."""
        verdict = f"{self._verdict()}: {_statuses(self.layers)}" if self.layers else self._verdict()
        odd = (raised_eps(self.layers), emptied_layers(self.layers), returned_zeros(self.layers))
        return (*self._nothing(), *filter(None, (verdict, *odd)), *self.notices)

    def _nothing(self) -> tuple[str, ...]:
        """That nothing was pruned, and why."""
        if self.pruned or self.provenance.get("stopped") is not None:
            return ()
        if self.layers:
            return ("nothing was pruned: within what was asked all layers keep as many weights as they had",)
        left = [module.reason for module in self.skipped if module.reason.startswith("left as trained")]
        reasons = Counter(left or [module.reason for module in self.skipped])
        return tuple(f"nothing was pruned: {count} × {reason}" for reason, count in reasons.most_common(1))

    def _verdict(self) -> str:
        if not self.certified:
            stopped = self.provenance.get("stopped")
            return "not certified" if stopped is None else f"not finished ({stopped})"
        if not self.layers:
            return ""
        proven = [row.proven for row in self.layers]
        return "certified" if all(proven) else "partly certified" if any(proven) else "measured, not certified"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; solutions are left out."""
        own = ("layers", "skipped", "solutions", "generalisation", "network")
        plain = {name: value for name, value in vars(self).items() if name not in own}
        rows = {"layers": [asdict(row) for row in self.layers], "skipped": [asdict(module) for module in self.skipped]}
        totals = {"nonzeros_before": self.nonzeros_before, "nonzeros": self.nonzeros, "certified": self.certified}
        totals["pruned"] = self.pruned
        bounds = {} if self.generalisation is None else {"generalisation": self.generalisation.to_dict()}
        bounds |= {} if self.network is None else {"network": self.network.to_dict()}
        return {"head": self.head} | rows | totals | plain | bounds

    def to_json(self) -> str:
        """``to_dict()`` as JSON; NaN and infinity, which it cannot express, become null."""
        return json.dumps(plain(self.to_dict()), indent=2, default=str)

    def table(self, width: int = 140) -> "Table":
        """A rich table, a row a layer, below what a reader should know first; with fewer columns below 120 characters.

        On a narrow terminal names are shortened: a beginning that many share is said once.
        """
        # A run may have been stopped before its first layer.
        columns = self.layers[0].columns if self.layers else (("layer", True),)
        shown = [number for number, (_, always) in enumerate(columns) if always or width >= _WIDE]
        rows = [[cells[number] for number in shown] for cells in (row.cells() for row in self.layers)]
        return layer_table(self.head, [columns[number][0] for number in shown], rows, self._caption(), width)

    def _caption(self) -> list[str]:
        kept = f"{self.nonzeros:,} of {self.nonzeros_before:,} weights kept"
        error = f"; network output error {self.output_error:.4f} on {self.samples:,} samples" if self.samples else ""
        promise = [] if self.network is None else [str(self.network)]
        lines = [kept + error, *promise, *(f"{row.name}: {note}" for row in self.layers for note in row.remarks())]
        lines += [] if self.generalisation is None else [str(self.generalisation)]
        return lines + [f"not pruned: {module.name} ({module.kind}): {module.reason}" for module in self.skipped]

    def __str__(self) -> str:
        return as_text(self.table)


def raised_eps(rows: Sequence[LayerReport]) -> str:
    """In how many layers eps had to be raised, and to what at most; empty where none was."""
    found = [(*row.raised, row.name) for row in rows if row.raised is not None]
    if not found:
        return ""
    asked, kept, name = max(found, key=lambda each: each[1])
    layers = "1 layer" if len(found) == 1 else f"{len(found)} layers"
    return (
        f"eps was raised in {layers} of {len(rows)}: at most to {kept:.4g} ({name}; {asked:g} asked for), since in "
        "cascade the trained weights themselves miss by that much on the pruned network's inputs"
    )


def emptied_layers(rows: Sequence[LayerReport]) -> str:
    """Which layers have no weights left, and whether that was to be expected; empty where none has."""
    found = [row for row in rows if row.emptied]
    if not found:
        return ""
    names = ", ".join(row.name for row in found[:_MOST]) + (", …" if len(found) > _MOST else "")
    why = "; from eps 1 on zero weights keep the promise, whatever was trained: give a smaller eps"
    tail = why if any(row.empty_allowed for row in found) else ""
    return f"no weight is left in {len(found)} of {len(rows)} layers ({names}): outputs there depend on no input{tail}"


def returned_zeros(rows: Sequence[LayerReport]) -> str:
    """How many weights that were zero are not any more, and where; empty where none is."""
    found = [row for row in rows if row.came_back]
    if not found:
        return ""
    total = sum(row.came_back for row in found)
    where = ", ".join(f"{row.name} {row.came_back:,}" for row in sorted(found, key=lambda row: -row.came_back)[:_MOST])
    more = f" and {len(found) - _MOST} layers more" if len(found) > _MOST else ""
    what = "1 weight that was zero" if total == 1 else f"{total:,} weights that were zero"
    return f"{what} came back ({where}{more}): keep_zeros (--keep-zeros) keeps them zero"


def _statuses(rows: Sequence[LayerReport]) -> str:
    """How layers ended, with how many of them."""
    counts = Counter(row.status for row in rows)
    return ", ".join(f"{status} ({count})" for status, count in counts.most_common())


class _Remarkable(Protocol):
    """A row of a layer that takes remarks."""

    @property
    def name(self) -> str: ...

    def with_remark(self, text: str) -> Self: ...


_Row = TypeVar("_Row", bound=_Remarkable)


def told_once(
    rows: Sequence[_Row], skipped: Sequence[SkippedModule]
) -> tuple[tuple[_Row, ...], tuple[SkippedModule, ...]]:
    """The same where no layer is both a row and skipped: one that lost inputs and no neurons says so in its row."""
    reasons = {module.name: module.reason for module in skipped}
    names = {row.name for row in rows}
    told = (row.with_remark(f"keeps its neurons: {reasons[row.name]}") if row.name in reasons else row for row in rows)
    return tuple(told), tuple(module for module in skipped if module.name not in names)


_WIDE = 120
_MOST = 5  # layers that a line names
