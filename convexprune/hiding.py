"""Which rows a mask hides, layer by layer: by the shapes of a whole pass, and by what the outputs depend on.

A row may be left out of a layer's program if the outputs that count do not depend on what the layer computes there. The
lengths of axes say which rows that may be; where the lengths are ambiguous, or a model reads what its mask hides, they
say too much. So on one batch the layers' outputs at these rows are replaced by random ones, and the model's outputs
must not change, except at hidden positions of their own.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from convexprune.calibration import Calibration
from convexprune.errors import EmptyCalibration
from convexprune.forwards import Forward, evaluating, outputs_of, run_model
from convexprune.matrices import input_positions
from convexprune.matrices.support import supported
from convexprune.padding import Counted, Layout, Mask, layouts, mask_name, read_mask
from convexprune.solvers.arrays import norm, working_dtype
from convexprune.taps import Received, Tap, tapped
from convexprune.watch import tensors_in

__all__ = ["Sightings", "counted_rows", "visible_size"]

_Choice = Mapping[str, tuple[Layout | None, ...]]
_Options = dict[str, list[tuple[Layout | None, ...]]]


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
        options: _Options = {}
        for layer, seen in self._seen.items():
            found, reason = _options(seen)
            if found:
                options[layer] = found
            elif reason:
                unused[layer] = reason
        with evaluating(self._model):
            chosen, outputs, refused = _Trial(self._model, *self._example, taps, forward).decide(options)
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


class _Trial:
    """One batch, of which the layers' outputs at hidden rows are replaced; the model must be in eval mode."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        mask: Tensor,
        taps: Mapping[str, Sequence[Tap]],
        forward: Forward | None,
    ) -> None:
        self._model, self._batch, self._mask, self._taps, self._forward = model, batch, mask, taps, forward
        self._before = self._run({})

    def decide(
        self, options: _Options
    ) -> tuple[dict[str, tuple[Layout | None, ...]], tuple[Layout | None, ...], dict[str, str]]:
        """The layouts of layers and of outputs, and the layers of which rows that are hidden do count."""
        chosen = {name: choices[0] for name, choices in options.items()}
        refused = {}
        for name in self._leaking(chosen):
            del chosen[name]
            found = next((choice for choice in options[name][1:] if self._outputs({name: choice}) is not None), None)
            if found is None:
                refused[name] = _READ
            else:
                chosen[name] = found
        outputs = self._outputs(chosen)
        if outputs is None:  # together, though none alone
            refused |= dict.fromkeys(chosen, _READ)
            return {}, (), refused
        return {name: chosen[name] for name in options if name in chosen}, outputs, refused

    def _leaking(self, choice: _Choice) -> list[str]:
        """The layers of which the outputs that count show the replacement: found by halving."""
        if not choice or self._outputs(choice) is not None:
            return []
        names = list(choice)
        if len(names) == 1:
            return names
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        found = [name for half in halves for name in self._leaking({name: choice[name] for name in half})]
        return found or names

    def _outputs(self, choice: _Choice) -> tuple[Layout | None, ...] | None:
        """For each output the layout at whose hidden positions alone it changes; None if what counts changes."""
        try:
            after = self._run(choice)
        except (torch.cuda.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # noqa: BLE001 - whatever the model raises on values that it has not seen
            return None
        if [tensor.shape for tensor in after] != [tensor.shape for tensor in self._before]:
            return None
        found = []
        for one, other in zip(after, self._before, strict=True):
            layout = self._changed(one, other)
            if layout is _EVERYWHERE:
                return None
            found.append(layout)
        return tuple(found)

    def _changed(self, after: Tensor, before: Tensor) -> Layout | None:
        moved, size = after.double() - before.double(), float(before.double().norm())
        allowed = max(2 * torch.finfo(before.dtype).eps, 1e-6) * size
        if float(moved.norm()) <= allowed:
            return None
        for layout in layouts(before.shape, self._mask.shape):
            counts = layout.spread(self._mask.to(before.device), before.shape)
            if float(torch.where(counts, moved, 0.0).norm()) <= allowed:
                return layout
        return _EVERYWHERE

    def _run(self, choice: _Choice) -> list[Tensor]:
        with self._replaced(choice):
            returned = run_model(self._model, self._batch, self._forward)
        return [tensor.detach().clone() for tensor in tensors_in(returned) if tensor.is_floating_point()]

    @contextmanager
    def _replaced(self, choice: _Choice) -> Iterator[None]:
        with ExitStack() as stack:
            for name, found in choice.items():
                layer = self._model.get_submodule(name)
                noise = partial(self._noised, layer, found, torch.Generator().manual_seed(crc32(name.encode())))
                for tap in self._taps[name]:
                    if tap.plain or tap.module is not layer:
                        hook = partial(_outputs_replaced, tap, noise)
                        stack.enter_context(tap.module.register_forward_hook(hook, prepend=True))
                    else:  # projections of attention, which it does not return: their inputs stand for them
                        before = partial(self._inputs_replaced, found)
                        stack.enter_context(tap.module.register_forward_pre_hook(before, with_kwargs=True))
            yield

    def _noised(
        self, layer: nn.Module, found: Sequence[Layout | None], draws: torch.Generator, outputs: Tensor
    ) -> Tensor:
        """Outputs with others at hidden rows, random and of their size."""
        new = outputs.detach().clone()
        for Y, layout in zip(supported(layer).outputs(layer, new), found, strict=True):
            self._draw_(Y, layout, draws)
        return new

    def _draw_(self, rows: Tensor, layout: Layout | None, draws: torch.Generator) -> None:
        if layout is None or not layout.fits(rows.shape[:-1], self._mask.shape):
            return
        hidden = ~layout.spread(self._mask.to(rows.device), rows.shape[:-1])
        size = float(rows.double().square().mean().sqrt()) or 1.0
        others = size * torch.randn((int(hidden.sum()), rows.shape[-1]), generator=draws)
        rows[hidden] = others.to(rows)

    def _inputs_replaced(
        self, found: Sequence[Layout | None], _module: nn.Module, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        own, made = dict(zip(_PROJECTED, args, strict=False)), dict[tuple[int, Layout | None], Tensor]()
        given = own | {key: kwargs[key] for key in _PROJECTED if key in kwargs}
        draws = torch.Generator().manual_seed(0)
        for key, layout in zip(_PROJECTED, found, strict=True):
            tensor = given[key]
            if (id(tensor), layout) not in made:  # queries that are the keys, too, remain so
                made[id(tensor), layout] = tensor.detach().clone()
                self._draw_(made[id(tensor), layout], layout, draws)
            given[key] = made[id(tensor), layout]
        first = tuple(given[key] for key in own)
        return (*first, *args[len(own) :]), {**kwargs, **{key: given[key] for key in given if key not in own}}


_PROJECTED = ("query", "key", "value")
_EVERYWHERE = Layout(-1, -1)
_READ = "the model's outputs depend on what it computes at the positions that are hidden"


def _outputs_replaced(
    tap: Tap, noise: Callable[[Tensor], Tensor], _module: nn.Module, _args: Any, returned: Any
) -> Any:
    return noise(returned) if tap.plain else (noise(returned[0]), *returned[1:])
