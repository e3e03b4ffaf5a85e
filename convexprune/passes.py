"""Passes over the calibration data: what follows each layer, then each layer's inputs, one layer at a time.

``capture`` keeps what all layers saw at once. Here a pass keeps nothing (``observe``), or hands out what one layer
receives, batch by batch, and leaves the forward as soon as that layer is done (``received``): memory is what the
caller keeps, time is a forward up to the layer.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from convexprune.calibration import samples_of
from convexprune.capture import Forward, evaluating, outputs_of, run_model
from convexprune.solvers.arrays import norm, working_dtype
from convexprune.solvers.errors import NonFinite
from convexprune.taps import Received, Tap
from convexprune.watch import Watch, summary, tensors_in

__all__ = ["Observation", "Observed", "observe", "received"]


@dataclass(frozen=True)
class Observed:
    """What a pass tells of one layer.

    Attributes:
        activation: What consumes the layer's output, or that of ``norm``: "relu" if only ReLUs do, "output" if nothing
            does, "several: relu, add" if different operations do; None where it cannot be seen.
        norm: The BatchNorm module that alone consumes the layer's output, in the form of running statistics; or None.
        calls: How often a forward calls it; None where batches differ in that.
    """

    activation: str | None
    norm: str | None
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
        InvalidInput: The model cannot be called on a batch.
        NonFinite: NaN or infinity reaches a layer.
    """
    calls: dict[str, list[int]] = {}
    follows: dict[str, tuple[str | None, str | None]] = {}
    sizes: list[float] = []
    samples = number = 0

    def count(name: str, inputs: Received) -> None:
        for tensor in tensors_in(inputs):
            if not tensor.isfinite().all():
                where = f"reaches layer {name!r}"
                raise NonFinite(f"NaN or infinity {where}: check the layers before it and the data's scale")
        calls.setdefault(name, [0] * number)[-1] += 1
        if see is not None:
            see(name, inputs)

    with evaluating(model):
        for batch in batches:
            if not number:
                follows = _followed(model, batch, taps, forward)
            number += 1
            for counts in calls.values():
                counts.append(0)
            with _tapped(taps, count):
                outputs = outputs_of(run_model(model, batch, forward))
            sizes.append(float(norm(outputs.to(working_dtype(outputs.dtype)))))
            samples += samples_of(batch)
            if progress is not None:
                progress(number)
    found = {
        name: Observed(*follows.get(name, (None, None)), counts[0] if len(set(counts)) == 1 else None)
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
        with _tapped({"": taps}, keep):
            run_model(model, batch, forward)
    except _Enough:
        pass
    return inputs


class _Enough(BaseException):
    """All calls were seen; no handler for errors in the model's forward is meant to catch this."""


def _copied(tensors: Received) -> Received:
    if isinstance(tensors, Tensor):
        return tensors.clone()
    return tuple(tensor.clone() for tensor in tensors)


@contextmanager
def _tapped(taps: Mapping[str, Sequence[Tap]], see: Callable[[str, Received], None]) -> Iterator[None]:
    """Calls ``see(name, inputs)`` after each call of a tapped module; always unhooked."""

    def hook(name: str, tap: Tap, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        see(name, tap.received(args, kwargs, output))

    with ExitStack() as stack:
        # In front of others, which may change the output; the last one registered is the first to run.
        for name, several in reversed(list(taps.items())):
            for tap in several:
                stack.enter_context(
                    tap.module.register_forward_hook(partial(hook, name, tap), prepend=True, with_kwargs=True)
                )
        yield


def _followed(
    model: nn.Module, batch: Any, taps: Mapping[str, Sequence[Tap]], forward: Forward | None
) -> dict[str, tuple[str | None, str | None]]:
    """(activation, norm) of each layer whose own module gives its outputs, from one watched forward."""
    watch = Watch()
    calls: dict[str, list[list[str]]] = {}
    behind: dict[int, tuple[str, list[str]]] = {}  # by the id of the consumers of a layer's output
    times: dict[str, int] = {}  # calls of norms

    def follow(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        consumers: list[str] = []
        calls.setdefault(name, []).append(consumers)
        for tensor in tensors_in(output):
            watch.follow(tensor, consumers)

    def pass_norm(name: str, _module: nn.Module, args: Any, output: Any) -> None:
        times[name] = times.get(name, 0) + 1
        after: list[str] = []
        for consumers in watch.followers(args[0]) if args else ():
            behind[id(consumers)] = (name, after)
        watch.follow(output, after)

    own = {name: several for name, several in taps.items() if all(tap.plain for tap in several)}
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _NORMS)}
    with ExitStack() as stack:
        for name, several in own.items():
            for tap in several:
                stack.enter_context(tap.module.register_forward_hook(partial(follow, name), prepend=True))
        for name, module in norms.items():
            stack.enter_context(module.register_forward_hook(partial(pass_norm, name), prepend=True))
        with watch:
            outputs = run_model(model, batch, forward)
    watch.note(tensors_in(outputs), "output")
    found: dict[str, tuple[str | None, str | None]] = {}
    for name, consumers in calls.items():
        behind_it, after = behind.get(id(consumers[0]), ("", []))
        alone = len(consumers) == 1 and consumers[0] == ["batch_norm"] and times.get(behind_it) == 1
        if alone and _running(norms[behind_it]):
            found[name] = (summary([after]), behind_it)
        else:
            found[name] = (summary(consumers), None)
    return found


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _running(module: nn.Module) -> bool:
    """Whether the norm is a fixed affine map in eval mode, with a shift of its own."""
    own = dict(module.named_parameters(recurse=False))
    return module.running_var is not None and set(own) == {"weight", "bias"}
