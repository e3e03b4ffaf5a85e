"""What pruning did to the network as a whole: the error of its outputs, and the bound on it."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from convexprune.bounds import OutputBound, PrunedLayer, output_bound
from convexprune.errors import PruningFailed
from convexprune.layers.memory import Batch
from convexprune.network.calibration import Calibration
from convexprune.network.forwards import evaluating, outputs_of, run_model
from convexprune.report.report import LayerReport
from convexprune.runs.run import Run
from convexprune.solvers.arrays import norm, working_dtype
from convexprune.targets import NetworkEps, Target

_SHAPES = 32
_TINY = 1e-300
_FAR = 10  # times what is measured
_TWICE = 2


def is_vacuous(bound: float, error: float) -> bool:
    """Whether a bound says nothing: above 1, an error that outputs of 0 have, and 10 times above what was measured."""
    return bound > max(1.0, _FAR * error)


@dataclass(frozen=True)
class NetworkPromise:
    """The error of the network's outputs on the calibration data, and a bound on it from its layers' errors.

    Attributes:
        bound: Σ c_l r_l relative to ‖f(x)‖_F; infinity if nothing is known.
        error: ‖f̂(x) − f(x)‖_F/‖f(x)‖_F as measured.
        allowed: The ``network_eps`` that was allowed, or None.
        guarantee: What of it is to be within what was allowed: "bound", or "measured".
        holdout_error: As ``error``, on the data that was held out; None without any.
        coefficients: c_l by layer.
        radii: r_l by layer: its own error, in the units of its outputs.
        reason: Why there is no bound, or None.
        rounding: What two forwards in the model's dtype may differ by: the bound is for exact arithmetic.
    """

    bound: float
    error: float
    allowed: float | None
    coefficients: Mapping[str, float]
    radii: Mapping[str, float]
    reason: str | None
    rounding: float
    guarantee: str = "bound"
    holdout_error: float | None = None

    @property
    def kept(self) -> bool:
        """Whether what is guaranteed is within what was allowed, and the bound above what was measured."""
        broken = math.isnan(self.error) or self.error > self.bound + self.rounding
        return not broken and (self.allowed is None or self.guaranteed <= self.allowed)

    @property
    def guaranteed(self) -> float:
        """The figure that ``allowed`` is about: the bound, or the largest error that was measured."""
        return self.bound if self.guarantee == "bound" else max(self.error, self.holdout_error or 0.0)

    @property
    def vacuous(self) -> bool:
        """Whether the bound says nothing, as ``is_vacuous`` has it."""
        return is_vacuous(self.bound, self.error)

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self) | {"vacuous": self.vacuous}

    def __str__(self) -> str:
        allowed = "" if self.allowed is None else f" ({self.allowed:g} allowed)"
        measured, bounded = ("", allowed) if self.guarantee == "bound" else (allowed, "")
        held = "" if self.holdout_error is None else f", {self.holdout_error:.4g} on held-out data"
        found = f"by the layers' errors and norms it is at most {self.bound:.4g}{', which is vacuous' * self.vacuous}"
        bound = f"no bound on it is known: {self.reason}" if math.isinf(self.bound) else found
        return f"the network's error is {self.error:.4g} as measured{held}{measured}; {bound}{bounded}"


def bound_of(run: Run, norms: Mapping[str, float] | None = None, pruned: Collection[str] | None = None) -> OutputBound:
    """How much each layer's error counts in that of the outputs, with the weights as they are now.

    In cascade a layer that is pruned makes up for those before it; one that is left as trained does not, so which are
    ``pruned`` (None: all) decides. The others' coefficients are 0.

    The most over batches of all shapes: then Σ_b (Σ_l c_lb r_lb)² ≤ (Σ_l c_l r_l)² by Minkowski's inequality.
    """

    def unknown(reason: str) -> OutputBound:
        return OutputBound(dict.fromkeys(run.layers, math.inf), {}, reason)

    if apart := [name for name, answers in run.written.items() if any(answer.original for answer in answers)]:
        return unknown(f"which rows reach {', '.join(apart)} depends on data")
    chosen = [layer for name, layer in run.layers.items() if pruned is None or name in pruned]
    layers = [PrunedLayer(layer.name, layer.fit.relu, layer.norm_name) for layer in chosen]
    known, bounds = dict(norms or {}), list[OutputBound]()
    for batch in run.shapes():
        if len(bounds) == _SHAPES:
            return unknown(f"batches come in more than {_SHAPES} shapes, and the constants depend on them")
        mode = "cascade" if run.cascade else "parallel"
        bounds.append(output_bound(run.model, layers, batch, mode=mode, forward=run.forward, norms=known))
        known |= bounds[-1].norms
        del batch  # else it would live while the next one is made
    coefficients = {name: max(bound.coefficients.get(name, 0.0) for bound in bounds) for name in run.layers}
    return OutputBound(coefficients, known, next((bound.reason for bound in bounds if bound.reason), None))


def amplified(error: float, rows: Sequence[LayerReport], mode: str | None) -> tuple[str, ...]:
    """A sentence where the network's error is not known, or more than twice that of each of its layers."""
    if math.isnan(error):
        return (
            "the network's error is not known: its outputs are not finite, or of another shape than before pruning",
        )
    largest = max((row.output_error for row in rows if not math.isnan(row.output_error)), default=math.inf)
    if not error > _TWICE * largest:
        return ()
    remedy = "ask for less" if mode == "cascade" else "mode='cascade' lets each make up for those before it"
    return (
        f"the network's error, {error:.4g}, is more than twice that of any of its layers, {largest:.4g} at most, for "
        f"errors add up from layer to layer: {remedy}",
    )


def radii_of(run: Run) -> dict[str, float]:
    """Each layer's own error ‖σ(XU) − Y‖_F; 0 of those that are as trained, and of no others."""
    return {
        name: math.hypot(*(answer.error for answer in run.written[name])) or _TINY if name in run.written else 0.0
        for name in run.layers
    }


def network_errors(run: Run) -> tuple[float, float | None]:
    """‖f̂(x) − f(x)‖_F/‖f(x)‖_F on the calibration data, NaN without any; and on what is held out, None without any."""
    error = math.nan if run.data is None else _relative_error(run, run.data)
    return error, None if run.holdout is None else _relative_error(run, run.holdout)


def _relative_error(run: Run, data: Calibration) -> float:
    """Batch after batch; NaN where the pruned network gives outputs of another shape."""
    wrong, sizes = [], []

    def outputs(batch: Batch) -> Tensor:
        counted = run.plan.counted.visible(run_model(run.model, batch, run.forward), data.masks_of(batch))
        found = outputs_of(counted)
        return found.to(working_dtype(found.dtype))

    with evaluating(run.model):
        for batch in data:
            now = outputs(batch)
            with run.versions.as_trained():
                before = outputs(batch)
            if now.shape != before.shape:
                return math.nan
            wrong.append(float(norm(now - before)))
            sizes.append(float(norm(before)))
    return math.hypot(*wrong) / (math.hypot(*sizes) or 1.0)


def network_promise(run: Run, target: Target) -> NetworkPromise:
    """The bound beside the measured error."""
    found, radii, unit = bound_of(run, pruned=run.written), radii_of(run), run.plan.size or 1.0
    allowed, guarantee = (target.value, target.guarantee) if isinstance(target, NetworkEps) else (None, "measured")
    error, held_out = network_errors(run)
    return NetworkPromise(
        bound=found.at(radii) / unit,
        error=error,
        allowed=allowed,
        coefficients=dict(found.coefficients),
        radii=radii,
        reason=found.reason,
        rounding=64 * torch.finfo(dtype_of(run)).eps,
        guarantee=guarantee,
        holdout_error=held_out,
    )


@contextmanager
def same_outputs(run: Run) -> Iterator[None]:
    """What happens inside may not change what the model gives for the first batch, if there is one, but for rounding.

    Raises:
        PruningFailed: It does, or the model cannot be called any more.
    """
    if run.data is None:
        yield
        return
    batch = next(iter(run.data))

    def outputs() -> Tensor:
        with evaluating(run.model):
            found = outputs_of(run_model(run.model, batch, run.forward))
        return found.to(torch.float64)

    before = outputs()
    yield
    why = "something besides its layers depends on their sizes, such as a hook, or takes their outputs another way"
    try:
        after = outputs()
    except Exception as error:
        raise PruningFailed(f"without these neurons the model cannot be called ({error}): {why}") from error
    moved = float(norm(after - before)) / (float(norm(before)) or 1.0) if after.shape == before.shape else math.inf
    if not moved <= math.sqrt(torch.finfo(dtype_of(run)).eps):
        raise PruningFailed(f"without these neurons the outputs move by {moved:.2g} of their size: {why}")


def dtype_of(run: Run) -> torch.dtype:
    """The coarsest of the weights that can be pruned; without any that of the model's parameters."""
    own = [W.dtype for weights in run.trained.values() for W in weights] or [next(run.model.parameters()).dtype]
    return max(own, key=lambda dtype: torch.finfo(dtype).eps)
