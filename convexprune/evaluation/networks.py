"""The networks of an evaluation: how each is run, and what it answers to a batch."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convexprune.evaluation.inputs import are_classes, image_in, with_tensor
from convexprune.evaluation.measures import Predictions
from convexprune.layers.memory import Batch, samples_at, samples_of
from convexprune.network.calibration import fitted
from convexprune.network.forwards import Forward, run_model
from convexprune.runs.data import logits_of
from convexprune.solvers.errors import InvalidInput, NonFinite, ShapeMismatch

Metric = Callable[[Batch, Tensor], Tensor]
"""Called with what a model returns for a batch, and the batch's labels: a figure for each sample [n], the more the
better."""

_EXAMPLE = 8  # samples on which layouts are compared


@dataclass(frozen=True, eq=False)
class Answer:
    """What a network answers to n samples.

    Attributes:
        shape: Of its outputs.
        said: Its predictions; None where its outputs, or the labels, are no classes.
        scores: The metric [n], float64 or bool; None without one.
    """

    shape: tuple[int, ...]
    said: Predictions | None
    scores: Tensor | None


@dataclass(frozen=True, eq=False)
class Network:
    """A network, and how it is called.

    Attributes:
        title: What errors call it.
        model: Itself, in eval mode.
        forward: As in ``Data``.
        channels_last: Whether images reach it with their channels side by side in memory, in which convolutions on
            a CPU take about two thirds of the time.
    """

    title: str
    model: nn.Module
    forward: Forward | None
    channels_last: bool = False

    @classmethod
    def fitted(
        cls, title: str, model: nn.Module, batch: Batch, forward: Forward | None
    ) -> "tuple[Network, tuple[str, ...]]":
        """That of a model, for batches such as this one; and what is thereby done to these, as sentences.

        Raises:
            InvalidInput: The model cannot be called on the batch.
        """
        forward, notices = fitted(model, [batch], forward)
        return cls(title, model, forward, _gains(model, batch, forward)), notices

    def outputs(self, batch: Batch) -> Batch:
        """What the model returns for a batch; it is left as found."""
        image = image_in(batch) if self.channels_last else None
        if image is not None:
            batch = with_tensor(batch, image, image.contiguous(memory_format=torch.channels_last))
        return run_model(self.model, batch, self.forward)

    def answer(self, batch: Batch, labels: Tensor | None, metric: Metric | None, where: str) -> Answer:
        """What the network answers to a batch of the distribution called ``where``.

        Raises:
            NonFinite: NaN or infinity is among its outputs, or its figures by the metric.
            ShapeMismatch: There are not as many outputs, or figures, as samples.
            InvalidInput: Without a metric, outputs that are no classes; or labels that are none of these.
        """
        outputs = self.outputs(batch)
        logits, count = logits_of(outputs), samples_of(batch)
        if not bool(logits.isfinite().all()):
            raise NonFinite(
                f"{self.title}: NaN or infinity in the outputs on {where!r}: expected finite ones; look at its weights"
            )
        if not logits.dim() or len(logits) != count:
            raise ShapeMismatch(
                f"{self.title}: expected outputs of {count} samples, found {list(logits.shape)}; give forward=, a "
                "function that returns [samples, classes]"
            )
        scores = None if metric is None or labels is None else self._scores(metric, outputs, labels.to(logits.device))
        classifies = logits.dim() == 2 and logits.shape[1] > 1 and (labels is None or are_classes(labels))
        if classifies:
            _check_classes(labels, logits.shape[1])
        elif scores is None:
            found = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
            raise InvalidInput(
                f"{self.title}: expected outputs [samples, classes], of two classes at least, and labels that are "
                f"whole numbers, one a sample; found outputs {list(logits.shape)} and labels {found}: give metric="
            )
        return Answer(tuple(logits.shape), Predictions.of(logits) if classifies else None, scores)

    def _scores(self, metric: Metric, outputs: Batch, labels: Tensor) -> Tensor:
        """The metric of each sample."""
        found = metric(outputs, labels)
        if not isinstance(found, Tensor) or found.shape != labels.shape[:1]:
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeMismatch(f"metric: expected a tensor [{len(labels)}], a figure for each sample, found {what}")
        found = found.detach().cpu()
        if not bool(found.isfinite().all()):
            raise NonFinite(f"metric: NaN or infinity among the figures of {self.title}: expected finite numbers")
        return found if found.dtype == torch.bool else found.double()


def _gains(model: nn.Module, batch: Batch, forward: Forward | None) -> bool:
    """Whether it convolves images on a CPU, and gives the same in either layout: what a ``view`` expects may differ."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    if image_in(batch) is None or not any(layer.weight.device.type == "cpu" for layer in convolutions):
        return False
    few = samples_at(batch, slice(_EXAMPLE))
    with suppress(InvalidInput, RuntimeError):  # of a forward of the caller's, too
        one, other = (logits_of(Network("", model, forward, last).outputs(few)) for last in (False, True))
        return torch.allclose(one, other, rtol=1e-3, atol=1e-5)
    return False


def _check_classes(labels: Tensor | None, classes: int) -> None:
    """Raise InvalidInput unless labels are from 0 to classes − 1."""
    if labels is None or not len(labels):
        return
    low, high = (int(end) for end in torch.aminmax(labels))
    if low < 0 or high >= classes:
        raise InvalidInput(
            f"labels: expected whole numbers from 0 to {classes - 1}, for {classes} outputs, found {low} to {high}"
        )
