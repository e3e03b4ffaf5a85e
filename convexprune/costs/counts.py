"""What is counted of a model: bytes in each format, operations of a forward, and samples that it classifies rightly."""

import copy
import gzip
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from convexprune.errors import UnsupportedModule
from convexprune.files.weights import safetensors_bytes
from convexprune.layers.memory import Holders, place_of, samples_of, tensors_in
from convexprune.masks import kept_masks, make_permanent_
from convexprune.network.calibration import as_batches
from convexprune.network.forwards import Forward, check_module, evaluating, run_model
from convexprune.network.passes import network_outputs
from convexprune.solvers.errors import InvalidInput, ShapeMismatch


@dataclass(frozen=True)
class Costs:
    """What was measured, row by row, and totals of the rows."""

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class WeightStorage:
    """Bytes of one weight, as a matrix with a row an output, in each format.

    ``csr`` holds the nonzeros, the column of each, and where each row begins. ``two_four``, torch's semi-structured
    format, holds the two kept values of four, and 2 bits for the place of each; it is None unless at most two of any
    four neighbours along the inputs (dimension 1) are not zero.
    """

    name: str  # its key in the state dict
    shape: tuple[int, ...]
    nonzeros: int
    dense: int
    csr: int
    two_four: int | None


@dataclass(frozen=True)
class Storage(Costs):
    """Bytes of a model: a row for each tensor with two axes or more, once if modules share it, and ``other`` tensors.

    ``file`` is the size of a safetensors file with all tensors, ``gzip`` that of the same compressed, if it was.
    ``entries`` to ``two_four`` are of all weights; ``two_four`` counts those that do not have the pattern as dense, and
    is None if none has it.
    """

    weights: tuple[WeightStorage, ...]
    index_bits: int  # of an index in CSR
    other: int
    file: int
    gzip: int | None
    entries: int = field(init=False)
    nonzeros: int = field(init=False)
    dense: int = field(init=False)
    csr: int = field(init=False)
    two_four: int | None = field(init=False)

    def __post_init__(self) -> None:
        rows = self.weights
        fits = any(row.two_four is not None for row in rows)
        vars(self).update(
            entries=sum(torch.Size(row.shape).numel() for row in rows),
            nonzeros=sum(row.nonzeros for row in rows),
            dense=sum(row.dense for row in rows),
            csr=sum(row.csr for row in rows),
            two_four=sum(row.dense if row.two_four is None else row.two_four for row in rows) if fits else None,
        )

    def verdict(self, before: "Storage | None" = None) -> str:
        """What the zeros save, in a sentence or two; with the storage of the model before pruning, what that saved."""
        kept = self.nonzeros / max(self.entries, 1)
        formats = {f"CSR with {self.index_bits}-bit indices": self.csr, "2:4": self.two_four}
        sizes = _against({name: (size, self.dense) for name, size in formats.items()})
        counted = f"{self.nonzeros:,} of {self.entries:,} weights ({100 * kept:.0f} %) are not zero"
        text = f"{counted}; against {self.dense:,} bytes for the dense ones, {sizes}."
        if before is None:
            return text
        files = {"the file": (self.file, before.file), "compressed by gzip it": (self.gzip, before.gzip)}
        return f"{text} Against the model before, {_against(files)}."


def storage(
    model: nn.Module | Mapping[str, Tensor], *, index_dtype: torch.dtype = torch.int32, compress: bool = True
) -> Storage:
    """Count the bytes of a model's tensors in each format; of masked weights, those that ``make_permanent_`` leaves.

    Args:
        model: A module, left as it is, or a state dict.
        index_dtype: Of CSR indices: int32, or int64 as torch makes them itself.
        compress: Whether the file is also compressed by gzip, which takes about 3 s for 100 MB.

    Raises:
        InvalidInput: Neither a module nor a state dict of dense tensors with values, or another index dtype.
        UnsupportedModule: The model has masks of ``torch.nn.utils.prune``, or as in ``make_permanent_``.
    """
    if index_dtype not in (torch.int32, torch.int64):
        raise InvalidInput(f"index_dtype: expected torch.int32 or torch.int64, found {index_dtype}")
    found: dict[object, tuple[str, Tensor]] = {}  # a tensor under several names (tied weights) once, under the first
    for name, value in (model if isinstance(model, Mapping) else permanent(model).state_dict()).items():
        tensor = _checked_tensor(name, value)
        found.setdefault(place_of(tensor) if tensor.numel() else name, (name, tensor))
    tensors = dict(found.values())
    contiguous = torch.contiguous_format
    file = safetensors_bytes({name: own.cpu().clone(memory_format=contiguous) for name, own in tensors.items()})
    return Storage(
        weights=tuple(_weight_storage(name, value, index_dtype) for name, value in tensors.items() if value.dim() >= 2),
        index_bits=8 * index_dtype.itemsize,
        other=sum(value.nbytes for value in tensors.values() if value.dim() < 2),
        file=len(file),
        gzip=len(gzip.compress(file)) if compress else None,
    )


def _weight_storage(name: str, weight: Tensor, index_dtype: torch.dtype) -> WeightStorage:
    entries, nonzeros, size = weight.numel(), int(weight.count_nonzero()), weight.element_size()
    csr = nonzeros * size + (nonzeros + len(weight) + 1) * index_dtype.itemsize
    groups = weight.movedim(1, -1).reshape(-1, 4) if entries and weight.shape[1] % 4 == 0 else None
    fits = groups is not None and bool((groups.count_nonzero(dim=1) <= 2).all())
    two_four = entries * size // 2 + -(-entries // 8) if fits else None
    return WeightStorage(name, tuple(weight.shape), nonzeros, entries * size, csr, two_four)


@dataclass(frozen=True)
class WeightFlops:
    """Floating-point operations of the products with one weight; a multiplication and its addition are two.

    ``dense`` counts all of them, ``remaining`` those that would be left if zeros of the weight were skipped.
    """

    name: str  # of the parameter
    density: float  # the part of the weight's entries that are not zero
    dense: int
    remaining: int


@dataclass(frozen=True)
class Flops(Costs):
    """Floating-point operations of one forward on a batch, as ``torch.utils.flop_counter`` counts them.

    There is a row for each weight in a matrix product or a convolution. ``other`` products, such as those in attention,
    have no weights, and no zero is skipped there. ``dense`` is of the forward as it is, ``remaining`` of one that skips
    zero weights.
    """

    weights: tuple[WeightFlops, ...]
    other: int
    samples: int
    dense: int = field(init=False)
    remaining: int = field(init=False)

    def __post_init__(self) -> None:
        dense, remaining = (sum(row.dense for row in self.weights), sum(row.remaining for row in self.weights))
        vars(self).update(dense=dense + self.other, remaining=remaining + self.other)

    def verdict(self, before: "Flops | None" = None) -> str:
        """What is left to compute, in a sentence or two; with the same of the model before, what pruning removed."""
        part = self.remaining / max(self.dense, 1)
        text = f"{self.remaining:,} of {self.dense:,} operations ({100 * part:.0f} %) remain where zeros are skipped"
        text += "; plain torch does them all." if part < 1 else ": there are no zeros to skip."
        if before is None:
            return text
        return f"{text} Against the model before, {_against({'it': (self.dense, before.dense)}, 'operations')}."


def flops(model: nn.Module, batch: object, *, forward: Forward | None = None) -> Flops:
    """Count the operations of one forward in eval mode, and those that zeros of the weights would save.

    What ``FlopCounterMode`` does not know, such as elementwise operations and recurrent kernels, is not counted; a
    weight that the forward itself casts or computes counts as dense, in ``other``. The model is left as found.

    Args:
        model: The network, masked or not.
        batch: One batch: a tensor [samples, ...], a tuple of positional or a mapping of keyword arguments.
        forward: Called as ``forward(model, batch)`` in place of ``model(batch)``.

    Raises:
        InvalidInput: The model cannot be called on the batch; or as in ``storage``, like UnsupportedModule.
        EmptyCalibration, NonFinite: The batch holds no sample, or NaN or infinity.
    """
    model, checked = permanent(model), as_batches([batch])[0]
    found: dict[str, tuple[int, int]] = {}
    counter = FlopCounterMode(display=False, custom_mapping=_recording(model, found))
    plain = sdpa_kernel(SDPBackend.MATH)  # of the fused kernels of attention not all are counted
    with evaluating(model), plain, counter:
        run_model(model, checked, forward)
    rows = tuple(
        WeightFlops(name, density(model.get_parameter(name)), dense, remaining)
        for name, (dense, remaining) in found.items()
    )
    return Flops(rows, counter.get_total_flops() - sum(row.dense for row in rows), samples_of(checked))


def _recording(model: nn.Module, found: dict[str, tuple[int, int]]) -> dict[object, Callable[..., int]]:
    """The formulas by which torch counts, each of which also records in ``found`` the weight that it multiplies by."""
    tensors = {name: _checked_tensor(name, own) for name, own in model.named_parameters()}
    holders = Holders((own, name) for name, own in tensors.items() if own.dim() >= 2)

    def recording(formula: Callable[..., int]) -> Callable[..., int]:
        def count(*args: object, **kwargs: object) -> int:
            counted = formula(*args, **kwargs)
            owned = ((name, operand) for operand in tensors_in(args) for name in holders.of(operand))
            if counted and (first := next(owned, None)):
                name, operand = first  # the operand is a part of the weight where projections are packed
                dense, remaining = found.get(name, (0, 0))
                part = int(operand.count_nonzero()) * counted // max(operand.numel(), 1)
                found[name] = (dense + counted, remaining + part)
            return counted

        vars(count).update(_get_raw=True)  # tensors, not their shapes
        return count

    return {operation: recording(formula) for operation, formula in flop_registry.items()}


def accuracy(model: nn.Module, x: object, y: Tensor, batch_size: int = 1000) -> float:
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


def permanent(model: nn.Module) -> nn.Module:
    """The model itself, or a copy without masks if it has any; raises as ``storage``."""
    if prune.is_pruned(check_module(model)):
        raise UnsupportedModule("the model has masks of torch.nn.utils.prune: take them over with from_torch_prune_")
    for name, own in model.named_parameters():
        _checked_tensor(name, own, dense=False)
    if kept_masks(model):
        model = copy.deepcopy(model)
        make_permanent_(model)
    return model


def density(tensor: Tensor) -> float:
    """The part of the entries that are not zero."""
    return int(tensor.count_nonzero()) / max(tensor.numel(), 1)


def _checked_tensor(name: str, value: object, *, dense: bool = True) -> Tensor:
    """The value, detached; raises InvalidInput unless it is a tensor with values, and dense if it is to be."""
    sparse = isinstance(value, Tensor) and value.layout != torch.strided
    if not isinstance(value, Tensor) or nn.parameter.is_lazy(value) or value.is_meta or (dense and sparse):
        raise InvalidInput(f"{name!r} is not a dense tensor with values: load the weights, or leave it out")
    return value.detach()


def _against(sizes: Mapping[str, tuple[int | None, int | None]], unit: str = "bytes") -> str:
    """What each takes now, and how much less or more that is than before, where both are known."""
    changes = []
    for what, (now, before) in sizes.items():
        if now is None or before is None:
            continue
        percent = round(100 * (now / max(before, 1) - 1))
        change = "about the same" if percent == 0 else f"{abs(percent)} % {'fewer' if percent < 0 else 'more'}"
        changes.append(f"{what} takes {now:,} {unit} ({'the same' if now == before else change})")
    return ", ".join(changes)
