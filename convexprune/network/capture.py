"""What a network computes on calibration data: its outputs, the inputs of its layers, and what follows each layer."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from convexprune.layers import input_matrices
from convexprune.network.calibration import Calibration
from convexprune.network.following import followed
from convexprune.network.forwards import Forward, evaluating, outputs_of, run_model
from convexprune.network.memory import Batch, samples_of, tensors_in
from convexprune.network.padding import Counted, Mask, Masks, rows_that_count
from convexprune.network.passes import joined, network_outputs  # noqa: F401 - known by this name, too
from convexprune.network.sightings import counted_rows
from convexprune.network.taps import Received, Taps, Trial, check_received, read_beyond_relu, tap, tapped
from convexprune.solvers.arrays import norm


@dataclass(frozen=True, eq=False)
class LayerCapture:
    """What one layer saw.

    ``inputs`` holds the module's raw input tensor of each call (of attention the query), batch after batch. Their sizes
    may differ; ``input_matrices`` of each, concatenated, is X. ``activation`` is that of ``Followed``, or None if the
    first batch did not reach the layer; where "relu" is not all that the model's outputs show to be read, it is
    "several: relu, unseen". What else TorchScript functions consume is not seen. ``counts`` are, for each call and each
    group, the rows that a mask lets count, Boolean; None for all, and nothing where no mask was asked for.
    """

    inputs: tuple[Tensor, ...]
    activation: str | None
    counts: tuple[Sequence[Tensor | None], ...] = ()

    def matrices(self, layer: nn.Module) -> list[tuple[Tensor, ...]]:
        """X of each group, call after call, of the rows that count."""
        every = self.counts or [()] * len(self.inputs)
        return [
            rows_that_count(input_matrices(layer, raw), counts) for raw, counts in zip(self.inputs, every, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Capture:
    """The layers by qualified name, the network's outputs, the sample count.

    Layers are in the order of their first calls; one that was never called is absent. Of outputs that a mask hides
    zeros are kept.
    """

    layers: dict[str, LayerCapture]
    outputs: Tensor
    samples: int
    counted: Counted = field(default_factory=Counted)

    def error(self, outputs: Tensor) -> float:
        """‖f̂(x) − f(x)‖_F/‖f(x)‖_F for outputs f̂(x) of the network now; not relative where f(x) is 0."""
        return float(norm(outputs - self.outputs)) / (float(norm(self.outputs)) or 1.0)


def capture(
    model: nn.Module,
    batches: Batch,
    names: Iterable[str],
    *,
    forward: Forward | None = None,
    progress: Callable[[int, int], None] | None = None,
    mask: Mask = False,
) -> Capture:
    """Run the model in eval mode on every batch and record the inputs of the named layers.

    The model is left as found: hooks, training flags, gradients. The first batch is run once more, to see what follows
    each layer, and five times where that are ReLUs, to see that nothing else does. Inputs are copies, on the device
    where the layer received them.

    Args:
        model: the network.
        batches: what ``as_batches`` takes. A mapping is passed as ``model(**batch)``, a tuple or list as
            ``model(*batch)``, anything else as ``model(batch)``.
        names: qualified names of modules, as in ``model.named_modules()``.
        forward: computes the outputs in another way, called as ``forward(model, batch)``.
        progress: called as ``progress(done, total)`` after each batch.
        mask: which positions count, as for ``prune_``; by default all.

    Raises:
        InvalidInput: no module has the name, or the model cannot be called on a batch.
        EmptyCalibration: there is no sample.
        NonFinite: a batch, or what reaches a layer, holds NaN or infinity.
    """
    data = Calibration(batches, mask=mask)
    listed = list(data)
    taps = {name: (tap(model, name),) for name in names}
    counted = counted_rows(model, data, taps, forward)
    inputs: dict[str, list[Tensor]] = {}
    counts: dict[str, list[Sequence[Tensor | None]]] = {}
    outputs = []

    def keep(masks: Masks, name: str, received: Received) -> None:
        check_received(name, received)
        # Always a copy: an in-place operation (ReLU(inplace=True), +=) may change it later, and nothing tells now.
        inputs.setdefault(name, []).append(next(tensors_in(received)).detach().clone())
        counts.setdefault(name, []).append(counted.rows(name, model.get_submodule(name), received, masks))

    with evaluating(model):
        activations = _activations(model, listed[0], taps, forward)
        for done, batch in enumerate(listed, start=1):
            masks = data.masks_of(batch)
            with tapped(taps, partial(keep, masks)):
                outputs.append(outputs_of(counted.visible(run_model(model, batch, forward), masks)))
            if progress is not None:
                progress(done, len(listed))
    seen = {
        name: LayerCapture(tuple(kept), activations.get(name), tuple(counts[name])) for name, kept in inputs.items()
    }
    return Capture(seen, joined(outputs), sum(map(samples_of, listed)), counted)


def _activations(model: nn.Module, batch: Batch, taps: Taps, forward: Forward | None) -> dict[str, str | None]:
    """What follows each layer; a ReLU only where nothing else reads what is before it."""
    follows = followed(model, batch, taps, forward)
    found = {name: one.activation for name, one in follows.items()}
    relus = {name: taps[name] for name, activation in found.items() if activation == "relu"}
    if not relus:
        return found
    trial = Trial(model, batch, forward)
    trial.settle([], lambda _names: nullcontext())
    return found | dict.fromkeys(read_beyond_relu(trial, relus), "several: relu, unseen")
