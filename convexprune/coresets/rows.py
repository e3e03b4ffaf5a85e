"""What became of a network of which coresets were taken, and the status of its rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from convexprune.coresets.base import Guarantee
from convexprune.coresets.sizes import Choice
from convexprune.network.capture import Capture
from convexprune.report.report import Assumption, LayerReport, SkippedModule


@dataclass(frozen=True, eq=False)
class Pruned:
    """What became of a network.

    Attributes:
        rows: Of the layers that changed, in the model's order.
        skipped: Modules that hold weights and were not pruned.
        capture: What the layers saw; None if there are no data.
        terms: Figures of the theory of each layer whose weights were scored, pruned or not, from the input on.
    """

    rows: Sequence[LayerReport]
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
