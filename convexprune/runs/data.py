"""What a model is run on: calibration data, and how the model is called on them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from convexprune.layers.memory import Batch, samples_of, tensors_in
from convexprune.network.calibration import Calibration
from convexprune.network.forwards import Forward
from convexprune.network.padding import Mask
from convexprune.options import OWN, plain
from convexprune.solvers.errors import InvalidInput, NonFinite, ShapeMismatch

Loss = Callable[[Batch, Tensor], Tensor]
"""Called with what the model returns for a batch, and the batch's labels: the mean of the samples' losses, a number."""

_UNLABELLED = (
    "data: expected labels, and found none: give Data(inputs, labels=…), or batches (inputs, labels), or mappings with "
    "the entry 'labels'; on the command line --labels-key"
)
_LABELS = ("labels", "label", "targets", "target", "y")  # entries of batches that are mappings


@dataclass(frozen=True, eq=False)
class Data:
    """Calibration data with all that says how to read them; ``prune_`` makes one of anything else that it is given.

    Attributes:
        inputs: A tensor or array [samples, ...], or an iterable of batches (tensor, tuple of positional arguments, or
            mapping of keyword arguments), which is gone through once a layer and need not fit into memory.
        batch_size: Samples at a time where ``inputs`` is one tensor.
        mask: Which positions of a batch count, where some are padding: the key of batches that are mappings, or a
            function of the batch; either gives 1 where a position counts and 0 where not, [samples, positions]. What
            is hidden is left out of programs, errors and bounds. None: "attention_mask", a decoder's, and torch's own
            "src_key_padding_mask" and the like, where batches have them; False: all positions count.
        forward: Called as ``forward(model, batch)`` in place of ``model(batch)``.
        holdout: Inputs that nothing is fitted to. The network's error on them is reported, and kept within
            ``NetworkEps`` where that is measured.
        labels: Of ``inputs``, one a sample: of a classifier whole numbers. Methods that look at a loss need them; None:
            the last part of batches that are tuples, or the entry "labels" of mappings. To "corenet" they say that
            ``inputs`` are training data, and it reports what its theory, and the size of the pruned network, say of
            errors on new data.
        loss: Called as ``loss(outputs, labels)`` with what the model returns for a batch, the mean of its samples'
            losses; None: the cross-entropy of the outputs, or of their ``logits``.
    """

    inputs: object
    batch_size: int = 256
    mask: Mask = None
    forward: Forward | None = None
    holdout: object = None
    labels: object = None
    loss: Loss | None = None

    def __post_init__(self) -> None:
        if isinstance(self.inputs, Iterator):  # which can be gone through only once
            object.__setattr__(self, "inputs", list(self.inputs))

    def calibration(self) -> Calibration:
        """The inputs in checked batches.

        Raises:
            InvalidInput, InvalidTolerance: As ``Calibration``; or a forward or a loss that is no function.
        """
        for name, given in (("forward", self.forward), ("loss", self.loss)):
            if given is not None and not callable(given):
                raise InvalidInput(f"{name}: expected a function, found {given!r}")
        return Calibration(self.inputs, self.batch_size, self.mask)

    def held_out(self) -> Calibration | None:
        """What is held out, likewise."""
        return None if self.holdout is None else Calibration(self.holdout, self.batch_size, self.mask)

    def truth(self) -> Tensor | None:
        """The labels as a tensor.

        Raises:
            InvalidInput: They are none.
        """
        if self.labels is None or isinstance(self.labels, Tensor):
            return self.labels
        try:
            return torch.tensor(self.labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInput(
                f"labels: expected whole numbers, one a sample, found {type(self.labels).__name__}"
            ) from error

    def labelled(self) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch with its labels, whose first axis runs over its samples.

        Raises:
            InvalidInput: There are no labels. ShapeMismatch: There are not as many as samples. NonFinite: They hold
            NaN or infinity. And as ``calibration``.
        """
        for batch, labels in self.samples():
            if labels is None:
                raise InvalidInput(_UNLABELLED)
            yield batch, labels

    def samples(self) -> Iterator[tuple[Batch, Tensor | None]]:
        """Each batch with its labels, as ``labelled``; with None where there are none."""
        truth, start = self.truth(), 0
        if truth is not None and isinstance(self.inputs, Tensor | np.ndarray):
            _check(truth, len(self.inputs))
        for batch in self.calibration():
            count = samples_of(batch)
            labels = _labels_in(batch) if truth is None else truth[start : start + count]
            if labels is not None:
                _check(labels, count)
            start += count
            yield batch, labels
        if truth is not None:
            _check(truth, start)

    def shuffled(self, seed: int) -> Iterator[tuple[Batch, Tensor]]:
        """Labelled batches for an epoch of training: of one tensor in random order, else those given, in their order.

        A last batch of fewer samples is left out, unless it is the only one. It raises what ``labelled`` does.
        """
        truth = self.truth()
        if truth is None or not isinstance(self.inputs, Tensor | np.ndarray):
            yield from self.labelled()
            return
        count = len(self.inputs)
        _check(truth, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        size = min(self.batch_size, count)
        for start in range(0, count - size + 1, size):
            chosen = order[start : start + size]
            inputs = self.inputs[chosen if isinstance(self.inputs, Tensor) else chosen.numpy()]
            yield torch.as_tensor(inputs), truth[chosen]

    def loss_of(self, outputs: Batch, labels: Tensor) -> Tensor:
        """The mean loss of a batch's outputs.

        Raises:
            InvalidInput: It is no number, or has no gradient where there is to be one; or the cross-entropy is not
            defined for such outputs and labels.
        """
        if self.loss is None:
            return cross_entropy(outputs, labels)
        device = next((tensor.device for tensor in tensors_in(outputs)), labels.device)
        found = self.loss(outputs, labels.to(device, copy=True))  # inference tensors could not be used with autograd
        if not isinstance(found, Tensor) or found.numel() != 1:
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InvalidInput(f"loss: expected a tensor with one number, the mean over the samples, found {what}")
        if torch.is_grad_enabled() and not found.requires_grad:
            raise InvalidInput("loss: expected a function of the model's outputs, and found no gradient by them")
        return found.reshape(())

    def to_dict(self) -> dict[str, object]:
        """How the data are read, as plain data."""
        own: dict[str, object] = {"batch_size": self.batch_size, "mask": OWN if callable(self.mask) else self.mask}
        return own if self.loss is None else own | {"loss": plain(self.loss)}


def as_data(data: object) -> Data | None:
    """The data, whether they say how to be read or not; None for none."""
    return data if data is None or isinstance(data, Data) else Data(data)


def logits_of(outputs: Batch) -> Tensor:
    """The tensor that says the classes, [samples, classes, ...]: ``logits`` if there is such an entry, or the first.

    Raises:
        InvalidInput: There is no floating-point tensor.
    """
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    found = next((t for t in chain(tensors_in(named), tensors_in(outputs)) if t.is_floating_point()), None)
    if found is None:
        raise InvalidInput("the model returned no floating-point tensor: give forward=, a function that returns one")
    return found


def cross_entropy(outputs: Batch, labels: Tensor) -> Tensor:
    """The mean cross-entropy of logits [samples, classes] with labels [samples].

    Raises:
        InvalidInput: Shapes do not fit, or labels are no classes.
    """
    logits = logits_of(outputs)
    classes = logits.shape[1] if logits.dim() > 1 else 0
    whole = not labels.is_floating_point() and labels.dim() == logits.dim() - 1
    if not whole or not classes or (len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < classes)):
        span = f"from {labels.min().item()} to {labels.max().item()}" if len(labels) else "none"
        raise InvalidInput(
            f"labels: expected a whole number from 0 to {classes - 1} a sample, outputs being {list(logits.shape)}; "
            f"found {labels.dtype} {list(labels.shape)}, {span}. For another loss give Data(…, loss=…)"
        )
    return functional.cross_entropy(logits, labels.to(logits.device, torch.int64, copy=True))


def _check(labels: Tensor, samples: int) -> None:
    """Whether there is one for each sample, and each is a number."""
    count = len(labels) if labels.dim() else "a number"
    if count != samples:
        raise ShapeMismatch(f"labels: expected one for each of the {samples} samples, found {count}")
    if not bool(labels.isfinite().all()):
        raise NonFinite("labels: they hold NaN or infinity; leave those samples out")


def _labels_in(batch: Batch) -> Tensor | None:
    """Those that a batch holds, if it does."""
    found: object = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _LABELS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[-1]
    return found if isinstance(found, Tensor) and found.dim() else None
