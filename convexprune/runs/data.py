"""What a model is run on: calibration data, and how the model is called on them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.network.calibration import Calibration
from convexprune.network.forwards import Forward
from convexprune.network.padding import Mask
from convexprune.options import OWN
from convexprune.solvers.errors import InvalidInput


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
        labels: Of ``inputs``, if these are training data of a classifier, whole numbers, one a sample: "corenet" then
            reports what its theory, and the size of the pruned network, say of errors on new data.
    """

    inputs: object
    batch_size: int = 256
    mask: Mask = None
    forward: Forward | None = None
    holdout: object = None
    labels: object = None

    def calibration(self) -> Calibration:
        """The inputs in checked batches.

        Raises:
            InvalidInput, InvalidTolerance: As ``Calibration``; or a forward that is no function.
        """
        if self.forward is not None and not callable(self.forward):
            raise InvalidInput(f"forward: expected a function, found {self.forward!r}")
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

    def to_dict(self) -> dict[str, object]:
        """How the data are read, as plain data."""
        return {"batch_size": self.batch_size, "mask": OWN if callable(self.mask) else self.mask}


def as_data(data: object) -> Data | None:
    """The data, whether they say how to be read or not; None for none."""
    return data if data is None or isinstance(data, Data) else Data(data)
