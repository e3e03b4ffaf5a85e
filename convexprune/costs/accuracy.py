"""What a model is worth."""

from typing import Any

from torch import Tensor, nn

from convexprune.network.calibration import as_batches, samples_of
from convexprune.network.capture import network_outputs
from convexprune.solvers.errors import ShapeMismatch


def accuracy(model: nn.Module, x: Any, y: Tensor, batch_size: int = 1000) -> float:
    """The fraction of samples whose largest output is at their label, in eval mode.

    Args:
        model: The network; left as found.
        x: Inputs [samples, ...], or batches of them.
        y: Labels [samples], whole numbers.
        batch_size: Samples at a time.

    Raises:
        ShapeMismatch: x and y differ in length.
        EmptyCalibration, NonFinite: No sample, or NaN or infinity in x.
    """
    batches = as_batches(x, batch_size)
    samples = sum(map(samples_of, batches))
    if samples != len(y) or y.ndim != 1:
        raise ShapeMismatch(f"accuracy needs one label a sample: found {samples} samples and labels {list(y.shape)}")
    outputs = network_outputs(model, batches)
    return float((outputs.argmax(1) == y.to(outputs.device)).double().mean())
