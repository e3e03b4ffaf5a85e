"""Positions that masks hide, such as padding: where they lie in what a layer sees, and in the outputs.

A mask [samples, positions] says which positions of a batch count; an encoder and a decoder may each have its own. What
a layer sees has these two axes somewhere among the axes of its rows (``Layout``), or, behind pooling, has none of them.
Where they lie is decided in ``convexprune.network.sightings``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from convexprune.files.weights import listed
from convexprune.layers import input_matrices, input_positions
from convexprune.layers.memory import Batch, tensors_in
from convexprune.network.taps import Received
from convexprune.solvers.errors import InvalidInput

T = TypeVar("T")

Mask = str | bool | Callable[[Batch], Tensor | None] | None
"""Which positions of a batch count: the key of batches that are mappings, a function of the batch, None for the keys
that are usual where a batch has them, or False for none."""

Masks = tuple[Tensor | None, ...]
"""Of a batch, Boolean [samples, positions]: that of the only sequence, or an encoder's, and a decoder's."""

KEY = "attention_mask"
KEYS = (KEY, "src_key_padding_mask", "memory_key_padding_mask", "key_padding_mask")
DECODERS_KEYS = ("decoder_attention_mask", "tgt_key_padding_mask")
_INVERSE = "key_padding_mask"  # torch's own: what is hidden is True, or −∞


def check_mask(mask: Batch) -> Mask:
    """The mask itself; InvalidInput is raised if it is none of what ``Mask`` lists."""
    if mask is None or isinstance(mask, str | bool) or callable(mask):
        return mask  # type: ignore[no-any-return]
    expected = "expected the key of batches, a function of the batch, None or False"
    raise InvalidInput(f"mask: {expected}, found {type(mask).__name__}")


def mask_name(mask: Mask) -> str:
    """What to call it in sentences."""
    return mask if isinstance(mask, str) else "the mask function" if callable(mask) else KEY


def read_masks(batch: Batch, mask: Mask) -> tuple[Masks, tuple[str, ...], str]:
    """A batch's masks, their names, and why one of them cannot be read, "" where all can.

    InvalidInput is raised where a mask named by key, or given by a function, is missing, or no such mask.
    """
    given = _given(batch, mask)
    found: list[Tensor | None] = [None, None]
    faults = []
    for name, value in given.items():
        found[name in DECODERS_KEYS], fault = _read(value, name)
        if fault and (callable(mask) or name == mask):
            expected = "expected 1 where a position counts and 0 where it does not, [samples, positions]"
            raise InvalidInput(f"mask: {expected}; {name} {fault}")
        faults += [f"{name} {fault}"] if fault else []
    while found and found[-1] is None:
        found.pop()
    return tuple(found), tuple(given), "; ".join(faults)


def _given(batch: Batch, mask: Mask) -> dict[str, object]:
    """What a batch has of masks, by name."""
    if mask is False:
        return {}
    if callable(mask):
        return {mask_name(mask): mask(batch)}
    arguments = batch[0] if isinstance(batch, tuple | list) and batch else batch  # (inputs, labels)
    entries = arguments if isinstance(arguments, Mapping) else {}
    wanted: tuple[tuple[str, ...], ...] = (KEYS, DECODERS_KEYS)
    if isinstance(mask, str):
        if entries.get(mask) is None:
            return {mask: ""}
        wanted = ((mask,), DECODERS_KEYS if mask in KEYS else ())
    firsts = [next((key for key in keys if entries.get(key) is not None), None) for keys in wanted]
    return {key: entries[key] for key in firsts if key is not None}


def _read(given: object, key: str) -> tuple[Tensor | None, str]:
    """Where positions count, Boolean; or why this is no mask of samples and positions.

    Of masks with axes between these two, such as those of heads and of queries, positions count that any of them sees.
    """
    found = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
    if found is None:
        return None, ""
    if isinstance(given, str):
        return None, "is missing in a batch"
    if not isinstance(found, Tensor):
        return None, f"is of type {type(found).__name__}, expected a tensor"
    if found.dim() < 2 or not found.numel():
        return None, f"has the shape {list(found.shape)}, not [samples, positions]"
    additive = bool(((found == 0) | (found <= _LOW)).all()) and bool((found < 0).any())
    if key.endswith(_INVERSE):
        counts, known = found == 0, found.dtype == torch.bool or additive or not bool(found.any())
    else:
        counts, known = found != 0, bool(((found == 0) | (found == 1)).all())
    if not known:
        remedy = " (it is one that is added: give a function of the batch that returns mask > -1)" if additive else ""
        return None, f"has values other than 0 and 1{remedy}"
    return counts.detach().reshape(len(counts), -1, counts.shape[-1]).any(1), ""


_LOW = -1e3  # what is added to hide a position is at most this


@dataclass(frozen=True)
class Layout:
    """Where samples and positions lie among axes: the same axis where they run along one."""

    samples: int
    positions: int
    turned: bool = False  # of one axis: whether samples run faster than positions
    mask: int = 0  # the number of the mask, among ``Masks``

    def fits(self, axes: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether axes of these lengths may hold the samples and positions of a mask of this shape."""
        return replace(self, mask=0) in layouts(axes, shape)

    def of(self, masks: Sequence[T | None]) -> T | None:
        """That of this layout's mask, among one for each of ``Masks``, if the batch has it."""
        return masks[self.mask] if self.mask < len(masks) else None

    def spread(self, mask: Tensor, axes: Sequence[int]) -> Tensor:
        """The mask [samples, positions] along axes of these lengths, Boolean [*axes]."""
        if self.samples == self.positions:
            along = (mask.mT if self.turned else mask).reshape(-1)
        else:
            along = mask.mT if self.samples > self.positions else mask
        own = {self.samples, self.positions}
        return along.reshape([n if axis in own else 1 for axis, n in enumerate(axes)]).expand(*axes)


def layouts(axes: Sequence[int], shape: Sequence[int]) -> Iterator[Layout]:
    """All ways in which axes of these lengths may hold those of a mask, samples first before samples behind."""
    S, T = shape
    pairs = [(a, b) for a in range(len(axes)) for b in range(len(axes)) if a != b and (axes[a], axes[b]) == (S, T)]
    yield from (Layout(a, b) for a, b in sorted(pairs, key=lambda pair: (pair[0] > pair[1], pair)))
    for axis, length in enumerate(axes):
        if length == S * T and T > 1 and (S > 1 or not pairs):
            yield Layout(axis, axis)
            if S > 1:
                yield Layout(axis, axis, turned=True)


@dataclass(frozen=True)
class Counted:
    """Which rows of what a layer sees count, and which of the outputs; without a mask all do.

    Attributes:
        name: Of the masks.
        layers: For each group of a layer the layout of its rows; None where all count.
        outputs: The same for each floating-point tensor that the model returns.
        unused: Layers, by name, of which all rows count although the mask has something to hide, with the reason; and
            for "" why the mask itself could not be read.
        positions, hidden: Of all masks, and how many of them do not count.
        left_out: Rows of each layer that do not count, group by group, over all calls.
    """

    name: str = KEY
    layers: Mapping[str, tuple[Layout | None, ...]] = field(default_factory=dict)
    outputs: tuple[Layout | None, ...] = ()
    unused: Mapping[str, str] = field(default_factory=dict)
    positions: int = 0
    hidden: int = 0
    left_out: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def inputs(self, name: str, layer: nn.Module, raw: Received, masks: Masks) -> tuple[Tensor, ...]:
        """X [P, N] of each group of a layer, of the rows that count."""
        matrices, found = input_matrices(layer, raw), self.layers.get(name, ())
        if not masks or not any(found):
            return matrices
        axes = zip(found, input_positions(layer, raw), strict=True)
        counts = [where_counted(layout, masks, lengths) for layout, lengths in axes]
        return tuple(X if rows is None else X[rows.reshape(-1)] for X, rows in zip(matrices, counts, strict=True))

    def visible(self, returned: Batch, masks: Masks) -> Batch:
        """What the model returned, with zeros where it does not count."""
        if not masks or not any(self.outputs):
            return returned
        tensors = (tensor for tensor in tensors_in(returned) if tensor.is_floating_point())
        found = []
        for tensor, layout in zip(tensors, chain(self.outputs, repeat(None)), strict=False):
            counts = where_counted(layout, masks, tensor.shape)
            found.append(tensor if counts is None else torch.where(counts.to(tensor.device), tensor, 0))
        return found

    def notices(self) -> Iterator[str]:
        """What a report begins with: what is left out, and where the mask could not be used."""
        if why := self.unused.get(""):
            yield f"{why}: it cannot be used, and all rows count"
        for reason in dict.fromkeys(reason for name, reason in self.unused.items() if name):
            names = listed([name for name, other in self.unused.items() if name and other == reason], 4)
            yield f"{self.name} cannot be used in {names}, where all rows count: {reason}"
        used = sum(any(found) for found in self.layers.values())
        if self.hidden and used:
            verb, layers = "hide" if " and " in self.name else "hides", "1 layer" if used == 1 else f"{used} layers"
            outputs = "; nor do the network's outputs there" if any(self.outputs) else ""
            yield (
                f"{self.name} {verb} {self.hidden:,} of {self.positions:,} positions: in {layers} their rows count in "
                f"no program, error or bound{outputs}"
            )

    def to_dict(self) -> dict[str, object] | None:
        """Plain data, for a report; None where no batch had a mask."""
        if not self.positions and not self.unused:
            return None
        return {
            "name": self.name,
            "positions": self.positions,
            "hidden": self.hidden,
            "rows_left_out": {name: max(rows) for name, rows in self.left_out.items()},
            "outputs": any(self.outputs),
            "unused": dict(self.unused),
        }


def where_counted(layout: Layout | None, masks: Masks, axes: Sequence[int]) -> Tensor | None:
    """Where positions along axes of these lengths count, Boolean [*axes]; None if all do."""
    mask = None if layout is None else layout.of(masks)
    if layout is None or mask is None or not layout.fits(axes, mask.shape):
        return None
    return layout.spread(mask, axes)
