"""Operations of a forward, and what would be left of them if zeros were skipped."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from convexprune.costs.shared import against, checked_tensor, density, permanent
from convexprune.network.calibration import as_batches, samples_of
from convexprune.network.forwards import Forward, evaluating, run_model
from convexprune.network.memory import Holders
from convexprune.network.watch import tensors_in


@dataclass(frozen=True)
class WeightFlops:
    """Floating-point operations of the products with one weight; a multiplication and its addition are two.

    Attributes:
        name: Qualified name of the parameter.
        density: The part of the weight's entries that are not zero.
        dense: Operations of the dense products.
        remaining: What is left of them if zeros of the weight were skipped.
    """

    name: str
    density: float
    dense: int
    remaining: int


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward on a batch, as ``torch.utils.flop_counter`` counts them.

    Attributes:
        weights: A row for each weight that takes part in a matrix product or a convolution.
        other: Operations of products without weights, as in attention; no zero is skipped there.
        samples: Of the batch.
    """

    weights: tuple[WeightFlops, ...]
    other: int
    samples: int

    @property
    def dense(self) -> int:
        """Of the forward as it is."""
        return sum(row.dense for row in self.weights) + self.other

    @property
    def remaining(self) -> int:
        """Of a forward that skips zero weights."""
        return sum(row.remaining for row in self.weights) + self.other

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the totals."""
        return asdict(self) | {"dense": self.dense, "remaining": self.remaining}

    def verdict(self, before: "Flops | None" = None) -> str:
        """What is left to compute, in a sentence or two; with the model before, what pruning removed.

        Args:
            before: The same of the model before it was pruned, on the same batch.
        """
        part = self.remaining / max(self.dense, 1)
        text = f"{self.remaining:,} of {self.dense:,} operations ({100 * part:.0f} %) remain where zeros are skipped"
        text += "; plain torch does them all." if part < 1 else ": there are no zeros to skip."
        if before is None:
            return text
        return f"{text} Against the model before, {against('it', self.dense, before.dense, 'operations')}."


def flops(model: nn.Module, batch: Any, *, forward: Forward | None = None) -> Flops:
    """Count the operations of one forward in eval mode, and those that zeros of the weights would save.

    What ``FlopCounterMode`` does not know, such as elementwise operations and recurrent kernels, is not counted; a
    weight that the forward itself casts or computes counts as dense, in ``other``. The model is left as found.

    Args:
        model: The network, masked or not.
        batch: One batch: a tensor [samples, ...], a tuple of positional or a mapping of keyword arguments.
        forward: Called as ``forward(model, batch)`` in place of ``model(batch)``.

    Raises:
        InvalidInput: The model cannot be called on the batch, is no module, or its parameters are not dense tensors
            with values.
        EmptyCalibration, NonFinite: The batch holds no sample, or NaN or infinity.
        UnsupportedModule: The model has masks of ``torch.nn.utils.prune``, or as in ``make_permanent_``.
    """
    model, checked = permanent(model), as_batches([batch])[0]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # of the fused kernels of attention not all are counted
        counter = stack.enter_context(FlopCounterMode(display=False))
        products = stack.enter_context(_Products(model, counter))
        run_model(model, checked, forward)
    rows = tuple(
        WeightFlops(name, density(model.get_parameter(name)), dense, remaining)
        for name, (dense, remaining) in products.found.items()
    )
    return Flops(rows, counter.get_total_flops() - sum(row.dense for row in rows), samples_of(checked))


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells which weight each counted operation multiplies by, whatever module or function calls it."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter
        tensors = {name: checked_tensor(name, own) for name, own in model.named_parameters()}
        self.holders = Holders((own, name) for name, own in tensors.items() if own.dim() >= 2)
        self.found: dict[str, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        count = self.counter.get_total_flops() - before
        if count:
            self._attribute(count, tensors_in(args))
        return result

    def _attribute(self, count: int, operands: Any) -> None:
        for operand in operands:
            name = next(iter(self.holders.of(operand)), None)
            if name is not None:  # the operand is a part of it where projections are packed
                dense, remaining = self.found.get(name, (0, 0))
                part = int(operand.count_nonzero()) * count // max(operand.numel(), 1)
                self.found[name] = (dense + count, remaining + part)
                return
