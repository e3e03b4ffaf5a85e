"""Which rows count: what a pass over the data shows of masks and of what layers see, and the decision by it.

A row may be left out of a layer's program if the outputs that count do not depend on what the layer computes there. The
lengths of axes say which rows that may be; where the lengths are ambiguous, or a model reads what its mask hides, they
say too much. So the layers' outputs at these rows are replaced by random ones on one batch, and the model's outputs
must not change, except at hidden positions of their own.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from convexprune.errors import EmptyCalibration
from convexprune.layers import input_positions
from convexprune.layers.memory import Batch, tensors_in
from convexprune.layers.support import supported
from convexprune.network.calibration import Calibration
from convexprune.network.forwards import Forward, evaluating, run_model
from convexprune.network.padding import Counted, Layout, Mask, Masks, layouts, mask_name, read_masks, where_counted
from convexprune.network.passes import visible_outputs
from convexprune.network.taps import Received, Tap, Taps, Trial, at, attention_of, generator, halved, hooked, tapped
from convexprune.solvers.arrays import norm, working_dtype

_Layouts = tuple[Layout | None, ...]
"""Of each group of a layer, or of each output; None where all counts."""


class _Call(NamedTuple):
    """What a call of a layer shows of lengths."""

    masks: tuple[tuple[tuple[int, ...], int] | None, ...]  # of each its shape, and how many positions count
    axes: tuple[tuple[int, ...], ...]  # those that the rows of each group run over

    def rows(self, group: int, layout: Layout | None) -> int:
        """How many rows of a group count."""
        axes, size = self.axes[group], None if layout is None else layout.of(self.masks)
        if layout is None or size is None or not layout.fits(axes, size[0]):
            return math.prod(axes)
        return math.prod(axes) * size[1] // math.prod(size[0])


@dataclass(frozen=True, eq=False)
class _Hiding:
    """A batch with positions that are hidden and others that are not; the model, in eval mode, is left as found."""

    trial: Trial
    masks: Masks
    taps: Taps

    def decide(self, options: Mapping[str, Sequence[_Layouts]]) -> tuple[dict[str, _Layouts], _Layouts, dict[str, str]]:
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
            return {}, (), refused | dict.fromkeys(chosen, _READ)
        return {name: chosen[name] for name in options if name in chosen}, outputs, refused

    def sequences(self, groups: Mapping[str, int], number: int) -> dict[str, tuple[int, ...]]:
        """For each group of a layer the number of the sequence that its rows are of: 1 for a decoder's, else 0.

        A decoder's rows may be as many as the encoder's. They do not change with what the encoder is given at positions
        that are hidden. ``groups`` says how many groups each layer has, ``number`` whose positions the batch hides.
        """
        batch, mask = self.trial.batch, self.masks[number]
        if mask is None or not isinstance(batch, Mapping) or not any(_is_decoders(*item) for item in batch.items()):
            return {name: (0,) * count for name, count in groups.items()}

        def other(key: str, value: Batch) -> Batch:
            """Of what this sequence is given, but for the mask, values that count at the positions that are hidden."""
            laid_out = isinstance(value, Tensor) and value.shape[:2] == mask.shape
            if not laid_out or _is_decoders(key, value) != bool(number) or key.endswith("mask"):
                return value
            counts = mask.to(value.device)
            return torch.where(counts.reshape(*counts.shape, *[1] * (value.dim() - 2)), value, value[counts][0])

        changed = {name: [False] * count for name, count in groups.items()}
        pairs = zip(
            self._received(batch, groups),
            self._received({k: other(k, v) for k, v in batch.items()}, groups),
            strict=False,
        )
        for (name, before), (_, after) in pairs:
            moved = [not _stays(one, two) for one, two in zip(after, before, strict=True)]
            every = moved if len(moved) == groups[name] else [any(moved)] * groups[name]
            changed[name] = [one or two for one, two in zip(changed[name], every, strict=True)]
        return {name: tuple(number if moved else 1 - number for moved in each) for name, each in changed.items()}

    def _received(self, batch: Batch, names: Collection[str]) -> list[tuple[str, list[Tensor]]]:
        """What these layers receive, call after call."""
        found: list[tuple[str, list[Tensor]]] = []
        taps = {name: self.taps[name] for name in names}
        with tapped(taps, lambda name, raw: found.append((name, [t.detach().clone() for t in tensors_in(raw)]))):
            run_model(self.trial.model, batch, self.trial.forward)
        return found

    def _outputs(self, choice: Mapping[str, _Layouts]) -> _Layouts | None:
        """For each output the layout at whose hidden positions alone it changes; None if what counts changes."""
        after = self.trial.outputs_under(self._replaced(choice))
        pairs = [] if after is None else zip(after, self.trial.outputs, strict=True)
        found = [layout for one, other in pairs for layout in self._changed(one, other)]
        return tuple(found) if after is not None and len(found) == len(after) else None

    def _changed(self, after: Tensor, before: Tensor) -> Iterator[Layout | None]:
        """The first layout by which all that counts stays; nothing if there is none."""
        known = [(number, mask) for number, mask in enumerate(self.masks) if mask is not None]
        found = [replace(one, mask=number) for number, mask in known for one in layouts(before.shape, mask.shape)]
        for layout in (None, *found):
            if _stays(after, before, where_counted(layout, self.masks, before.shape)):
                yield layout
                return

    def _replaced(self, choice: Mapping[str, _Layouts]) -> AbstractContextManager[None]:
        """Inside, these layers' outputs are random values of their size at the rows that are hidden."""
        generators = {name: generator(name) for name in choice}

        def hook(name: str, tap: Tap, module: nn.Module, args: Batch, kwargs: Batch, returned: Batch) -> Batch:
            layer, outputs = self.trial.model.get_submodule(name), tap.outputs(returned)
            kind = supported(layer)
            if outputs is not None:
                new = outputs.detach().clone()
                self._draw_(kind.outputs(layer, new), choice[name], generators[name])
                return tap.with_outputs(returned, new)
            # Projections of attention are not among what it returns.
            inputs = kind.inputs(layer, tap.received(args, kwargs, returned))
            made = [functional.linear(x, *group) for x, group in zip(inputs, kind.groups(layer), strict=True)]
            self._draw_(made, choice[name], generators[name])
            return (attention_of(module, made, args, kwargs), *returned[1:])  # type: ignore[arg-type]

        return hooked(at({name: self.taps[name] for name in choice}, hook))

    def _draw_(self, outputs: Sequence[Tensor], found: _Layouts, draws: torch.Generator) -> None:
        for rows, layout in zip(outputs, found, strict=True):
            counts = where_counted(layout, self.masks, rows.shape[:-1])
            if counts is not None:
                hidden, size = ~counts.to(rows.device), float(rows.double().square().mean().sqrt()) or 1.0
                others = size * torch.randn((int(hidden.sum()), rows.shape[-1]), generator=draws)
                rows[hidden] = others.to(rows)


_INVERTED = (
    "the model's outputs depend on what it computes at positions that are hidden and not on the rest, so it may be the "
    "other way round: 1 is where a position counts"
)
_READ = "the model's outputs depend on what it computes at the positions that are hidden"
_ANOTHER = "it sees the positions of another sequence, an encoder's or a decoder's, of which no mask is known"


def _is_decoders(key: Batch, value: Batch) -> bool:
    """Whether an entry of a batch is what a decoder is given, or is to give."""
    labels = key == "labels" and isinstance(value, Tensor) and value.dim() > 1
    return labels or key == "tgt" or str(key).startswith(("decoder_", "tgt_"))


def _stays(after: Tensor, before: Tensor, counts: Tensor | None = None) -> bool:
    """Whether a tensor moves by no more than rounding may move it, where it counts."""
    moved = after.double() - before.double()
    if counts is not None:
        moved = torch.where(counts.to(moved.device), moved, 0.0)
    return float(norm(moved)) <= max(2 * torch.finfo(before.dtype).eps, 1e-6) * float(norm(before.double()))


class Sightings:
    """What passes by during a pass over the data: the masks of batches, and the lengths of what layers see of these."""

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        self._model, self._mask = model, mask
        self._example: tuple[Batch, Masks] | None = None
        self._tested = set[int]()  # masks that hide some positions of the example, and show some
        self._names: dict[str, None] = {}
        self._fault = ""
        self._positions = self._hidden = 0
        self._now = _Call((), ())  # without what a layer sees
        self._seen: dict[str, Counter[_Call]] = {}

    def over(self, batches: Batch) -> Iterator[Batch]:
        """The batches, one after the other; raises as ``read_masks``, and EmptyCalibration if masks leave nothing."""
        for batch in batches:
            masks, names, fault = read_masks(batch, self._mask)
            self._names |= dict.fromkeys(names)
            self._fault = self._fault or fault
            hidden = {number: int((~mask).sum()) for number, mask in enumerate(masks) if mask is not None}
            sizes = [None if mask is None else (tuple(mask.shape), int(mask.sum())) for mask in masks]
            self._now = _Call(tuple(sizes), ())
            self._positions += sum(mask.numel() for mask in masks if mask is not None)
            self._hidden += sum(hidden.values())
            partly = {number for number, size in enumerate(sizes) if size and size[1] and hidden[number]}
            if len(partly) > len(self._tested):
                self._example, self._tested = (batch, masks), partly
            yield batch
        if self._hidden and self._hidden == self._positions and not self._fault:
            raise EmptyCalibration(f"{mask_name(self._mask)} hides every position: nothing is left to calibrate on")

    def see(self, name: str, raw: Received) -> None:
        """What a layer receives."""
        axes = tuple(map(tuple, input_positions(self._model.get_submodule(name), raw)))
        self._seen.setdefault(name, Counter())[self._now._replace(axes=axes)] += 1

    def rows(self, name: str, counted: Counted | None = None) -> tuple[int, ...]:
        """How many rows of each group of a layer there are, or count."""
        calls = self._seen[name]
        groups = range(len(next(iter(calls)).axes))
        found = [None for _ in groups] if counted is None else counted.layers.get(name, [None for _ in groups])
        return tuple(sum(n * call.rows(group, found[group]) for call, n in calls.items()) for group in groups)

    def counted(self, taps: Taps, forward: Forward | None) -> Counted:
        """Which rows count, once all has passed by."""
        name = " and ".join(self._names) or mask_name(self._mask)
        found = Counted(
            name, unused={"": self._fault} if self._fault else {}, positions=self._positions, hidden=self._hidden
        )
        if self._example is None or self._fault:
            return found
        options: dict[str, list[_Layouts]] = {}
        unused: dict[str, str] = {}
        with evaluating(self._model):
            batch, masks = self._example
            hiding = _Hiding(Trial(self._model, batch, forward), masks, taps)
            sequences = hiding.sequences({layer: len(self.rows(layer)) for layer in self._seen}, min(self._tested))
            for layer, seen in self._seen.items():
                choices, reason = _options([call for call in seen if call.masks], sequences[layer], self._tested)
                if choices:
                    options[layer] = choices
                elif reason:
                    unused[layer] = reason
            chosen, outputs, refused = hiding.decide(options)
        found = replace(found, layers=chosen, outputs=outputs, unused=unused | refused)
        pairs = {layer: zip(self.rows(layer), self.rows(layer, found), strict=True) for layer in chosen}
        return replace(found, left_out={layer: tuple(a - b for a, b in pair) for layer, pair in pairs.items()})


def _options(seen: Sequence[_Call], sequences: Sequence[int], tested: Collection[int]) -> tuple[list[_Layouts], str]:
    """The layouts that all calls of a layer allow for its groups; or why there is none, "" where it sees samples.

    ``sequences`` are those that the rows of each group are of; ``tested`` those of which an example hides positions.
    """
    found: list[list[Layout | None]] = []
    for group, number in enumerate(sequences):
        of = Layout(0, 0, mask=number if number in tested else min(tested)).of
        sizes = [(size, call.axes[group]) for call in seen if (size := of(call.masks)) is not None]
        calls = [(shape, axes) for (shape, visible), axes in sizes if not _whole(shape, visible, axes)]
        if not calls:
            found.append([None])
            continue
        shape, axes = next(((s, a) for s, a in calls if not any(layouts(a, s))), calls[0])
        fits = [one for one in layouts(axes, shape) if all(one.fits(a, s) for s, a in calls)]
        if not fits:
            return [], f"it sees rows of {list(axes)}, where the mask is {list(shape)}"
        if number not in tested:
            return [], _ANOTHER
        found.append([replace(one, mask=number) for one in fits])
    most = max(map(len, found)) if any(choices != [None] for choices in found) else 0
    return [tuple(choices[min(k, len(choices) - 1)] for choices in found) for k in range(most)], ""


def _whole(shape: Sequence[int], visible: int, axes: Sequence[int]) -> bool:
    """Whether rows are samples and no positions, or none is hidden: those that count were picked before."""
    longer = [length for length in axes if length != 1]
    return longer in ([shape[0]], []) or (longer == [visible] and visible != shape[0] * shape[1])


def visible_size(model: nn.Module, calibration: Calibration, counted: Counted, forward: Forward | None) -> float:
    """‖f(x)‖_F over the calibration data, of the outputs that count."""
    found = visible_outputs(model, calibration, counted, forward)
    return math.hypot(*(float(norm(outputs.to(working_dtype(outputs.dtype)))) for outputs in found))
