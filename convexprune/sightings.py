"""Which rows count: what a pass over the data shows of masks and of what layers see, and the decision by it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.calibration import Calibration
from convexprune.errors import EmptyCalibration
from convexprune.forwards import Forward, evaluating, outputs_of, run_model
from convexprune.hiding import HiddenRows, Options
from convexprune.matrices import input_positions
from convexprune.padding import Counted, Layout, Mask, layouts, mask_name, read_mask
from convexprune.solvers.arrays import norm, working_dtype
from convexprune.taps import Received, Tap, tapped

__all__ = ["Sightings", "counted_rows", "visible_size"]


class Sightings:
    """What passes by during a pass over the data: the masks of batches, and the lengths of what layers see of these.

    Args:
        model: The network.
        mask: As for ``prune_``.
    """

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        self._model, self._mask = model, mask
        self._now: Tensor | None = None
        self._example: tuple[Any, Tensor] | None = None
        self._fault = ""
        self._positions = self._hidden = 0
        # Of each layer, call after call: the mask's shape, how many positions count, the axes of each group.
        self._seen: dict[str, dict[tuple[Any, ...], int]] = {}
        self._rows: dict[str, list[int]] = {}

    def over(self, batches: Any) -> Iterator[Any]:
        """The batches, one after the other.

        Raises:
            InvalidInput: As ``read_mask``.
            EmptyCalibration: The masks leave no position: raised at the end.
        """
        for batch in batches:
            self._now, fault = read_mask(batch, self._mask)
            self._fault = self._fault or fault
            if self._now is not None:
                hidden = int((~self._now).sum())
                self._positions, self._hidden = self._positions + self._now.numel(), self._hidden + hidden
                if self._example is None and 0 < hidden < self._now.numel():
                    self._example = batch, self._now
            yield batch
        if self._hidden and self._hidden == self._positions:
            raise EmptyCalibration(f"{mask_name(self._mask)} hides every position: nothing is left to calibrate on")

    def see(self, name: str, raw: Received) -> None:
        """What a layer receives."""
        axes = input_positions(self._model.get_submodule(name), raw)
        counts = [lengths.numel() for lengths in axes]
        self._rows[name] = [a + b for a, b in zip(self._rows.get(name, [0] * len(axes)), counts, strict=True)]
        if self._now is not None:
            key = (tuple(self._now.shape), int(self._now.sum()), tuple(map(tuple, axes)))
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
        name = mask_name(self._mask)
        unused = {"": self._fault} if self._fault else {}
        if self._example is None:
            return Counted(name, unused=unused, positions=self._positions, hidden=self._hidden)
        options: Options = {}
        for layer, seen in self._seen.items():
            found, reason = _options(seen)
            if found:
                options[layer] = found
            elif reason:
                unused[layer] = reason
        with evaluating(self._model):
            chosen, outputs, refused = HiddenRows(self._model, *self._example, taps, forward).decide(options)
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
    if all((mask := calibration.mask_of(batch)) is None or bool(mask.all()) for batch in passing.over(calibration)):
        return passing.counted(taps, forward)
    passing = Sightings(model, calibration.mask)
    with evaluating(model), tapped(taps, passing.see):
        for batch in passing.over(calibration):
            run_model(model, batch, forward)
    return passing.counted(taps, forward)


def _options(seen: Mapping[tuple[Any, ...], int]) -> tuple[list[tuple[Layout | None, ...]], str]:
    """The layouts that all calls of a layer allow for its groups; or why there is none, "" where it sees samples."""
    groups = len(next(iter(seen))[2])
    found: list[list[Layout | None]] = []
    for group in range(groups):
        calls = [(shape, axes[group]) for shape, visible, axes in seen if not _whole(shape, visible, axes[group])]
        if not calls:
            found.append([None])
            continue
        first, *others = calls
        fits = [one for one in layouts(first[1], first[0]) if all(one.fits(axes, shape) for shape, axes in others)]
        if not fits:
            shape, axes = next(((s, a) for s, a in calls if not any(layouts(a, s))), first)
            return [], f"it sees rows of {list(axes)}, where the mask is {list(shape)}"
        found.append(list(fits))
    if all(choices == [None] for choices in found):
        return [], ""
    most = max(map(len, found))
    return [tuple(choices[min(k, len(choices) - 1)] for choices in found) for k in range(most)], ""


def _whole(shape: Sequence[int], visible: int, axes: Sequence[int]) -> bool:
    """Whether rows are samples and no positions, or none is hidden: those that count were picked before."""
    longer = [length for length in axes if length != 1]
    return longer in ([shape[0]], []) or (longer == [visible] and visible != shape[0] * shape[1])


def _left_out(seen: Mapping[tuple[Any, ...], int], found: Sequence[Layout | None]) -> tuple[int, ...]:
    """Rows of each group, over all calls, that do not count."""
    totals = [0] * len(found)
    for (shape, visible, axes), calls in seen.items():
        for group, (lengths, layout) in enumerate(zip(axes, found, strict=True)):
            if layout is not None and layout.fits(lengths, shape):
                rows = torch.Size(lengths).numel()
                totals[group] += calls * (rows - rows * visible // (shape[0] * shape[1]))
    return tuple(totals)


def visible_size(model: nn.Module, calibration: Calibration, counted: Counted, forward: Forward | None) -> float:
    """‖f(x)‖_F over the calibration data, of the outputs that count."""
    sizes = []
    with evaluating(model):
        for batch in calibration:
            returned = run_model(model, batch, forward)
            found = outputs_of(counted.visible(returned, calibration.mask_of(batch)))
            sizes.append(float(norm(found.to(working_dtype(found.dtype)))))
    return math.hypot(*sizes)
