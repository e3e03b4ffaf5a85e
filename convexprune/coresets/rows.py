"""A layer of which a coreset was taken, as a row of the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from convexprune.coresets.base import Assumption, Guarantee
from convexprune.coresets.sizes import Choice
from convexprune.network.capture import Capture
from convexprune.report.report import LayerReport, SkippedModule


@dataclass(frozen=True)
class CoresetLayer(LayerReport):
    """One layer whose neurons, or single weights, were sampled; or whose inputs went with another layer's neurons.

    Attributes:
        items: "neurons", "edges", or "inputs" where only inputs went.
        kept_items, all_items: How many.
        sampling: How they were chosen.
        draws: Asked for, in all groups; items, where there are no draws.
        output_error: ‖XÛ − XU‖_F/‖XU‖_F of the products in which the items take part, with X as the whole network
            computes it.
        uniform_error: The same for uniform sampling at the same size, if that was asked for; else NaN.
        guarantee: (eps, delta) if that was the size.
        promise: What (eps, delta) guarantees, in words.
        assumptions: What that rests on, and whether it holds.
        comments: What else a reader should know.
        terms: Figures of the theory by name.
        status: "sampled", "largest kept", "inputs only", "kept whole" (a guarantee asks for at least as many draws as
            there are items) or "assumption fails".
    """

    items: str
    kept_items: int
    all_items: int
    sampling: str = ""
    draws: int = 0
    uniform_error: float = float("nan")
    guarantee: Guarantee | None = None
    promise: str = ""
    assumptions: tuple[Assumption, ...] = ()
    comments: tuple[str, ...] = ()
    terms: Mapping[str, Any] = field(default_factory=dict)

    columns: ClassVar[tuple[tuple[str, bool], ...]] = (
        ("layer", True),
        ("shape", False),
        ("items", False),
        ("kept items", True),
        ("nonzeros", False),
        ("kept", True),
        ("error", True),
        ("uniform", True),
        ("draws", False),
        ("seconds", False),
        ("status", True),
    )

    @property
    def certified(self) -> bool:
        """Whether a guarantee that was asked for rests on nothing that fails."""
        return self.status != "assumption fails"

    @property
    def proven(self) -> bool:
        """Whether a guarantee was asked for, and holds."""
        return self.guarantee is not None and self.certified

    def cells(self) -> list[str]:
        """One text for each of the columns."""
        return [
            self.name,
            "×".join(map(str, self.shape)),
            self.items,
            f"{self.kept_items:,} of {self.all_items:,}",
            f"{self.nonzeros:,}",
            self.kept,
            _figure(self.output_error),
            _figure(self.uniform_error),
            f"{self.draws:,} ({self.sampling})" if self.sampling else "",
            f"{self.seconds:.1f}",
            self.status if self.certified else f"[red]{self.status}[/red]",
        ]

    def remarks(self) -> tuple[str, ...]:
        """Comments, and, where a guarantee was asked for, what it says and what it rests on."""
        if self.guarantee is None:
            return self.comments
        words = {True: "holds", False: "does not hold", None: "cannot be checked"}
        found = [f"eps = {self.guarantee.eps:g}, delta = {self.guarantee.delta:g}: {self.promise}"]
        return (*found, *(f"{a.text}: {words[a.holds]}" for a in self.assumptions), *self.comments)

    def with_remark(self, text: str) -> Self:
        """The row with one comment more."""
        return replace(self, comments=(*self.comments, text))


@dataclass(frozen=True, eq=False)
class Pruned:
    """What became of a network.

    Attributes:
        rows: Of the layers that changed, in the model's order.
        skipped: Modules that hold weights and were not pruned.
        capture: What the layers saw; None if there are no data.
        terms: Figures of the theory of each layer whose weights were scored, pruned or not, from the input on.
    """

    rows: Sequence[CoresetLayer]
    skipped: Sequence[SkippedModule]
    capture: Capture | None
    terms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def shareless(items: str, s: Tensor, factors: Tensor, sampled: bool) -> tuple[str, ...]:
    """That items of sensitivity 0 went where every other one stays, so that there was room for them."""
    gone = int(((s == 0) & (factors == 0)).sum())
    if not gone or bool(((s > 0) & (factors == 0)).any()):
        return ()
    where = " on this sample" if sampled else ""
    return (f"{gone:,} of {s.numel():,} {items} have no share in any output{where}, and went",)


def status_of(assumptions: Sequence[Assumption], choice: Choice, guarantee: Guarantee | None) -> str:
    """The status of a row."""
    if guarantee is None:
        return "sampled" if choice.sampling != "top" else "largest kept"
    if bool(choice.whole.all()):
        return "kept whole"
    fails = any(assumption.holds is False for assumption in assumptions)
    return "assumption fails" if fails else "sampled"


def _figure(value: float) -> str:
    return "" if value != value else f"{value:.4f}"
