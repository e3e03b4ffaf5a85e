"""What sparsity buys: bytes, multiplications and time, measured, and where it buys nothing.

A zero in a dense tensor is still stored and multiplied. It pays in a format or a kernel that leaves zeros out, and
there only beyond some sparsity; neurons that are gone pay everywhere.
"""

import copy
import gzip
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from convexprune.calibration import as_batches, samples_of
from convexprune.capture import Forward, capture, evaluating, run_model
from convexprune.errors import UnsupportedModule
from convexprune.masks import kept_masks, make_permanent_
from convexprune.matrices import input_matrices, unsupported, weight_matrices
from convexprune.plan import check_module
from convexprune.report import SkippedModule
from convexprune.solvers.arrays import checked_count
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.solve import environment
from convexprune.watch import tensors_in

__all__ = [
    "Flops",
    "Latency",
    "LayerLatency",
    "Storage",
    "WeightFlops",
    "WeightStorage",
    "flops",
    "latency",
    "storage",
]


@dataclass(frozen=True)
class WeightStorage:
    """Bytes of one weight, as a matrix with a row an output, in each format.

    Attributes:
        name: Its key in the state dict.
        shape: Of the tensor.
        nonzeros: Entries that are not zero.
        dense: Every entry stored.
        csr: Compressed sparse rows: the nonzeros, the column of each, and where each row begins.
        two_four: As torch's semi-structured tensors: the two kept values of four, and 2 bits for the place of each;
            None unless at most two of any four neighbours along the inputs (dimension 1) are not zero.
    """

    name: str
    shape: tuple[int, ...]
    nonzeros: int
    dense: int
    csr: int
    two_four: int | None


@dataclass(frozen=True)
class Storage:
    """Bytes of a model.

    Attributes:
        weights: A row for each tensor with two axes or more; one that modules share counts once.
        index_bits: Of a CSR index.
        other: Bytes of all other tensors: biases, norms, their statistics.
        file: Bytes of all tensors as a safetensors file.
        gzip: Bytes of that file compressed by gzip; None if that was not asked for.
    """

    weights: tuple[WeightStorage, ...]
    index_bits: int
    other: int
    file: int
    gzip: int | None

    @property
    def entries(self) -> int:
        """Of all weights."""
        return sum(torch.Size(row.shape).numel() for row in self.weights)

    @property
    def nonzeros(self) -> int:
        """Of all weights."""
        return sum(row.nonzeros for row in self.weights)

    @property
    def dense(self) -> int:
        """Bytes of all weights, dense."""
        return sum(row.dense for row in self.weights)

    @property
    def csr(self) -> int:
        """Bytes of all weights as CSR."""
        return sum(row.csr for row in self.weights)

    @property
    def two_four(self) -> int | None:
        """Bytes of all weights, as 2:4 where the pattern holds and dense elsewhere; None if it holds nowhere."""
        fits = any(row.two_four is not None for row in self.weights)
        return sum(row.dense if row.two_four is None else row.two_four for row in self.weights) if fits else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the totals."""
        totals = {name: getattr(self, name) for name in ("entries", "nonzeros", "dense", "csr", "two_four")}
        return asdict(self) | totals

    def verdict(self, before: "Storage | None" = None) -> str:
        """What the zeros save, in a sentence or two; with the model before, what pruning saved.

        Args:
            before: The same of the model before it was pruned.
        """
        kept = self.nonzeros / max(self.entries, 1)
        formats = {f"CSR with {self.index_bits}-bit indices": self.csr, "2:4": self.two_four}
        told = [_against(name, size, self.dense) for name, size in formats.items() if size is not None]
        counted = f"{self.nonzeros:,} of {self.entries:,} weights ({100 * kept:.0f} %) are not zero"
        text = f"{counted}; against {self.dense:,} bytes for the dense ones, {', '.join(told)}."
        if before is None:
            return text
        files = [_against("the file", self.file, before.file)]
        if self.gzip is not None and before.gzip is not None:
            files.append(_against("compressed by gzip it", self.gzip, before.gzip))
        return f"{text} Against the model before, {', '.join(files)}."


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
    tensors = _distinct(model if isinstance(model, Mapping) else _permanent(model).state_dict())
    rows = tuple(_weight_storage(name, value, index_dtype) for name, value in tensors.items() if value.dim() >= 2)
    file = save({name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()})
    return Storage(
        weights=rows,
        index_bits=8 * index_dtype.itemsize,
        other=sum(value.nbytes for value in tensors.values() if value.dim() < 2),
        file=len(file),
        gzip=len(gzip.compress(file)) if compress else None,
    )


def _weight_storage(name: str, weight: Tensor, index_dtype: torch.dtype) -> WeightStorage:
    nonzeros, size = int(weight.count_nonzero()), weight.element_size()
    indices = nonzeros + len(weight) + 1
    two_four = weight.numel() * size // 2 + -(-weight.numel() // 8) if _is_two_four(weight) else None
    csr = nonzeros * size + indices * index_dtype.itemsize
    return WeightStorage(name, tuple(weight.shape), nonzeros, weight.numel() * size, csr, two_four)


def _is_two_four(weight: Tensor) -> bool:
    if weight.shape[1] % 4 or not weight.numel():
        return False
    groups = weight.movedim(1, -1).reshape(-1, 4)
    return bool((groups.count_nonzero(dim=1) <= 2).all())


def _distinct(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state's tensors; one under several names (tied weights) once, under the first."""
    found: dict[object, tuple[str, Tensor]] = {}
    for name, value in state.items():
        valued = isinstance(value, Tensor) and not nn.parameter.is_lazy(value) and not value.is_meta
        if not valued or value.layout != torch.strided:
            raise InvalidInput(f"{name!r} is not a dense tensor with values: load the weights, or leave it out")
        place = (value.data_ptr(), value.shape, value.stride()) if value.numel() else name
        found.setdefault(place, (name, value.detach()))
    return dict(found.values())


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
        return f"{text} Against the model before, {_against('it', self.dense, before.dense, 'operations')}."


def flops(model: nn.Module, batch: Any, *, forward: Forward | None = None) -> Flops:
    """Count the operations of one forward in eval mode, and those that zeros of the weights would save.

    What ``FlopCounterMode`` does not know, such as elementwise operations and recurrent kernels, is not counted; a
    weight that the forward itself casts or computes counts as dense, in ``other``. The model is left as found.

    Args:
        model: The network, masked or not.
        batch: One batch: a tensor [samples, ...], a tuple of positional or a mapping of keyword arguments.
        forward: Called as ``forward(model, batch)`` in place of ``model(batch)``.

    Raises:
        InvalidInput: The model cannot be called on the batch, or is no module.
        EmptyCalibration, NonFinite: The batch holds no sample, or NaN or infinity.
        UnsupportedModule: The model has masks of ``torch.nn.utils.prune``, or as in ``make_permanent_``.
    """
    model, checked = _permanent(model), as_batches([batch])[0]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # of the fused kernels of attention not all are counted
        counter = stack.enter_context(FlopCounterMode(display=False))
        products = stack.enter_context(_Products(model, counter))
        run_model(model, checked, forward)
    rows = tuple(
        WeightFlops(name, _density(model.get_parameter(name)), dense, remaining)
        for name, (dense, remaining) in products.found.items()
    )
    return Flops(rows, counter.get_total_flops() - sum(row.dense for row in rows), samples_of(checked))


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells which weight each counted operation multiplies by, whatever module or function calls it."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter
        self.names = {own.untyped_storage().data_ptr(): name for name, own in _matrices(model)}
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
            name = self.names.get(operand.untyped_storage().data_ptr())
            if name is not None:  # the operand is a part of it where projections are packed
                dense, remaining = self.found.get(name, (0, 0))
                part = int(operand.count_nonzero()) * count // max(operand.numel(), 1)
                self.found[name] = (dense + count, remaining + part)
                return


@dataclass(frozen=True)
class LayerLatency:
    """Seconds of one layer's product with the batch that reaches it, alone; medians.

    Attributes:
        name: Qualified module name.
        density: The part of the matrix's entries that are not zero; a bias is part of it.
        dense: Dense product, in the faster of the two layouts of the batch.
        csr: Product with the matrix as ``torch.sparse_csr``.
    """

    name: str
    density: float
    dense: float
    csr: float


@dataclass(frozen=True)
class Latency:
    """Times on this machine.

    Attributes:
        layers: A row for each Linear or convolution; of a convolution its im2col product, without the unfolding.
        skipped: Modules with weights whose products were not compared, each with the reason.
        model: Seconds of one forward, dense, as it is; median.
        before: The same of the model before it was pruned, if it was given.
        samples: Of the batch.
        repeats: Timed runs of each.
        provenance: dtype, device, threads, versions.
    """

    layers: tuple[LayerLatency, ...]
    skipped: tuple[SkippedModule, ...]
    model: float
    before: float | None
    samples: int
    repeats: int
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dense(self) -> float:
        """Seconds of all layers' dense products."""
        return sum(row.dense for row in self.layers)

    @property
    def csr(self) -> float:
        """Seconds of all layers' CSR products."""
        return sum(row.csr for row in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the totals."""
        return asdict(self) | {"dense": self.dense, "csr": self.csr}

    def verdict(self) -> str:
        """Whether anything is faster, a sentence a comparison; differences below a tenth count as none."""
        lines = []
        for row in self.layers:
            at = f"the dense one at {100 * row.density:.0f} % density"
            lines.append(_pace(row.name or "The layer", "the CSR product", row.csr, row.dense, at))
        if self.before is not None:
            lines.append(_pace("The model", "its forward", self.model, self.before, "that of the model before"))
        return " ".join(lines) or "Nothing was compared: there is no CSR product of a layer, and no model before."


def latency(
    model: nn.Module,
    batch: Any,
    *,
    before: nn.Module | None = None,
    repeats: int = 20,
    forward: Forward | None = None,
) -> Latency:
    """Time each layer's dense product against its CSR product, and the whole model, in eval mode; models stay as found.

    Runs of what is compared take turns, after one that is not counted; on CUDA each is waited for.

    Args:
        model: The network, masked or not; masks are made permanent in a copy.
        batch: As in ``flops``.
        before: The network before it was pruned.
        repeats: Timed runs.
        forward: As in ``flops``.

    Raises:
        InvalidInput: A model cannot be called on the batch, or is no module.
        InvalidTolerance: ``repeats`` is not a whole number above 0.
        EmptyCalibration, NonFinite: No sample, or NaN or infinity in the batch or a weight.
        UnsupportedModule: The model has masks of ``torch.nn.utils.prune``, or as in ``make_permanent_``.
    """
    runs = checked_count("repeats", repeats)
    checked, models = as_batches([batch])[0], [_permanent(one) for one in (model, before) if one is not None]
    names, skipped = _compared(models[0])
    seen = capture(models[0], [checked], names, forward=forward).layers
    rows = []
    for name in names:
        layer = models[0].get_submodule(name)
        row = _layer_latency(name, layer, seen[name].inputs[0], runs) if name in seen else _UNCALLED
        if isinstance(row, LayerLatency):
            rows.append(row)
        else:
            skipped.append(SkippedModule(name, type(layer).__name__, row))
    with ExitStack() as stack:
        for one in models:
            stack.enter_context(evaluating(one))
        whole = _seconds([partial(run_model, one, checked, forward) for one in models], runs, _device(models[0]))
    data = next(models[0].parameters(), torch.empty(0))
    return Latency(
        layers=tuple(rows),
        skipped=tuple(skipped),
        model=whole[0],
        before=whole[1] if before is not None else None,
        samples=samples_of(checked),
        repeats=runs,
        provenance=environment(data),
    )


_UNCALLED = "its forward was not called on the batch, so its inputs are not known"


def _compared(model: nn.Module) -> tuple[list[str], list[SkippedModule]]:
    """The layers whose product can be compared, and the other modules with weights, each with the reason."""
    names, skipped = [], []
    for name, module in model.named_modules():
        if not any(own.dim() >= 2 for own in module.parameters(recurse=False)):
            continue
        reason = unsupported(module)
        if reason is None and not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            reason = "its product is compared for Linear and convolutions only"
        if reason is None and getattr(module, "groups", 1) != 1:
            reason = "a grouped convolution is many small products"
        if reason is None:
            names.append(name)
        else:
            skipped.append(SkippedModule(name, type(module).__name__, reason))
    return names, skipped


def _layer_latency(name: str, layer: nn.Module, inputs: Tensor, repeats: int) -> LayerLatency | str:
    """The layer's times on its first inputs, or why torch has no CSR product for it."""
    (X,), (U,) = input_matrices(layer, inputs), weight_matrices(layer)
    A, X = U.mT.contiguous(), X.to(U).contiguous()
    right = X.mT.contiguous()  # what suits the CSR product
    try:
        sparse = _as_csr(A)
        # A gain must be one over the faster of the dense layouts.
        layouts = [partial(functional.linear, X, A), partial(torch.matmul, A, right)]
        *dense, csr = _seconds([*layouts, partial(torch.matmul, sparse, right)], repeats, A.device)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"torch has no CSR product for {A.dtype} on {A.device.type} ({str(error).splitlines()[0]})"
    return LayerLatency(name, _density(A), min(dense), csr)


def _as_csr(A: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return A.to_sparse_csr()


def _seconds(works: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median time of each; they take turns, so that what else the machine does hits all alike."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for work, taken in zip(works, times, strict=True):
            _wait(device)
            began = time.perf_counter()
            work()
            _wait(device)
            if turn:  # the first one warms up
                taken.append(time.perf_counter() - began)
    return [median(taken) for taken in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _permanent(model: nn.Module) -> nn.Module:
    """The model itself, or a copy without masks if it has any."""
    if prune.is_pruned(check_module(model)):
        raise UnsupportedModule("the model has masks of torch.nn.utils.prune: take them over with from_torch_prune_")
    if not kept_masks(model):
        return model
    model = copy.deepcopy(model)
    make_permanent_(model)
    return model


def _matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, own) for name, own in model.named_parameters() if own.dim() >= 2]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters(), torch.empty(0)).device


def _density(tensor: Tensor) -> float:
    return int(tensor.count_nonzero()) / max(tensor.numel(), 1)


def _against(what: str, now: int, before: int, unit: str = "bytes") -> str:
    percent = round(100 * (now / max(before, 1) - 1))
    change = "about the same" if percent == 0 else f"{abs(percent)} % {'fewer' if percent < 0 else 'more'}"
    return f"{what} takes {now:,} {unit} ({'the same' if now == before else change})"


def _pace(what: str, product: str, now: float, before: float, than: str) -> str:
    ratio = now / before
    outcome = "no faster" if ratio > 1 - _SCATTER else "faster"
    return f"{what}: {outcome}, {product} takes {ratio:.2f} times {than} ({1e3 * now:.3f} ms, {1e3 * before:.3f} ms)."


_SCATTER = 0.1  # what such medians differ by from one measurement to the next
