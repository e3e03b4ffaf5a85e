"""Which of a model's rows are really hidden: what its outputs depend on, found by replacing values on one batch.

A row may be left out of a layer's program if the outputs that count do not depend on what the layer computes there. The
lengths of axes say which rows that may be; where the lengths are ambiguous, or a model reads what its mask hides, they
say too much. So the layers' outputs at these rows are replaced by random ones, and the model's outputs must not change,
except at hidden positions of their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from convexprune.forwards import Forward, run_model
from convexprune.matrices.support import supported
from convexprune.padding import Layout, layouts
from convexprune.solvers.arrays import norm
from convexprune.taps import Received, Tap, tapped
from convexprune.watch import tensors_in

__all__ = ["HiddenRows", "Options"]

Options = dict[str, list[tuple[Layout | None, ...]]]
"""By layer the layouts of its groups that come into question."""

_Choice = Mapping[str, tuple[Layout | None, ...]]


class HiddenRows:
    """One batch, of which the layers' outputs at hidden rows are replaced; the model must be in eval mode.

    Args:
        model: The network; left as found.
        batch: A checked batch of which some positions are hidden, and some are not.
        mask: Its mask, Boolean [samples, positions].
        taps: Where the layers' inputs are received.
        forward: As for ``capture``.
    """

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
        self, options: Options
    ) -> tuple[dict[str, tuple[Layout | None, ...]], tuple[Layout | None, ...], dict[str, str]]:
        """The layouts of layers and of outputs, and the layers of which all rows count, with the reason.

        Args:
            options: By layer the layouts of its groups that lengths allow, in the order in which they are tried.
        """
        refused = dict.fromkeys(self._of_another_sequence(options), _ANOTHER)
        chosen = {name: choices[0] for name, choices in options.items() if name not in refused}
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

    def _of_another_sequence(self, options: Options) -> list[str]:
        """Of an encoder and a decoder the layers whose rows are the decoder's, which the mask says nothing about.

        A decoder's rows may be as many as the encoder's. They do not change with what the encoder is given at positions
        that are hidden.
        """
        if not isinstance(self._batch, Mapping) or not any(map(_is_decoders, *zip(*self._batch.items(), strict=True))):
            return []
        other = {
            key: self._filled(value) if self._is_input(key, value) else value for key, value in self._batch.items()
        }
        taps = {name: self._taps[name] for name in options}
        pairs = zip(self._received(self._batch, taps), self._received(other, taps), strict=False)
        changed = {
            name
            for (name, before), (_, after) in pairs
            if any(self._differ(one, other) for one, other in zip(after, before, strict=True))
        }
        return [name for name in options if name not in changed]

    def _received(self, batch: Any, taps: Mapping[str, Sequence[Tap]]) -> list[tuple[str, list[Tensor]]]:
        """What the layers receive, call after call."""
        found: list[tuple[str, list[Tensor]]] = []

        def keep(name: str, raw: Received) -> None:
            found.append((name, [tensor.detach().clone() for tensor in tensors_in(raw)]))

        with tapped(taps, keep):
            run_model(self._model, batch, self._forward)
        return found

    def _is_input(self, key: str, value: Any) -> bool:
        """Whether it is what the encoder is given: laid out as the mask, and not the mask itself."""
        laid_out = isinstance(value, Tensor) and value.shape[:2] == self._mask.shape
        return laid_out and not _is_decoders(key, value) and not key.endswith("mask")

    def _filled(self, value: Tensor) -> Tensor:
        """With each sample's first value that counts at the positions that are hidden."""
        mask = self._mask.to(value.device)
        first = value[torch.arange(len(value), device=value.device), mask.int().argmax(1)]
        spread = mask.reshape(*mask.shape, *[1] * (value.dim() - 2))
        return torch.where(spread, value, first[:, None].expand_as(value))

    def _differ(self, after: Tensor, before: Tensor) -> bool:
        moved = float(norm(after.double() - before.double()))
        return moved > max(2 * torch.finfo(before.dtype).eps, 1e-6) * float(norm(before.double()))

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
        moved, size = after.double() - before.double(), float(norm(before.double()))
        allowed = max(2 * torch.finfo(before.dtype).eps, 1e-6) * size
        if float(norm(moved)) <= allowed:
            return None
        for layout in layouts(before.shape, self._mask.shape):
            counts = layout.spread(self._mask.to(before.device), before.shape)
            if float(norm(torch.where(counts, moved, 0.0))) <= allowed:
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
_ANOTHER = "it sees the positions of another sequence, a decoder's"
_READ = "the model's outputs depend on what it computes at the positions that are hidden"


def _is_decoders(key: Any, value: Any) -> bool:
    """Whether an entry of a batch is what a decoder is given, or is to give."""
    labels = key == "labels" and isinstance(value, Tensor) and value.dim() > 1
    return labels or str(key).startswith("decoder_")


def _outputs_replaced(
    tap: Tap, noise: Callable[[Tensor], Tensor], _module: nn.Module, _args: Any, returned: Any
) -> Any:
    outputs = tap.outputs(returned)
    return returned if outputs is None else tap.with_outputs(returned, noise(outputs))
