"""Passes over the calibration data: what follows each layer, each layer's inputs, and the network's outputs.

A pass keeps nothing (``observe``), or hands out what one layer receives, batch by batch, and leaves the forward as soon
as that layer is done (``received``): memory is what the caller keeps, time is a forward up to the layer.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from convexprune.layers.memory import Batch, mapped, samples_at, samples_of, tensors_in
from convexprune.network.calibration import Calibration
from convexprune.network.following import Observed, followed
from convexprune.network.forwards import Forward, copy_for, evaluating, outputs_of, run_model
from convexprune.network.padding import Counted, Mask
from convexprune.network.taps import Received, Taps, check_received, tapped
from convexprune.solvers.arrays import norm, working_dtype
from convexprune.solvers.errors import InvalidInput, NonFinite

_Marks = list[tuple[str, Tensor]]
"""Of each layer that is called, in order, then of the outputs as "", what tells them from others."""


@dataclass(frozen=True)
class Observation:
    """What a pass tells."""

    layers: Mapping[str, Observed]  # in the order of their first calls
    samples: int
    size: float  # ‖f(x)‖_F, of all outputs of all samples
    # Copies of batches, or of their first samples where these do, each with the layers that receive rows from it and
    # from none before.
    examples: tuple[tuple[Batch, tuple[str, ...]], ...]


def observe(
    model: nn.Module,
    batches: Iterable[Batch],
    taps: Taps,
    *,
    forward: Forward | None = None,
    see: Callable[[str, Received], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Observation:
    """One pass over all checked batches in eval mode, which keeps nothing; the model is left as found.

    ``see`` is called with a layer's name and each raw input that it receives, ``progress`` with the number of batches
    done; ``forward(model, batch)`` computes the outputs in another way.

    Raises:
        InvalidInput: The model cannot be called on a batch, or gives other outputs when called again.
        NonFinite: NaN or infinity reaches a layer, or is among the outputs.
    """
    calls: list[Counter[str]] = []  # of each layer, batch by batch
    reached: dict[str, int] = {}  # which batch is the first from which a layer receives rows
    follows: dict[str, Observed] = {}  # by the first batch from which a layer receives rows
    examples: list[tuple[Batch, tuple[str, ...]]] = []
    sizes, samples, marks = list[float](), 0, _Marks()

    def count(name: str, inputs: Received) -> None:
        check_received(name, inputs)
        calls[-1][name] += 1
        if _has_rows(inputs):
            reached.setdefault(name, len(calls))
        if len(calls) == 1:
            marks.append((name, _marks(inputs)))
        if see is not None:
            see(name, inputs)

    with evaluating(model):
        for batch in batches:
            calls.append(Counter())
            with tapped(taps, count):
                outputs = outputs_of(run_model(model, batch, forward))
            if not bool(outputs.isfinite().all()):
                what = "NaN or infinity in the model's outputs on the calibration data: errors of these have no size"
                raise NonFinite(f"{what}; give forward=, a function that returns finite ones")
            if len(calls) == 1:
                _check_repeated(model, batch, taps, forward, [*marks, ("", _marks(outputs))])
            if new := tuple(name for name, first in reached.items() if first == len(calls)):
                example, seen = _example(model, batch, {name: taps[name] for name in new}, forward)
                follows |= {name: seen[name] for name in new if name in seen}
                examples.append((example, new))
            sizes.append(float(norm(outputs.to(working_dtype(outputs.dtype)))))
            samples += samples_of(batch)
            if progress is not None:
                progress(len(calls))
    found = {}
    for name in dict.fromkeys(chain.from_iterable(calls)):
        times = {batch[name] for batch in calls}
        found[name] = replace(follows.get(name, Observed()), calls=times.pop() if len(times) == 1 else None)
    return Observation(found, samples, math.hypot(*sizes), tuple(examples))


_EXAMPLE = 64
"""Samples that are enough to see what a model computes."""


def _example(
    model: nn.Module, batch: Batch, taps: Taps, forward: Forward | None
) -> tuple[Batch, Mapping[str, Observed]]:
    """A copy of the batch's first samples, if all these layers receive rows from them, else of all; what it shows."""
    if samples_of(batch) > _EXAMPLE:
        part, reached = copy_for(model, samples_at(batch, slice(_EXAMPLE))), set[str]()

        def see(name: str, inputs: Received) -> None:
            reached.update({name} if _has_rows(inputs) else ())

        with suppress(Exception):  # a model that takes whole batches only
            with tapped(taps, see):  # a forward of its own: taps may run a module again, and that reads its weights
                run_model(model, part, forward)
            if len(reached) == len(taps):
                return part, followed(model, part, taps, forward)
    return copy_for(model, batch), followed(model, batch, taps, forward)


def _has_rows(inputs: Received) -> bool:
    return all(tensor.numel() for tensor in tensors_in(inputs))


def received(
    model: nn.Module, batch: Batch, taps: Taps, calls: Mapping[str, int | None], forward: Forward | None = None
) -> dict[str, list[Received]]:
    """What layers receive from a checked batch, by name, call after call; the model must be in eval mode.

    The forward is left once each layer was called as often as ``calls`` says; None if it is not known how often it is.
    """
    inputs: dict[str, list[Received]] = {name: [] for name in taps}

    def keep(name: str, tensors: Received) -> None:
        inputs[name].append(tensors)
        if all(len(seen) == calls[layer] for layer, seen in inputs.items()):
            raise _Enough
        # A copy unless nothing can change it any more: later operations may work in place.
        inputs[name][-1] = mapped(tensors, lambda tensor: tensor.detach().clone())

    with suppress(_Enough), tapped(taps, keep):
        run_model(model, batch, forward)
    return inputs


def visible_outputs(
    model: nn.Module, calibration: Calibration, counted: Counted, forward: Forward | None
) -> Iterator[Tensor]:
    """The network's outputs [samples, values] of each batch, with zeros where they do not count."""
    with evaluating(model):
        for batch in calibration:
            yield outputs_of(counted.visible(run_model(model, batch, forward), calibration.masks_of(batch)))


def network_outputs(
    model: nn.Module, batches: Batch, forward: Forward | None = None, mask: Mask = False, counted: Counted | None = None
) -> Tensor:
    """The network's outputs [samples, values], in eval mode; one column if batches differ in width.

    Half precision is returned as float32, for differences of outputs to be exact. With ``counted``, found with this
    ``mask``, outputs that are hidden are zeros.

    Raises:
        InvalidInput: The model cannot be called on a batch, or returns no floating-point tensor.
        EmptyCalibration, NonFinite: There is no sample, or a batch holds NaN or infinity.
    """
    return joined(list(visible_outputs(model, Calibration(batches, mask=mask), counted or Counted(), forward)))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The outputs of batches as one matrix, in a precision to compute in; one column if they differ in width."""
    same_width = len({part.shape[1] for part in parts}) == 1
    outputs = torch.cat([part if same_width else part.reshape(-1, 1) for part in parts])
    return outputs.to(working_dtype(outputs.dtype))


def _check_repeated(model: nn.Module, batch: Batch, taps: Taps, forward: Forward | None, before: _Marks) -> None:
    """Layers are captured one by one, so each forward must compute what the one before did, up to rounding."""
    again: _Marks = []
    with tapped(taps, lambda name, inputs: again.append((name, _marks(inputs)))):
        again.append(("", _marks(outputs_of(run_model(model, batch, forward)))))
    for (name, one), (other_name, other) in zip(before, again, strict=False):
        alike = one.shape == other.shape and bool(((one - other)[:, :2].abs().amax(1) <= one[:, 2] * one[:, 0]).all())
        if not alike or name != other_name or len(before) != len(again):
            what = f"what layer {name!r} receives" if name else "the outputs"
            raise InvalidInput(
                f"the model does not repeat: in eval mode {what} differs from call to call for one batch. Make what is "
                "random fixed, as by forward=lambda model, batch: (torch.manual_seed(0), model(batch))[1]"
            )


def _marks(received: Received) -> Tensor:
    """Of each tensor its norm, its product with a fixed vector, and the part of the norm that rounding may move."""
    found = []
    for tensor in tensors_in(received):
        entries = tensor.flatten().to(working_dtype(tensor.dtype))
        fixed = torch.linspace(-1, 1, len(entries), dtype=entries.dtype, device=entries.device)
        eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
        found.append([float(norm(entries)), float(entries @ fixed), max(4 * eps, min(eps**0.5, 1e-3))])
    return torch.tensor(found, dtype=torch.float64).reshape(-1, 3)


class _Enough(BaseException):
    """All calls were seen; no handler for errors in the model's forward is meant to catch this."""
