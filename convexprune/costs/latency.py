"""Times on this machine: each layer's product, dense and sparse, and the whole model before and after."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from convexprune.costs.shared import permanent
from convexprune.costs.timing import LayerLatency, layer_latency, not_compared, seconds
from convexprune.network.calibration import as_batches, samples_of
from convexprune.network.capture import capture
from convexprune.network.forwards import Forward, call_model, copy_for, evaluating
from convexprune.report.report import SkippedModule
from convexprune.solvers.arrays import checked_count
from convexprune.solvers.methods.solve import environment

_SCATTER = 0.1  # what such medians differ by from one measurement to the next
_UNCALLED = "its forward was not called on the batch, so its inputs are not known"


@dataclass(frozen=True)
class Latency:
    """Times on this machine.

    Attributes:
        layers: A row for each Linear or convolution; of a convolution its im2col product, without the unfolding.
        skipped: Modules with weights whose products were not compared, each with the reason.
        model: Seconds of one forward, dense, as it is; median.
        before: The same of the model before it was pruned, if it was given.
        samples: Of the batch.
        repeats: Timed runs of each.
        provenance: dtype, device, threads, versions.
    """

    layers: tuple[LayerLatency, ...]
    skipped: tuple[SkippedModule, ...]
    model: float
    before: float | None
    samples: int
    repeats: int
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dense(self) -> float:
        """Seconds of all layers' dense products."""
        return sum(row.dense for row in self.layers)

    @property
    def csr(self) -> float:
        """Seconds of all layers' CSR products."""
        return sum(row.csr for row in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the totals."""
        return asdict(self) | {"dense": self.dense, "csr": self.csr}

    def verdict(self) -> str:
        """Whether anything is faster, a sentence a comparison; differences below a tenth count as none."""
        lines = []
        for row in self.layers:
            at = f"the dense one at {100 * row.density:.0f} % density"
            lines.append(_pace(row.name or "The layer", "the CSR product", row.csr, row.dense, at))
        if self.before is not None:
            lines.append(_pace("The model", "its forward", self.model, self.before, "that of the model before"))
        return " ".join(lines) or "Nothing was compared: there is no CSR product of a layer, and no model before."


def latency(
    model: nn.Module,
    batch: Any,
    *,
    before: nn.Module | None = None,
    repeats: int = 20,
    forward: Forward | None = None,
) -> Latency:
    """Time each layer's dense product against its CSR product, and the whole model, in eval mode; models stay as found.

    Runs of what is compared take turns, after one that is not counted; on CUDA each is waited for.

    Args:
        model: The network, masked or not; masks are made permanent in a copy.
        batch: As in ``flops``.
        before: The network before it was pruned.
        repeats: Timed runs.
        forward: As in ``flops``.

    Raises:
        InvalidInput: A model cannot be called on the batch, is no module, or has parameters without values.
        InvalidTolerance: ``repeats`` is not a whole number above 0.
        EmptyCalibration, NonFinite: No sample, or NaN or infinity in the batch or a weight.
        UnsupportedModule: The model has masks of ``torch.nn.utils.prune``, or as in ``make_permanent_``.
    """
    runs = checked_count("repeats", repeats)
    checked, models = as_batches([batch])[0], [permanent(one) for one in (model, before) if one is not None]
    timed, skipped = _layers(models[0], checked, runs, forward)
    data = next(models[0].parameters(), torch.empty(0))
    with ExitStack() as stack:
        for one in models:
            stack.enter_context(evaluating(one))
        whole = seconds(
            [partial(call_model, one, copy_for(one, checked), forward) for one in models], runs, data.device
        )
    return Latency(
        layers=tuple(timed),
        skipped=tuple(skipped),
        model=whole[0],
        before=whole[1] if before is not None else None,
        samples=samples_of(checked),
        repeats=runs,
        provenance=environment(data),
    )


def _layers(
    model: nn.Module, batch: Any, repeats: int, forward: Forward | None
) -> tuple[list[LayerLatency], list[SkippedModule]]:
    """The times of each layer that can be compared, and the other modules with weights, each with the reason."""
    weighted = {
        name: module
        for name, module in model.named_modules()
        if any(own.dim() >= 2 for own in module.parameters(recurse=False))
    }
    reasons = {name: not_compared(module) for name, module in weighted.items()}
    seen = capture(model, [batch], [name for name, reason in reasons.items() if reason is None], forward=forward).layers
    found = {name: reason or _UNCALLED for name, reason in reasons.items()} | {
        name: layer_latency(name, weighted[name], layer.inputs[0], repeats) for name, layer in seen.items()
    }
    skipped = [
        SkippedModule(name, type(weighted[name]).__name__, why) for name, why in found.items() if isinstance(why, str)
    ]
    return [row for row in found.values() if isinstance(row, LayerLatency)], skipped


def _pace(what: str, product: str, now: float, before: float, than: str) -> str:
    ratio = now / before
    outcome = "no faster" if ratio > 1 - _SCATTER else "faster"
    return f"{what}: {outcome}, {product} takes {ratio:.2f} times {than} ({1e3 * now:.3f} ms, {1e3 * before:.3f} ms)."
