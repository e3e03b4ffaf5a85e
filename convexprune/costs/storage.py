"""Bytes of a model: dense, in sparse formats, and as a compressed file."""

import gzip
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.costs.shared import against, checked_tensor, permanent
from convexprune.files.weights import safetensors_bytes
from convexprune.network.memory import place_of
from convexprune.solvers.errors import InvalidInput


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
        told = [against(name, size, self.dense) for name, size in formats.items() if size is not None]
        counted = f"{self.nonzeros:,} of {self.entries:,} weights ({100 * kept:.0f} %) are not zero"
        text = f"{counted}; against {self.dense:,} bytes for the dense ones, {', '.join(told)}."
        if before is None:
            return text
        files = [against("the file", self.file, before.file)]
        if self.gzip is not None and before.gzip is not None:
            files.append(against("compressed by gzip it", self.gzip, before.gzip))
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
    tensors = _distinct(model if isinstance(model, Mapping) else permanent(model).state_dict())
    rows = tuple(_weight_storage(name, value, index_dtype) for name, value in tensors.items() if value.dim() >= 2)
    file = safetensors_bytes(
        {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    )
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


def _distinct(state: Mapping[str, object]) -> dict[str, Tensor]:
    """The state's tensors; one under several names (tied weights) once, under the first."""
    found: dict[object, tuple[str, Tensor]] = {}
    for name, value in state.items():
        tensor = checked_tensor(name, value)
        place = place_of(tensor) if tensor.numel() else name
        found.setdefault(place, (name, tensor))
    return dict(found.values())
