"""Tensors in batches and other nested structures, and which tensors have entries in the same bytes of memory."""

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import accumulate
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T", bound=Hashable)
Batch: TypeAlias = Any
"""A batch, or what a model returns: a tensor, or tensors in nested mappings, sequences and dataclasses."""

_Span = tuple[str, int, int]
"""The device, and the bytes from a tensor's first entry to behind its last."""


def tensors_in(tree: object, _within: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """The tensors in nested mappings, sequences and dataclasses; what holds itself is looked into once."""
    if isinstance(tree, Tensor):
        yield tree
        return
    branches: Iterable[object] = ()
    if isinstance(tree, Mapping):
        branches = tree.values()
    elif isinstance(tree, list | tuple):
        branches = tree
    elif is_dataclass(tree) and not isinstance(tree, type):
        branches = [getattr(tree, field.name) for field in fields(tree)]
    if id(tree) not in _within:
        for branch in branches:
            yield from tensors_in(branch, _within | {id(tree)})


def mapped(tree: Batch, change: Callable[[Tensor], Tensor], whole: Callable[[Batch], Batch] | None = None) -> Batch:
    """The batch with changed tensors; what is no tensor, mapping, sequence or dataclass stays as it is.

    ``whole`` is applied to what moves as a whole: it has a method ``to``, such as a PackedSequence.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if whole is not None and hasattr(tree, "to"):
        return whole(tree)
    if isinstance(tree, Mapping):
        return {key: mapped(value, change, whole) for key, value in tree.items()}
    if isinstance(tree, tuple | list) and not hasattr(tree, "to"):
        parts = [mapped(value, change, whole) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if is_dataclass(tree) and not isinstance(tree, type):
        other = copy.copy(tree)
        for field in fields(tree):
            object.__setattr__(other, field.name, mapped(getattr(tree, field.name), change, whole))  # frozen ones, too
        return other
    return tree


def samples_of(batch: Batch) -> int:
    """The length of the batch's first tensor; a batch without one is a sample."""
    first = next(tensors_in(batch), None)
    return 1 if first is None or first.dim() == 0 else len(first)


def samples_at(batch: Batch, chosen: slice | list[int]) -> Batch:
    """The batch with some of its samples alone: of each tensor as long as ``samples_of`` says, these entries."""
    samples = samples_of(batch)
    return mapped(batch, lambda tensor: tensor[chosen] if tensor.dim() and len(tensor) == samples else tensor)


class Holders(Generic[T]):
    """Who holds which memory: made of tensors, each with the name of who holds it.

    What has no place in memory (lazy, meta, sparse), or none that is known (subclasses), is shared if it is the same
    object; what has no entries shares nothing.
    """

    def __init__(self, held: Iterable[tuple[Tensor, T]]) -> None:
        found = [(span, tensor, holder) for tensor, holder in held if (span := _span(tensor)) is not None]
        self._held = sorted(found, key=lambda item: item[0])
        self._begins = [(device, first) for (device, first, _), _, _ in self._held]
        self._reached = list(accumulate(((device, end) for (device, _, end), _, _ in self._held), max))

    def of(self, tensor: Tensor) -> list[T]:
        """Those who hold at least one entry of the tensor, each once."""
        span = _span(tensor)
        if span is None:
            return []
        device, first, end = span
        near = self._held[bisect_right(self._reached, (device, first)) : bisect_left(self._begins, (device, end))]
        return list(
            dict.fromkeys(holder for other, held, holder in near if other[2] > first and _intersect(tensor, held))
        )


def place_of(tensor: Tensor) -> Hashable:
    """The same for two tensors if they are one: of the same entries, in the same shape."""
    address = _address(tensor)
    return id(tensor) if address is None else (tensor.device, tensor.dtype, address, tensor.shape, tensor.stride())


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two entries lie in the same place, as in what ``expand`` gives."""
    axes = sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1)
    reaches = accumulate((step * (size - 1) for step, size in axes), initial=1)
    if all(step >= reach for (step, _), reach in zip(axes, reaches, strict=False)):
        return False
    places = np.zeros(1, dtype=np.int64)  # so it may be
    for step, size in axes:
        places = (places[:, None] + step * np.arange(size)).ravel()
    return len(np.unique(places)) < len(places)


def _span(tensor: Tensor) -> _Span | None:
    address = _address(tensor)
    if address is None:
        return "", id(tensor), id(tensor) + 1
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (str(tensor.device), address, address + extent * tensor.element_size()) if tensor.numel() else None


def _address(tensor: Tensor) -> int | None:
    """Of the first entry; None where there is none, or none that is known."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
        return None
    try:
        return tensor.data_ptr() or (None if tensor.numel() else 0)
    except RuntimeError:  # what torch.func wraps has none
        return None


def _intersect(one: Tensor, other: Tensor) -> bool:
    """Whether tensors whose bytes are interleaved have an entry in common: columns of one matrix need not."""
    return one is other or np.shares_memory(np.asarray(_Placed(one)), np.asarray(_Placed(other)))


class _Placed:
    """What numpy takes for an array at the tensor's place, on any device: its entries are never read."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(step * size for step in tensor.stride()),
        }
