"""Which rows count: what a pass over the data shows of masks and of what layers see, and the decision by it.

A row may be left out of a layer's program if the outputs that count do not depend on what the layer computes there. The
lengths of axes say which rows that may be; where the lengths are ambiguous, or a model reads what its mask hides, they
say too much. So the layers' outputs at these rows are replaced by random ones on one batch, and the model's outputs
must not change, except at hidden positions of their own.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from convexprune.errors import EmptyCalibration
from convexprune.layers import input_positions
from convexprune.layers.memory import Batch, tensors_in
from convexprune.layers.support import supported
from convexprune.network.calibration import Calibration
from convexprune.network.forwards import Forward, evaluating, run_model
from convexprune.network.padding import Counted, Layout, Mask, Masks, layouts, mask_name, read_masks
from convexprune.network.passes import visible_outputs
from convexprune.network.taps import PROJECTED, Received, Taps, Trial, generator, halved, hooked, replaced, tapped
from convexprune.solvers.arrays import norm, working_dtype

_Options = dict[str, list[tuple[Layout | None, ...]]]
"""By layer the layouts of its groups that come into question."""

_Choice = Mapping[str, tuple[Layout | None, ...]]

_Call = tuple[tuple[tuple[tuple[int, ...], int] | None, ...], tuple[tuple[int, ...], ...]]
"""Of each mask its shape and how many positions count; of each group of the layer the lengths of its rows' axes."""


@dataclass(frozen=True, eq=False)
class _Hiding:
    """A batch with positions that are hidden and others that are not; the model, in eval mode, is left as found."""

    model: nn.Module
    batch: Batch
    masks: Masks
    taps: Taps
    forward: Forward | None
    trial: Trial

    def decide(
        self, options: _Options
    ) -> tuple[dict[str, tuple[Layout | None, ...]], tuple[Layout | None, ...], dict[str, str]]:
        """The layouts of layers and of outputs, and the layers of which all rows count, with the reason.

        ``options`` are the layouts of each layer's groups that lengths allow, in the order in which they are tried.
        """
        refused: dict[str, str] = {}
        chosen = {name: choices[0] for name, choices in options.items()}
        for name in halved(list(chosen), lambda names: self._outputs({name: chosen[name] for name in names}) is None):
            del chosen[name]
            found = next((choice for choice in options[name][1:] if self._outputs({name: choice}) is not None), None)
            if found is None:
                refused[name] = _READ
            else:
                chosen[name] = found
        # The same with what counts hidden, and what is hidden counting.
        inverse = replace(self, masks=tuple(None if mask is None else ~mask for mask in self.masks))
        if refused and inverse._outputs({name: options[name][0] for name in refused}) is not None:
            return {}, (), dict.fromkeys(options, _INVERTED)
        outputs = self._outputs(chosen)
        if outputs is None:  # together, though none alone
            refused |= dict.fromkeys(chosen, _READ)
            return {}, (), refused
        return {name: chosen[name] for name in options if name in chosen}, outputs, refused

    def sequences(self, groups: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """For each group of a layer the number of the sequence that its rows are of: 1 for a decoder's, else 0.

        A decoder's rows may be as many as the encoder's. They do not change with what the encoder is given at positions
        that are hidden. ``groups`` says how many groups each layer has.
        """
        own = {name: (0,) * count for name, count in groups.items()}
        if not isinstance(self.batch, Mapping) or not any(map(_is_decoders, *zip(*self.batch.items(), strict=True))):
            return own
        number = next(number for number, mask in enumerate(self.masks) if mask is not None)
        items = self.batch.items()
        filled = {k: self._filled(v, number) if self._is_input(k, v, number) else v for k, v in items}
        changed = {name: [False] * count for name, count in groups.items()}
        taps = {name: self.taps[name] for name in groups}
        pairs = zip(self._received(self.batch, taps), self._received(filled, taps), strict=False)
        for (name, before), (_, after) in pairs:
            differences = [(one.double() - other.double(), other) for one, other in zip(after, before, strict=True)]
            moved = [_size(difference) > _allowed(other) for difference, other in differences]
            every = moved if len(moved) == groups[name] else [any(moved)] * groups[name]
            changed[name] = [one or other for one, other in zip(changed[name], every, strict=True)]
        return {name: tuple(number if moved else 1 - number for moved in each) for name, each in changed.items()}

    def _received(self, batch: Batch, taps: Taps) -> list[tuple[str, list[Tensor]]]:
        """What the layers receive, call after call."""
        found: list[tuple[str, list[Tensor]]] = []

        def keep(name: str, raw: Received) -> None:
            found.append((name, [tensor.detach().clone() for tensor in tensors_in(raw)]))

        with tapped(taps, keep):
            run_model(self.model, batch, self.forward)
        return found

    def _is_input(self, key: str, value: Batch, number: int) -> bool:
        """Whether it is what the encoder, or the decoder, is given: laid out as its mask, and not the mask itself."""
        mask = self.masks[number]
        laid_out = mask is not None and isinstance(value, Tensor) and value.shape[:2] == mask.shape
        return laid_out and _is_decoders(key, value) == bool(number) and not key.endswith("mask")

    def _filled(self, value: Tensor, number: int) -> Tensor:
        """With each sample's first value that counts at the positions that are hidden."""
        mask = self.masks[number]
        assert mask is not None  # noqa: S101 - it is laid out as the value
        mask = mask.to(value.device)
        first = value[torch.arange(len(value), device=value.device), mask.int().argmax(1)]
        return torch.where(mask.reshape(*mask.shape, *[1] * (value.dim() - 2)), value, first[:, None].expand_as(value))

    def _outputs(self, choice: _Choice) -> tuple[Layout | None, ...] | None:
        """For each output the layout at whose hidden positions alone it changes; None if what counts changes."""
        after = self.trial.outputs_under(self._replaced(choice))
        if after is None:
            return None
        found = [self._changed(one, other) for one, other in zip(after, self.trial.outputs, strict=True)]
        return None if _EVERYWHERE in found else tuple(found)

    def _changed(self, after: Tensor, before: Tensor) -> Layout | None:
        moved, allowed = after.double() - before.double(), _allowed(before)
        if _size(moved) <= allowed:
            return None
        for number, mask in [(number, mask) for number, mask in enumerate(self.masks) if mask is not None]:
            for layout in layouts(before.shape, mask.shape):
                counts = layout.spread(mask.to(before.device), before.shape)
                if _size(torch.where(counts, moved, 0.0)) <= allowed:
                    return replace(layout, mask=number)
        return _EVERYWHERE

    @contextmanager
    def _replaced(self, choice: _Choice) -> Iterator[None]:
        generators = {name: generator(name) for name in choice}

        def noised(name: str, outputs: Tensor) -> Tensor:
            new, layer = outputs.detach().clone(), self.model.get_submodule(name)
            for Y, layout in zip(supported(layer).outputs(layer, new), choice[name], strict=True):
                self._draw_(Y, layout, generators[name])
            return new

        # Projections of attention are not among what it returns: their inputs stand for them.
        before = [
            (tap.module, partial(self._inputs_replaced, found))
            for name, found in choice.items()
            for tap in self.taps[name]
            if not tap.returns_outputs
        ]
        with hooked((), before), replaced({name: self.taps[name] for name in choice}, noised):
            yield

    def _draw_(self, rows: Tensor, layout: Layout | None, draws: torch.Generator) -> None:
        """Random values of the rows' size at hidden rows."""
        mask = None if layout is None else layout.of(self.masks)
        if layout is None or mask is None or not layout.fits(rows.shape[:-1], mask.shape):
            return
        hidden = ~layout.spread(mask.to(rows.device), rows.shape[:-1])
        size = float(rows.double().square().mean().sqrt()) or 1.0
        others = size * torch.randn((int(hidden.sum()), rows.shape[-1]), generator=draws)
        rows[hidden] = others.to(rows)

    def _inputs_replaced(
        self, found: Sequence[Layout | None], _module: nn.Module, args: Batch, kwargs: Batch
    ) -> tuple[Batch, Batch]:
        own, made = dict(zip(PROJECTED, args, strict=False)), dict[tuple[int, Layout | None], Tensor]()
        given = own | {key: kwargs[key] for key in PROJECTED if key in kwargs}
        draws = torch.Generator().manual_seed(0)
        for key, layout in zip(PROJECTED, found, strict=True):
            tensor = given[key]
            if (id(tensor), layout) not in made:  # queries that are the keys, too, remain so
                made[id(tensor), layout] = tensor.detach().clone()
                self._draw_(made[id(tensor), layout], layout, draws)
            given[key] = made[id(tensor), layout]
        first = tuple(given[key] for key in own)
        return (*first, *args[len(own) :]), {**kwargs, **{key: given[key] for key in given if key not in own}}


_EVERYWHERE = Layout(-1, -1)
_INVERTED = (
    "the model's outputs depend on what it computes at positions that are hidden and not on the rest, so it may be the "
    "other way round: 1 is where a position counts"
)
_READ = "the model's outputs depend on what it computes at the positions that are hidden"


def _is_decoders(key: Batch, value: Batch) -> bool:
    """Whether an entry of a batch is what a decoder is given, or is to give."""
    labels = key == "labels" and isinstance(value, Tensor) and value.dim() > 1
    return labels or key == "tgt" or str(key).startswith(("decoder_", "tgt_"))


def _size(tensor: Tensor) -> float:
    return float(norm(tensor))


def _allowed(before: Tensor) -> float:
    """How far rounding may move a tensor."""
    return max(2 * torch.finfo(before.dtype).eps, 1e-6) * _size(before.double())


class Sightings:
    """What passes by during a pass over the data: the masks of batches, and the lengths of what layers see of these."""

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        self._model, self._mask = model, mask
        self._now: Masks = ()
        self._example: tuple[Batch, Masks] | None = None
        self._tested = set[int]()  # masks that hide some positions of the example, and show some
        self._names: dict[str, None] = {}
        self._fault = ""
        self._positions = self._hidden = 0
        self._seen: dict[str, dict[_Call, int]] = {}
        self._rows: dict[str, list[int]] = {}

    def over(self, batches: Batch) -> Iterator[Batch]:
        """The batches, one after the other; raises as ``read_masks``, and EmptyCalibration if masks leave nothing."""
        for batch in batches:
            self._now, names, fault = read_masks(batch, self._mask)
            self._names |= dict.fromkeys(names)
            self._fault = self._fault or fault
            partly = set[int]()
            for number, mask in [(number, mask) for number, mask in enumerate(self._now) if mask is not None]:
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

    def counted(self, taps: Taps, forward: Forward | None) -> Counted:
        """Which rows count, once all has passed by."""
        name = " and ".join(self._names) or mask_name(self._mask)
        unused = {"": self._fault} if self._fault else {}
        if self._example is None or self._fault:
            return Counted(name, unused=unused, positions=self._positions, hidden=self._hidden)
        options: _Options = {}
        with evaluating(self._model):
            batch, masks = self._example
            hiding = _Hiding(self._model, batch, masks, taps, forward, Trial(self._model, batch, forward))
            sequences = hiding.sequences({layer: len(self._rows[layer]) for layer in self._seen})
            for layer, seen in self._seen.items():
                found, reason = _options(seen, sequences[layer], self._tested)
                if found:
                    options[layer] = found
                elif reason:
                    unused[layer] = reason
            chosen, outputs, refused = hiding.decide(options)
        unused |= refused
        left_out = {layer: _left_out(self._seen[layer], found) for layer, found in chosen.items()}
        return Counted(name, chosen, outputs, unused, self._positions, self._hidden, left_out)


def _options(
    seen: Mapping[_Call, int], sequences: Sequence[int], tested: Collection[int]
) -> tuple[list[tuple[Layout | None, ...]], str]:
    """The layouts that all calls of a layer allow for its groups; or why there is none, "" where it sees samples.

    ``sequences`` are those that the rows of each group are of; ``tested`` those of which an example hides positions.
    """
    found: list[list[Layout | None]] = []
    for group, number in enumerate(sequences):
        mask = number if number in tested else next(iter(tested))
        of = Layout(0, 0, mask=mask).of
        calls = [
            (size[0], axes[group])
            for masks, axes in seen
            if (size := of(masks)) is not None and not _whole(*size, axes[group])
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


def _left_out(seen: Mapping[_Call, int], found: Sequence[Layout | None]) -> tuple[int, ...]:
    """Rows of each group, over all calls, that do not count."""
    totals = [0] * len(found)
    for (masks, axes), calls in seen.items():
        for group, (lengths, layout) in enumerate(zip(axes, found, strict=True)):
            size = None if layout is None else layout.of(masks)
            if layout is not None and size is not None and layout.fits(lengths, size[0]):
                (shape, visible), rows = size, math.prod(lengths)
                totals[group] += calls * (rows - rows * visible // (shape[0] * shape[1]))
    return tuple(totals)


def visible_size(model: nn.Module, calibration: Calibration, counted: Counted, forward: Forward | None) -> float:
    """‖f(x)‖_F over the calibration data, of the outputs that count."""
    found = visible_outputs(model, calibration, counted, forward)
    return math.hypot(*(float(norm(outputs.to(working_dtype(outputs.dtype)))) for outputs in found))
