"""Passes over the calibration data: what follows each layer, then each layer's inputs, one layer at a time.

``capture`` keeps what all layers saw at once. Here a pass keeps nothing (``observe``), or hands out what one layer
receives, batch by batch, and leaves the forward as soon as that layer is done (``received``): memory is what the
caller keeps, time is a forward up to the layer.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.calibration import samples_of
from convexprune.following import Followed, followed
from convexprune.forwards import Forward, evaluating, outputs_of, run_model
from convexprune.solvers.arrays import norm, working_dtype
from convexprune.solvers.errors import InvalidInput
from convexprune.taps import Received, Tap, check_received, tapped

__all__ = ["Observation", "Observed", "observe", "received"]


@dataclass(frozen=True)
class Observed:
    """What a pass tells of one layer.

    Attributes:
        follows: What the first batch shows of it.
        calls: How often a forward calls it; None where batches differ in that.
    """

    follows: Followed
    calls: int | None


@dataclass(frozen=True)
class Observation:
    """What a pass tells.

    Attributes:
        layers: In the order of their first calls.
        samples: How many.
        size: ‖f(x)‖_F, of all outputs of all samples.
    """

    layers: Mapping[str, Observed]
    samples: int
    size: float


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    taps: Mapping[str, Sequence[Tap]],
    *,
    forward: Forward | None = None,
    see: Callable[[str, Received], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Observation:
    """One pass over all batches in eval mode, which keeps nothing.

    Args:
        model: The network; left as found.
        batches: Checked batches.
        taps: For each layer where its inputs are received: several where modules share its weight.
        forward: As for ``capture``.
        see: Called with a layer's name and each raw input that it receives.
        progress: Called with the number of batches done.

    Raises:
        InvalidInput: The model cannot be called on a batch, or gives other outputs when called again.
        NonFinite: NaN or infinity reaches a layer.
    """
    calls: dict[str, list[int]] = {}
    follows: dict[str, Followed] = {}
    sizes: list[float] = []
    samples = number = 0

    def count(name: str, inputs: Received) -> None:
        check_received(name, inputs)
        calls.setdefault(name, [0] * number)[-1] += 1
        if see is not None:
            see(name, inputs)

    with evaluating(model):
        for batch in batches:
            if not number:
                follows, first = followed(model, batch, taps, forward)
            number += 1
            for counts in calls.values():
                counts.append(0)
            with tapped(taps, count):
                outputs = outputs_of(run_model(model, batch, forward))
            if number == 1:
                _check_repeated(outputs_of(first), outputs)
            sizes.append(float(norm(outputs.to(working_dtype(outputs.dtype)))))
            samples += samples_of(batch)
            if progress is not None:
                progress(number)
    found = {
        name: Observed(follows.get(name, Followed()), counts[0] if len(set(counts)) == 1 else None)
        for name, counts in calls.items()
    }
    return Observation(found, samples, math.hypot(*sizes))


def received(
    model: nn.Module,
    batch: Any,
    taps: Sequence[Tap],
    calls: int | None,
    forward: Forward | None = None,
) -> list[Received]:
    """What the layer's modules receive from one batch, call after call; the model must be in eval mode.

    Args:
        model: The network as it is now.
        batch: A checked batch.
        taps: Of one layer.
        calls: How many calls there are; the forward is left at the last one. None: not known.
        forward: As for ``capture``.
    """
    inputs: list[Received] = []

    def keep(_: str, tensors: Received) -> None:
        last = len(inputs) + 1 == calls
        # A copy unless nothing can change it any more: later operations may work in place.
        inputs.append(tensors if last else _copied(tensors))
        if last:
            raise _Enough

    try:
        with tapped({"": taps}, keep):
            run_model(model, batch, forward)
    except _Enough:
        pass
    return inputs


def _check_repeated(one: Tensor, other: Tensor) -> None:
    """Layers are captured one by one, so each forward must compute what the one before did, up to rounding."""
    apart = float(norm(one - other)) / (float(norm(one)) or 1.0) if one.shape == other.shape else math.inf
    if apart > math.sqrt(torch.finfo(one.dtype).eps):
        raise InvalidInput(
            f"the model's outputs for one batch differ by {apart:.2g} of their size from call to call, in eval mode: "
            "make what is random fixed, as by forward=lambda model, batch: (torch.manual_seed(0), model(batch))[1]"
        )


class _Enough(BaseException):
    """All calls were seen; no handler for errors in the model's forward is meant to catch this."""


def _copied(received: Received) -> Received:
    """What later operations in place cannot change."""
    if isinstance(received, Tensor):
        return received.detach().clone()
    return tuple(tensor.detach().clone() for tensor in received)
