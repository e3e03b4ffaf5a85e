"""What pruning did to the network as a whole: the error of its outputs, and the bound on it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from convexprune.bounds import OutputBound, PrunedLayer, output_bound
from convexprune.capture import evaluating, outputs_of, run_model
from convexprune.nettrim.run import Run
from convexprune.solvers.arrays import norm, working_dtype

__all__ = ["NetworkPromise", "bound_of", "network_error", "network_promise", "radii_of"]


@dataclass(frozen=True)
class NetworkPromise:
    """A bound on the error of the network's outputs on the calibration data, from its layers' errors.

    Attributes:
        bound: Σ c_l r_l relative to ‖f(x)‖_F; infinity if nothing is known.
        error: ‖f̂(x) − f(x)‖_F/‖f(x)‖_F as measured.
        asked: The ``network_eps`` that was asked for, or None.
        coefficients: c_l by layer.
        radii: r_l by layer: its own error, in the units of its outputs.
        reason: Why there is no bound, or None.
    """

    bound: float
    error: float
    asked: float | None
    coefficients: Mapping[str, float]
    radii: Mapping[str, float]
    reason: str | None

    @property
    def kept(self) -> bool:
        """Whether the bound is within what was asked for."""
        return self.asked is None or self.bound <= self.asked

    def __str__(self) -> str:
        if math.isinf(self.bound):
            return f"no bound on the network's error: {self.reason}"
        asked = "" if self.asked is None else f" ({self.asked:g} asked for)"
        return f"by the layers' errors and norms the network's is at most {self.bound:.4g}{asked}"


def bound_of(run: Run, norms: Mapping[str, float] | None = None) -> OutputBound:
    """How much each layer's error counts in that of the outputs, with the weights as they are now."""
    layers = [PrunedLayer(name, site.fit != "ball", site.norm_name) for name, site in run.sites.items()]
    mode = "cascade" if run.how.cascade else "parallel"
    first = next(iter(run.calibration))
    return output_bound(run.model, layers, first, mode=mode, forward=run.forward, norms=norms)


def radii_of(run: Run) -> dict[str, float]:
    """Each layer's own error ‖σ(XU) − Y‖_F; 0 of those that are as trained."""
    return {
        name: math.hypot(*(answer.error for answer in run.written[name])) if name in run.written else 0.0
        for name in run.sites
    }


def network_error(run: Run, batches: int | None = None) -> float:
    """‖f̂(x) − f(x)‖_F over the calibration data, or their first batches, one after the other."""
    wrong = []
    with evaluating(run.model):
        for batch in islice(run.calibration, batches):
            now = outputs_of(run_model(run.model, batch, run.forward))
            with run.versions.as_trained():
                before = outputs_of(run_model(run.model, batch, run.forward))
            dtype = working_dtype(now.dtype)
            wrong.append(float(norm(now.to(dtype) - before.to(dtype))))
    return math.hypot(*wrong)


def network_promise(run: Run, size: float, asked: float | None) -> NetworkPromise:
    """The bound beside the measured error."""
    found, radii, unit = bound_of(run), radii_of(run), size or 1.0
    return NetworkPromise(
        bound=found.at(radii) / unit,
        error=network_error(run) / unit,
        asked=asked,
        coefficients=dict(found.coefficients),
        radii=radii,
        reason=found.reason,
    )
