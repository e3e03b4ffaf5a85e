"""Which rows count: what a pass over the data shows of masks and of what layers see, and the decision by it."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from convexprune.errors import EmptyCalibration
from convexprune.layers import input_positions
from convexprune.network.calibration import Calibration
from convexprune.network.forwards import Forward, evaluating, outputs_of, run_model
from convexprune.network.hiding import HiddenRows, Options
from convexprune.network.padding import Counted, Layout, Mask, Masks, layouts, mask_name, read_masks
from convexprune.network.taps import Received, Tap, tapped
from convexprune.solvers.arrays import norm, working_dtype


class Sightings:
    """What passes by during a pass over the data: the masks of batches, and the lengths of what layers see of these.

    Args:
        model: The network.
        mask: As for ``prune_``.
    """

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        self._model, self._mask = model, mask
        self._now: Masks = ()
        self._example: tuple[Any, Masks] | None = None
        self._tested: set[int] = set()  # masks that hide some positions of the example, and show some
        self._names: dict[str, None] = {}
        self._fault = ""
        self._positions = self._hidden = 0
        # Of each layer, call after call: each mask's shape and how many positions count, the axes of each group.
        self._seen: dict[str, dict[tuple[Any, ...], int]] = {}
        self._rows: dict[str, list[int]] = {}

    def over(self, batches: Any) -> Iterator[Any]:
        """The batches, one after the other.

        Raises:
            InvalidInput: As ``read_masks``.
            EmptyCalibration: The masks leave no position: raised at the end.
        """
        for batch in batches:
            self._now, names, fault = read_masks(batch, self._mask)
            self._names |= dict.fromkeys(names)
            self._fault = self._fault or fault
            partly = set[int]()
            for number, mask in enumerate(self._now):
                if mask is not None:
                    hidden = int((~mask).sum())
                    self._positions, self._hidden = self._positions + mask.numel(), self._hidden + hidden
                    partly |= {number} if 0 < hidden < mask.numel() else set()
            if len(partly) > len(self._tested):
                self._example, self._tested = (batch, self._now), partly
            yield batch
        if self._hidden and self._hidden == self._positions and not self._fault:
            raise EmptyCalibration(f"{mask_name(self._mask)} hides every position: nothing is left to calibrate on")

    def see(self, name: str, raw: Received) -> None:
        """What a layer receives."""
        axes = input_positions(self._model.get_submodule(name), raw)
        counts = [lengths.numel() for lengths in axes]
        self._rows[name] = [a + b for a, b in zip(self._rows.get(name, [0] * len(axes)), counts, strict=True)]
        if self._now:
            masks = tuple(None if mask is None else (tuple(mask.shape), int(mask.sum())) for mask in self._now)
            key = (masks, tuple(map(tuple, axes)))
            seen = self._seen.setdefault(name, {})
            seen[key] = seen.get(key, 0) + 1

    def rows(self, name: str, counted: Counted) -> tuple[int, ...]:
        """How many rows of each group of a layer count."""
        left_out = counted.left_out.get(name, (0,) * len(self._rows[name]))
        return tuple(rows - hidden for rows, hidden in zip(self._rows[name], left_out, strict=True))

    def counted(self, taps: Mapping[str, Sequence[Tap]], forward: Forward | None) -> Counted:
        """Which rows count, once all has passed by.

        Args:
            taps: Where the layers' inputs are received.
            forward: As for ``capture``.
        """
        name = " and ".join(self._names) or mask_name(self._mask)
        unused = {"": self._fault} if self._fault else {}
        if self._example is None or self._fault:
            return Counted(name, unused=unused, positions=self._positions, hidden=self._hidden)
        options: Options = {}
        with evaluating(self._model):
            batch, masks = self._example
            hidden = HiddenRows(self._model, batch, masks, taps, forward)
            sequences = hidden.sequences({layer: len(self._rows[layer]) for layer in self._seen})
            for layer, seen in self._seen.items():
                found, reason = _options(seen, sequences[layer], self._tested)
                if found:
                    options[layer] = found
                elif reason:
                    unused[layer] = reason
            chosen, outputs, refused = hidden.decide(options)
        unused |= refused
        left_out = {layer: _left_out(self._seen[layer], found) for layer, found in chosen.items()}
        return Counted(name, chosen, outputs, unused, self._positions, self._hidden, left_out)


def counted_rows(
    model: nn.Module, calibration: Calibration, taps: Mapping[str, Sequence[Tap]], forward: Forward | None
) -> Counted:
    """Which rows count, by a pass over the data; without one where no mask hides anything.

    Args:
        model: The network; left as found.
        calibration: The data, with their mask.
        taps: For each layer where its inputs are received.
        forward: As for ``capture``.

    Raises:
        InvalidInput, EmptyCalibration: As ``Sightings.over``.
    """
    passing = Sightings(model, calibration.mask)
    if all(
        mask is None or bool(mask.all()) for batch in passing.over(calibration) for mask in calibration.masks_of(batch)
    ):
        return passing.counted(taps, forward)
    passing = Sightings(model, calibration.mask)
    with evaluating(model), tapped(taps, passing.see):
        for batch in passing.over(calibration):
            run_model(model, batch, forward)
    return passing.counted(taps, forward)


def _options(
    seen: Mapping[tuple[Any, ...], int], sequences: Sequence[int], tested: Collection[int]
) -> tuple[list[tuple[Layout | None, ...]], str]:
    """The layouts that all calls of a layer allow for its groups; or why there is none, "" where it sees samples.

    Args:
        seen: Of the layer.
        sequences: Of each group the sequence that its rows are of.
        tested: The sequences of which an example has hidden positions.
    """
    found: list[list[Layout | None]] = []
    for group, number in enumerate(sequences):
        mask = number if number in tested else next(iter(tested))
        calls = [
            (masks[mask][0], axes[group])
            for masks, axes in seen
            if mask < len(masks) and masks[mask] is not None and not _whole(masks[mask][0], masks[mask][1], axes[group])
        ]
        if not calls:
            found.append([None])
            continue
        first, *others = calls
        fits = [one for one in layouts(first[1], first[0]) if all(one.fits(axes, shape) for shape, axes in others)]
        if not fits:
            shape, axes = next(((s, a) for s, a in calls if not any(layouts(a, s))), first)
            return [], f"it sees rows of {list(axes)}, where the mask is {list(shape)}"
        if number not in tested:
            return [], _ANOTHER
        found.append([replace(one, mask=number) for one in fits])
    if all(choices == [None] for choices in found):
        return [], ""
    most = max(map(len, found))
    return [tuple(choices[min(k, len(choices) - 1)] for choices in found) for k in range(most)], ""


_ANOTHER = "it sees the positions of another sequence, an encoder's or a decoder's, of which no mask is known"


def _whole(shape: Sequence[int], visible: int, axes: Sequence[int]) -> bool:
    """Whether rows are samples and no positions, or none is hidden: those that count were picked before."""
    longer = [length for length in axes if length != 1]
    return longer in ([shape[0]], []) or (longer == [visible] and visible != shape[0] * shape[1])


def _left_out(seen: Mapping[tuple[Any, ...], int], found: Sequence[Layout | None]) -> tuple[int, ...]:
    """Rows of each group, over all calls, that do not count."""
    totals = [0] * len(found)
    for (masks, axes), calls in seen.items():
        for group, (lengths, layout) in enumerate(zip(axes, found, strict=True)):
            if layout is None or layout.mask >= len(masks) or masks[layout.mask] is None:
                continue
            shape, visible = masks[layout.mask]
            if layout.fits(lengths, shape):
                rows = torch.Size(lengths).numel()
                totals[group] += calls * (rows - rows * visible // (shape[0] * shape[1]))
    return tuple(totals)


def visible_size(model: nn.Module, calibration: Calibration, counted: Counted, forward: Forward | None) -> float:
    """‖f(x)‖_F over the calibration data, of the outputs that count."""
    sizes = []
    with evaluating(model):
        for batch in calibration:
            returned = run_model(model, batch, forward)
            found = outputs_of(counted.visible(returned, calibration.masks_of(batch)))
            sizes.append(float(norm(found.to(working_dtype(found.dtype)))))
    return math.hypot(*sizes)
