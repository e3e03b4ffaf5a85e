"""Which of a model's rows are really hidden: what its outputs depend on, found by replacing values on one batch.

A row may be left out of a layer's program if the outputs that count do not depend on what the layer computes there. The
lengths of axes say which rows that may be; where the lengths are ambiguous, or a model reads what its mask hides, they
say too much. So the layers' outputs at these rows are replaced by random ones, and the model's outputs must not change,
except at hidden positions of their own.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.layers.support import supported
from convexprune.network.forwards import Forward, run_model
from convexprune.network.interventions import Trial, generator, halved
from convexprune.network.padding import Layout, Masks, layouts
from convexprune.network.taps import Received, Tap, tapped
from convexprune.network.watch import tensors_in
from convexprune.solvers.arrays import norm

Options = dict[str, list[tuple[Layout | None, ...]]]
"""By layer the layouts of its groups that come into question."""

_Choice = Mapping[str, tuple[Layout | None, ...]]


class HiddenRows:
    """One batch, of which the layers' outputs at hidden rows are replaced; the model must be in eval mode.

    Args:
        model: The network; left as found.
        batch: A checked batch of which some positions are hidden, and some are not.
        masks: Its masks.
        taps: Where the layers' inputs are received.
        forward: As for ``capture``.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        masks: Masks,
        taps: Mapping[str, Sequence[Tap]],
        forward: Forward | None,
    ) -> None:
        self._model, self._batch, self._masks, self._taps, self._forward = model, batch, masks, taps, forward
        self._trial = Trial(model, batch, forward)

    def decide(
        self, options: Options
    ) -> tuple[dict[str, tuple[Layout | None, ...]], tuple[Layout | None, ...], dict[str, str]]:
        """The layouts of layers and of outputs, and the layers of which all rows count, with the reason.

        Args:
            options: By layer the layouts of its groups that lengths allow, in the order in which they are tried.
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
        if refused and self._inverse()._outputs({name: options[name][0] for name in refused}) is not None:
            return {}, (), dict.fromkeys(options, _INVERTED)
        outputs = self._outputs(chosen)
        if outputs is None:  # together, though none alone
            refused |= dict.fromkeys(chosen, _READ)
            return {}, (), refused
        return {name: chosen[name] for name in options if name in chosen}, outputs, refused

    def _inverse(self) -> "HiddenRows":
        """The same with what counts hidden, and what is hidden counting."""
        other = copy.copy(self)
        other._masks = tuple(None if mask is None else ~mask for mask in self._masks)
        return other

    def sequences(self, groups: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """For each group of a layer the number of the sequence that its rows are of: 1 for a decoder's, else 0.

        A decoder's rows may be as many as the encoder's. They do not change with what the encoder is given at positions
        that are hidden.

        Args:
            groups: How many groups each layer has.
        """
        own = {name: (0,) * count for name, count in groups.items()}
        if not isinstance(self._batch, Mapping) or not any(map(_is_decoders, *zip(*self._batch.items(), strict=True))):
            return own
        number = next(number for number, mask in enumerate(self._masks) if mask is not None)
        other = {
            key: self._filled(value, number) if self._is_input(key, value, number) else value
            for key, value in self._batch.items()
        }
        changed = {name: [False] * count for name, count in groups.items()}
        taps = {name: self._taps[name] for name in groups}
        pairs = zip(self._received(self._batch, taps), self._received(other, taps), strict=False)
        for (name, before), (_, after) in pairs:
            moved = [self._differ(one, other) for one, other in zip(after, before, strict=True)]
            every = moved if len(moved) == groups[name] else [any(moved)] * groups[name]
            changed[name] = [one or other for one, other in zip(changed[name], every, strict=True)]
        return {name: tuple(number if moved else 1 - number for moved in each) for name, each in changed.items()}

    def _received(self, batch: Any, taps: Mapping[str, Sequence[Tap]]) -> list[tuple[str, list[Tensor]]]:
        """What the layers receive, call after call."""
        found: list[tuple[str, list[Tensor]]] = []

        def keep(name: str, raw: Received) -> None:
            found.append((name, [tensor.detach().clone() for tensor in tensors_in(raw)]))

        with tapped(taps, keep):
            run_model(self._model, batch, self._forward)
        return found

    def _is_input(self, key: str, value: Any, number: int) -> bool:
        """Whether it is what the encoder, or the decoder, is given: laid out as its mask, and not the mask itself."""
        mask = self._masks[number]
        laid_out = mask is not None and isinstance(value, Tensor) and value.shape[:2] == mask.shape
        return laid_out and _is_decoders(key, value) == bool(number) and not key.endswith("mask")

    def _filled(self, value: Tensor, number: int) -> Tensor:
        """With each sample's first value that counts at the positions that are hidden."""
        mask = self._masks[number]
        assert mask is not None  # noqa: S101 - it is laid out as the value
        mask = mask.to(value.device)
        first = value[torch.arange(len(value), device=value.device), mask.int().argmax(1)]
        spread = mask.reshape(*mask.shape, *[1] * (value.dim() - 2))
        return torch.where(spread, value, first[:, None].expand_as(value))

    def _differ(self, after: Tensor, before: Tensor) -> bool:
        moved = float(norm(after.double() - before.double()))
        return moved > max(2 * torch.finfo(before.dtype).eps, 1e-6) * float(norm(before.double()))

    def _outputs(self, choice: _Choice) -> tuple[Layout | None, ...] | None:
        """For each output the layout at whose hidden positions alone it changes; None if what counts changes."""
        after = self._trial.outputs_under(self._replaced(choice))
        if after is None:
            return None
        found = [self._changed(one, other) for one, other in zip(after, self._trial.outputs, strict=True)]
        return None if _EVERYWHERE in found else tuple(found)

    def _changed(self, after: Tensor, before: Tensor) -> Layout | None:
        moved, size = after.double() - before.double(), float(norm(before.double()))
        allowed = max(2 * torch.finfo(before.dtype).eps, 1e-6) * size
        if float(norm(moved)) <= allowed:
            return None
        for number, mask in enumerate(self._masks):
            if mask is None:
                continue
            for layout in layouts(before.shape, mask.shape):
                counts = layout.spread(mask.to(before.device), before.shape)
                if float(norm(torch.where(counts, moved, 0.0))) <= allowed:
                    return replace(layout, mask=number)
        return _EVERYWHERE

    @contextmanager
    def _replaced(self, choice: _Choice) -> Iterator[None]:
        with ExitStack() as stack:
            for name, found in choice.items():
                layer = self._model.get_submodule(name)
                noise = partial(self._noised, layer, found, generator(name))
                for tap in self._taps[name]:
                    if tap.plain or tap.first:
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
        mask = None if layout is None else layout.of(self._masks)
        if layout is None or mask is None or not layout.fits(rows.shape[:-1], mask.shape):
            return
        hidden = ~layout.spread(mask.to(rows.device), rows.shape[:-1])
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
_INVERTED = (
    "the model's outputs depend on what it computes at positions that are hidden and not on the rest, so it may be the "
    "other way round: 1 is where a position counts"
)
_READ = "the model's outputs depend on what it computes at the positions that are hidden"


def _is_decoders(key: Any, value: Any) -> bool:
    """Whether an entry of a batch is what a decoder is given, or is to give."""
    labels = key == "labels" and isinstance(value, Tensor) and value.dim() > 1
    return labels or key == "tgt" or str(key).startswith(("decoder_", "tgt_"))


def _outputs_replaced(
    tap: Tap, noise: Callable[[Tensor], Tensor], _module: nn.Module, _args: Any, returned: Any
) -> Any:
    outputs = tap.outputs(returned)
    return returned if outputs is None else tap.with_outputs(returned, noise(outputs))
