"""Positions that a mask hides, such as padding: where they lie in what a layer sees, and in the outputs.

A mask [samples, positions] says which positions of a batch count. What a layer sees has these two axes somewhere among
the axes of its rows (``Layout``), or, behind pooling, has none of them. Where they lie is decided in
``convexprune.sightings``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convexprune.matrices import input_positions
from convexprune.solvers.errors import InvalidInput
from convexprune.taps import Received
from convexprune.watch import tensors_in

__all__ = ["KEY", "Counted", "Layout", "Mask", "check_mask", "layouts", "mask_name", "read_mask", "rows_that_count"]

Mask = str | bool | Callable[[Any], Tensor | None] | None
"""Which positions of a batch count: the key of batches that are mappings, a function of the batch, None for the key
"attention_mask" where a batch has it, or False for none."""

KEY = "attention_mask"


def check_mask(mask: Any) -> Mask:
    """The mask itself.

    Raises:
        InvalidInput: It is none of what ``Mask`` lists.
    """
    if mask is None or isinstance(mask, str | bool) or callable(mask):
        return mask  # type: ignore[no-any-return]
    raise InvalidInput(
        f"mask: expected the key of batches, a function of the batch, None or False, found {type(mask).__name__}"
    )


def mask_name(mask: Mask) -> str:
    """What to call it in sentences."""
    return mask if isinstance(mask, str) else "the mask function" if callable(mask) else KEY


def read_mask(batch: Any, mask: Mask) -> tuple[Tensor | None, str]:
    """A batch's mask, Boolean [samples, positions], or None with the reason: "" where it has none.

    Raises:
        InvalidInput: A mask that was asked for by key or function is missing, or no such mask.
    """
    asked = isinstance(mask, str) or callable(mask)
    if not asked and mask not in (None, True):
        return None, ""
    if callable(mask):
        found = mask(batch)
    else:
        key = mask if isinstance(mask, str) else KEY
        arguments = batch[0] if isinstance(batch, tuple | list) and batch else batch  # (inputs, labels)
        found = arguments.get(key) if isinstance(arguments, Mapping) else None
    if found is None and not isinstance(mask, str):
        return None, ""
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(found)
    fault = _fault(found)
    if isinstance(found, Tensor) and fault is None:
        return found.detach() != 0, ""
    if asked:
        expected = "expected 1 where a position counts and 0 where it does not, [samples, positions]"
        raise InvalidInput(f"mask: {expected}; {mask_name(mask)} {fault}")
    return None, fault or ""


def _fault(found: Any) -> str | None:
    """Why this is no mask of samples and positions."""
    if not isinstance(found, Tensor):
        return f"is {type(found).__name__}" if found is not None else "is missing in a batch"
    if found.dim() != 2 or not found.numel():
        return f"has the shape {list(found.shape)}, not [samples, positions]"
    if not bool(((found == 0) | (found == 1)).all()):
        return "has values other than 0 and 1"
    return None


@dataclass(frozen=True)
class Layout:
    """Where samples and positions lie among axes.

    Attributes:
        samples, positions: The axis of each; the same where they run along one axis.
        turned: Of one axis: whether samples run faster than positions.
    """

    samples: int
    positions: int
    turned: bool = False

    def fits(self, axes: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether axes of these lengths may hold the samples and positions of a mask of this shape."""
        return self in layouts(axes, shape)

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
        name: Of the mask.
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

    def rows(self, name: str, layer: nn.Module, raw: Received, mask: Tensor | None) -> list[Tensor | None]:
        """For each group which rows of ``input_matrices(layer, raw)`` count, Boolean [P], None for all; or nothing."""
        found = self.layers.get(name, ())
        if mask is None or not any(found):
            return []
        axes = input_positions(layer, raw)
        return [_along(layout, mask, lengths) for layout, lengths in zip(found, axes, strict=True)]

    def visible(self, returned: Any, mask: Tensor | None) -> Any:
        """What the model returned, with zeros where it does not count."""
        if mask is None or not any(self.outputs):
            return returned
        tensors = [tensor for tensor in tensors_in(returned) if tensor.is_floating_point()]
        found = []
        for number, tensor in enumerate(tensors):
            layout = self.outputs[number] if number < len(self.outputs) else None
            counts = _along(layout, mask, tensor.shape)
            found.append(tensor if counts is None else torch.where(counts.reshape(tensor.shape), tensor, 0))
        return found

    def notices(self) -> tuple[str, ...]:
        """What a report begins with: what is left out, and where the mask could not be used."""
        lines = []
        if why := self.unused.get(""):
            lines.append(f"{self.name} cannot be used, and all rows count: it {why}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.unused.items():
            if name:
                reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            listed = ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")
            lines.append(f"{self.name} cannot be used in {listed}, where all rows count: {reason}")
        used = sum(any(found) for found in self.layers.values())
        if self.hidden and used:
            layers = "1 layer" if used == 1 else f"{used} layers"
            outputs = "; nor do the network's outputs there" if any(self.outputs) else ""
            lines.append(
                f"{self.name} hides {self.hidden:,} of {self.positions:,} positions: in {layers} their rows count in "
                f"no program, error or bound{outputs}"
            )
        return tuple(lines)

    def to_dict(self) -> dict[str, Any] | None:
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


def rows_that_count(matrices: Sequence[Tensor], counts: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """X of each group, of the rows that ``Counted.rows`` lets count."""
    if not counts:
        return tuple(matrices)
    return tuple(X if rows is None else X[rows] for X, rows in zip(matrices, counts, strict=True))


_MOST = 4


def _along(layout: Layout | None, mask: Tensor | None, axes: Sequence[int]) -> Tensor | None:
    if layout is None or mask is None or not layout.fits(axes, mask.shape):
        return None
    return layout.spread(mask, axes).reshape(-1)
