"""What pruning did, as data, as a table, as JSON."""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from convexprune.files.texts import Json
from convexprune.files.weights import listed, plain
from convexprune.report.tables import as_text, layer_table
from convexprune.solvers import Solution

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Assumption:
    """Something that a guarantee rests on, and whether it holds here; None if it cannot be checked."""

    text: str
    holds: bool | None


@dataclass(frozen=True)
class LayerReport:
    """One layer of a pruned model: figures are of the weights as written into it; fields without meaning are empty.

    Attributes:
        name: Qualified module name.
        shape: Of the module's weight as it is now.
        samples: Rows of inputs that the layer saw (positions of a convolution count each).
        nonzeros_before, nonzeros: Entries of the module's weight that are not zero; the bias is not counted.
        output_error: Of the layer alone on the calibration data, relative, NaN without any: of its outputs
            ‖ŷ − Y‖_F/‖Y‖_F, behind the ReLU where the fit stands before one; of a coreset ‖XÛ − XU‖_F/‖XU‖_F of the
            products in which its items take part.
        seconds: All that it took.
        status: How it ended: "solved" (certified within the tolerances), "refitted" (within the promise on a certified
            support), "as trained" (the trained weights, which keep the promise), "no bound" (a budget, kept), "rounded"
            (no longer certified after rounding to the module's dtype), or a solver's other status; "sampled", "largest
            kept", "kept whole" (a guarantee asks for at least as many draws as there are items),
            "assumption fails"; "inputs", "neurons", "inputs and neurons" (what was removed); "masked", "masked,
            refitted" (the mask that was wanted, by scores).
        goal: What was wanted of the layer, in words.
        fit: What was kept of its outputs.
        norm: The BatchNorm that is part of the program.
        before: The shape of the weight before neurons or inputs were removed.
        neurons: How many stay.
        eps, eps_allowed: The radius relative to ‖Y‖_F, and the one allowed, which cascade may raise; infinity and None
            for a budget.
        promised: What ``output_error`` is promised to be at most.
        value, bound, gap, violation: The certificate, groups of a layer added up.
        iterations: The solver's (the most that a group took).
        returned: Weights that were zero before and are not any more.
        items: What a coreset was taken of: "neurons", "weights", or "inputs" where only inputs went.
        kept_items, all_items: How many.
        sampling: How they were chosen.
        draws: How many were made, in all groups; items, where there are no draws.
        uniform_error: ``output_error`` of uniform sampling at the same size.
        guarantee: (eps, delta), if that was the size.
        promise: What it guarantees, in words.
        assumptions: What that rests on.
        terms: Figures of the theory by name.
        notes: What else a reader should know.
    """

    name: str
    shape: tuple[int, ...]
    samples: int
    nonzeros_before: int
    nonzeros: int
    output_error: float
    seconds: float
    status: str
    goal: str = ""
    fit: str = ""
    norm: str | None = None
    before: tuple[int, ...] | None = None
    neurons: int | None = None
    eps: float = math.inf
    eps_allowed: float | None = None
    promised: float = math.inf
    value: float = math.nan
    bound: float = -math.inf
    gap: float = math.inf
    violation: float = 0.0
    iterations: int = 0
    returned: int = 0
    items: str = ""
    kept_items: int = 0
    all_items: int = 0
    sampling: str = ""
    draws: int = 0
    uniform_error: float = math.nan
    guarantee: tuple[float, float] | None = None
    promise: str = ""
    assumptions: tuple[Assumption, ...] = ()
    terms: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def certified(self) -> bool:
        """Whether what was promised holds: an error, a budget, or a guarantee of which no assumption fails."""
        return self.status in _CERTIFIED

    @property
    def proven(self) -> bool:
        """Whether an error was promised, and holds: of a budget or a size nothing is proven, it is counted."""
        return self.status in _PROVEN or (self.guarantee is not None and self.certified)

    @property
    def raised(self) -> tuple[float, float] | None:
        """The eps allowed and the larger one that is kept, where they differ by more than rounding; else None."""
        if self.eps_allowed is None or self.eps <= self.eps_allowed * (1 + _ROUNDING):
            return None
        return self.eps_allowed, self.eps

    @property
    def kept(self) -> str:
        """The part of the weights that is left."""
        return f"{self.nonzeros / max(self.nonzeros_before, 1):.1%}"

    def remarks(self) -> tuple[str, ...]:
        """What a reader should know, below the table: the norm, the guarantee with what it rests on, and the notes."""
        words = {True: "holds", False: "does not hold", None: "cannot be checked"}
        found = [] if self.norm is None else [f"{self.norm} is part of its program, and takes the bias"]
        if self.guarantee is not None:
            eps, delta = self.guarantee
            found.append(f"eps = {eps:g}, delta = {delta:g}: {self.promise}")
            found += [f"{each.text}: {words[each.holds]}" for each in self.assumptions]
        return (*found, *self.notes)


_PROVEN = frozenset({"solved", "refitted"})
_CERTIFIED = _PROVEN | {"no bound", "as trained", "sampled", "largest kept", "kept whole"}
_CERTIFIED |= {"inputs", "neurons", "inputs and neurons", "masked", "masked, refitted"}
_ROUNDING = 1e-9


class Column(NamedTuple):
    """A column of the tables of layers: what its figures mean, where it is shown at the least, the text of a row."""

    heading: str
    meaning: str
    shown: str  # "narrow": on every terminal; "wide": on wide ones; "page": on the page alone, as all are
    text: Callable[[LayerReport], str]


def _shown(value: float, form: str, known: bool = True) -> str:
    return format(value, form) if known and math.isfinite(value) else ""


COLUMNS = (
    Column("layer", "name of the module", "narrow", lambda row: row.name),
    Column("shape", "of the weight as it is now", "wide", lambda row: "×".join(map(str, row.shape))),
    Column("was", "its shape before", "wide", lambda row: "×".join(map(str, row.before or ()))),
    Column("neurons", "that stay", "narrow", lambda row: f"{row.neurons} of {row.before[0]}" if row.before else ""),
    Column("items", "what was chosen from", "wide", lambda row: row.items),
    Column("kept items", "of all", "narrow", lambda r: f"{r.kept_items:,} of {r.all_items:,}" if r.items else ""),
    Column("fit", "what was kept of its outputs, and what was wanted", "wide", lambda r: f"{r.fit} {r.goal}".strip()),
    Column("nonzeros", "weights that are not zero; biases are not counted", "wide", lambda row: f"{row.nonzeros:,}"),
    Column("kept", "of the weights that were not zero before", "narrow", lambda row: row.kept),
    Column("ℓ1 value", "ℓ1 norm of the weights", "wide", lambda row: _shown(row.value, ".6g", row.eps < math.inf)),
    Column("gap", "of the ℓ1 norm to the least one, relative", "narrow", lambda row: _shown(row.gap, ".1e")),
    Column("violation", "of the promise, relative", "narrow", lambda r: _shown(r.violation, ".1e", r.eps < math.inf)),
    Column("error", "of outputs on the calibration data, relative", "narrow", lambda r: _shown(r.output_error, ".4f")),
    Column("uniform", "the error of uniform sampling at this size", "narrow", lambda r: _shown(r.uniform_error, ".4f")),
    Column("draws", "wanted", "wide", lambda row: f"{row.draws:,} ({row.sampling})" if row.sampling else ""),
    Column("its", "iterations of the solver", "wide", lambda row: f"{row.iterations}" if row.goal else ""),
    Column("seconds", "for the layer", "wide", lambda row: f"{row.seconds:.1f}"),
    Column("promised", "most that the error may be", "page", lambda row: _shown(row.promised, ".4g")),
    Column("came back", "weights that were zero before", "page", lambda r: f"{r.returned:,}" if r.returned else ""),
    Column("status", "how it ended", "narrow", lambda row: row.status),
)
"""What a table of layers may show; a column that is empty in all rows is left out."""


@dataclass(frozen=True)
class SkippedModule:
    """A module with weights that was left as it is, and why."""

    name: str
    kind: str
    reason: str

    @classmethod
    def of(cls, name: str, module: object, reason: str) -> "SkippedModule":
        """That of a module; its kind is the name of its class."""
        return cls(name, type(module).__name__, reason)


class Promise(Protocol):
    """What is known of the network's outputs; its text is a sentence."""

    @property
    def kept(self) -> bool:
        """Whether what was promised holds."""
        ...

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        ...


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
        solutions: The solutions by layer name, one a group, if they were wanted.
        network: The bound on ``output_error``, by Net-Trim (``NetworkPromise``).
        generalisation: What is known of errors on new data, if labels were given to "corenet"
            (``GeneralisationBound``).
        mask: What a mask of the positions that count left out, as ``Counted.to_dict``; None without one.
        notices: What was done otherwise than wanted, or limits what the figures say: sentences for the head.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedModule, ...]
    output_error: float
    samples: int
    seconds: float
    provenance: Json
    solutions: Mapping[str, tuple[Solution, ...]] = field(default_factory=dict, repr=False)
    generalisation: Promise | None = None
    network: Promise | None = None
    notices: tuple[str, ...] = ()
    mask: Json | None = None

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
        promises = [promise for promise in (self.network, self.generalisation) if promise is not None]
        return finished and all(row.certified for row in self.layers) and all(promise.kept for promise in promises)

    @property
    def head(self) -> tuple[str, ...]:
        """What a reader should know first: the verdict, what is odd about layers, and ``notices``."""
        counts = Counter(row.status for row in self.layers).most_common()
        ended = ", ".join(f"{status} ({count})" for status, count in counts)
        verdict = f"{self.verdict}: {ended}" if ended else self.verdict
        return (*self._nothing(), *filter(None, (verdict,)), *oddities(self.layers), *self.notices)

    def _nothing(self) -> tuple[str, ...]:
        """That nothing was pruned, and why."""
        if self.pruned or self.provenance.get("stopped") is not None:
            return ()
        if self.layers:
            return ("nothing was pruned: within what was allowed all layers keep as many weights as they had",)
        left = [module.reason for module in self.skipped if module.reason.startswith("left as trained")]
        reasons = Counter(left or [module.reason for module in self.skipped])
        return tuple(f"nothing was pruned: {count} × {reason}" for reason, count in reasons.most_common(1))

    @property
    def verdict(self) -> str:
        """What is certified, in a word or two; empty where no layer was pruned."""
        if not self.certified:
            stopped = self.provenance.get("stopped")
            return "not certified" if stopped is None else f"not finished ({stopped})"
        if not self.layers:
            return ""
        proven = [row.proven for row in self.layers]
        return "certified" if all(proven) else "partly certified" if any(proven) else "measured, not certified"

    def to_dict(self) -> dict[str, object]:
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
        """A rich table, a row a layer, below what a reader should know first, without the columns that are all empty.

        On a terminal of less than 120 characters columns are fewer, and names are shortened: a beginning that many
        share is said once.
        """
        first, *middle, last = COLUMNS
        places = ("narrow", "wide") if width >= _WIDE else ("narrow",)
        shown = [each for each in middle if each.shown in places and any(map(each.text, self.layers))]
        rows = []
        for row in self.layers:
            status = row.status if row.certified else f"[red]{row.status}[/red]"
            rows.append([row.name, *(each.text(row) or "–" for each in shown), status])
        headings = [each.heading for each in (first, *shown, last)]
        return layer_table(self.head, headings, rows, self._caption(), width)

    def _caption(self) -> list[str]:
        kept = f"{self.nonzeros:,} of {self.nonzeros_before:,} weights kept"
        error = f"; network output error {self.output_error:.4f} on {self.samples:,} samples" if self.samples else ""
        promise = [] if self.network is None else [str(self.network)]
        lines = [kept + error, *promise, *(f"{row.name}: {note}" for row in self.layers for note in row.remarks())]
        lines += [] if self.generalisation is None else [str(self.generalisation)]
        return lines + [f"not pruned: {module.name} ({module.kind}): {module.reason}" for module in self.skipped]

    def __str__(self) -> str:
        return as_text(self.table)


def oddities(rows: Sequence[LayerReport]) -> tuple[str, ...]:
    """Sentences on radii that cascade raised, layers without weights and zeros that came back, where there are any."""
    raised = [row for row in rows if row.raised]
    back = sorted((row for row in rows if row.returned), key=lambda row: -row.returned)
    found = list[str]()
    if raised:
        most, layers = max(raised, key=lambda row: row.eps), "1 layer" if len(raised) == 1 else f"{len(raised)} layers"
        found.append(
            f"eps was raised in {layers} of {len(rows)}: at most to {most.eps:.4g} ({most.name}; "
            f"{most.eps_allowed:g} allowed), since in cascade the trained weights themselves miss by that much on the "
            "pruned network's inputs"
        )
    if empty := emptied_layers(rows):
        found.append(empty)
    if back:
        where = listed([f"{row.name} {row.returned:,}" for row in back], _MOST)
        total = sum(row.returned for row in back)
        what = "1 weight that was zero" if total == 1 else f"{total:,} weights that were zero"
        found.append(f"{what} came back ({where}): keep_zeros (--keep-zeros) keeps them zero")
    return tuple(found)


def emptied_layers(rows: Sequence[LayerReport]) -> str:
    """Which layers have no weights left, and whether that was to be expected; empty where none has."""
    found = [row for row in rows if row.nonzeros == 0 < row.nonzeros_before]
    if not found:
        return ""
    allowed = any(row.eps_allowed is not None and row.eps_allowed >= 1 for row in found)
    why = "; from eps 1 on zero weights keep the promise, whatever was trained: give a smaller eps" if allowed else ""
    names = listed([row.name for row in found], _MOST)
    return f"no weight is left in {len(found)} of {len(rows)} layers ({names}): outputs there depend on no input{why}"


def only_skipped(
    names: Collection[str], skipped: Sequence[SkippedModule]
) -> tuple[dict[str, tuple[str, ...]], tuple[SkippedModule, ...]]:
    """Notes for the rows of layers, by name, that are skipped too, since they lose inputs alone; and the others."""
    notes: dict[str, tuple[str, ...]] = {
        module.name: (f"keeps its neurons: {module.reason}",) for module in skipped if module.name in names
    }
    return notes, tuple(module for module in skipped if module.name not in names)


_WIDE = 120
_MOST = 5  # layers that a line names
