"""Batches as they come, fitted to what the model takes: parts that it does not take, floating-point types, arrays.

What to do is decided on the first batch, by the signature of the model's forward and by calling it; a batch that the
model takes as it is is left as it is. Whatever is done is said.
"""

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.files.texts import visible
from convexprune.network.forwards import Forward, call_model, evaluating, run_model
from convexprune.network.watch import tensors_in
from convexprune.solvers.errors import InvalidInput

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitting:
    """What is done to each batch before the model is called on it.

    Attributes:
        parts: How many of a tuple's or list's first entries the model takes; None: the batch as a whole.
        left: Keys of a mapping that the model does not take.
        dtype: What floating-point tensors are cast to; None: they stay.
    """

    parts: int | None = None
    left: tuple[str, ...] = ()
    dtype: torch.dtype | None = None

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """A ``Forward``."""
        return call_model(model, self.applied(batch), None)

    def applied(self, batch: Any) -> Any:
        """The batch that the model is called on."""
        if self.parts == 1 and _is_sequence(batch):
            batch = batch[0]
        elif self.parts is not None and _is_sequence(batch):
            batch = tuple(batch[: self.parts])
        if self.left and isinstance(batch, Mapping):
            batch = {key: value for key, value in batch.items() if key not in self.left}
        return batch if self.dtype is None else _cast(batch, self.dtype)


def fitted(model: nn.Module, batches: Iterable[Any], forward: Forward | None) -> tuple[Forward | None, tuple[str, ...]]:
    """How the model is to be called on such batches, and what is thereby done to them, as sentences.

    Of a tuple or list that the model does not take whole, such as (inputs, labels) of a data loader, it is given the
    first entries that it does take; a model that takes two inputs is given both. Of a mapping it is given the entries
    that are arguments of its forward. Floating-point tensors of another type
    than the model's are cast to it where the model cannot be called without. With a ``forward`` of the caller's nothing
    is done.

    Args:
        model: The network; left as found.
        batches: Checked batches, of which the first decides.
        forward: The caller's, or None.

    Raises:
        InvalidInput: The model cannot be called on the first batch, whatever is done: with its error on the batch as it
            is.
        EmptyCalibration, NonFinite: As ``Calibration``.
    """
    if forward is not None:
        return forward, ()
    batch = next(iter(batches))
    fittings = list(_fittings(model, batch))
    if fittings == [Fitting()]:
        return None, ()
    first: InvalidInput | None = None
    with evaluating(model):
        for fitting in fittings:
            if first is not None and fitting.parts != fittings[0].parts and not _may_drop(batch, first):
                break
            try:
                run_model(model, batch, fitting)
            except InvalidInput as error:
                first = first or error
            else:
                notices = _sentences(fitting, batch)
                for notice in notices:
                    _log.info("%s", visible(notice))
                return (None if fitting == Fitting() else fitting), notices
    assert first is not None  # noqa: S101 - there is a fitting, and it failed
    raise first


def _fittings(model: nn.Module, batch: Any) -> Iterator[Fitting]:
    """What may be done, the least first."""
    dtype = _dtype(model)
    for parts in _parts(model, batch):
        left = _strange_keys(model, Fitting(parts).applied(batch))
        given = Fitting(parts, left).applied(batch)
        yield Fitting(parts, left)
        if dtype is not None and any(t.is_floating_point() and t.dtype != dtype for t in tensors_in(given)):
            yield Fitting(parts, left, dtype)


def _parts(model: nn.Module, batch: Any) -> list[int | None]:
    """Numbers of first entries that the signature of forward allows, the most first; None for all of them."""
    if not _is_sequence(batch) or len(batch) < 2:
        return [None]
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return [None]
    found = [parts for parts in range(len(batch), 0, -1) if _binds(signature, batch[:parts])]
    return [None if parts == len(batch) else parts for parts in found] or [None]


def _binds(signature: inspect.Signature, parts: Sequence[Any]) -> bool:
    if len(parts) == 1 and isinstance(parts[0], Mapping):
        return True
    try:
        signature.bind(*parts)
    except TypeError:
        return False
    return True


def _strange_keys(model: nn.Module, batch: Any) -> tuple[str, ...]:
    """Keys of a mapping that are no arguments of forward, such as labels; none where forward takes any."""
    if not isinstance(batch, Mapping):
        return ()
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return ()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return ()
    named = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return tuple(key for key in batch if key not in named) if named.intersection(batch) else ()


def _may_drop(batch: Sequence[Any], error: InvalidInput) -> bool:
    """Whether the model failed on what it need not take: labels, or more arguments than something inside takes."""
    labels = isinstance(batch[-1], Tensor) and not batch[-1].is_floating_point()
    return labels or (isinstance(error.__cause__, TypeError) and "positional argument" in str(error.__cause__))


def _dtype(model: nn.Module) -> torch.dtype | None:
    """The floating-point type of the parameters, if there is one."""
    found = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _is_sequence(batch: Any) -> bool:
    """Whether entries of the batch are arguments; a PackedSequence, which moves as a whole, is one argument."""
    return isinstance(batch, tuple | list) and not hasattr(batch, "to")


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating-point tensors in this type; numbers of other kinds stay."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _cast(value, dtype) for key, value in batch.items()}
    if _is_sequence(batch):
        entries = [_cast(value, dtype) for value in batch]
        return type(batch)(*entries) if hasattr(batch, "_fields") else type(batch)(entries)
    return batch


def _sentences(fitting: Fitting, batch: Any) -> tuple[str, ...]:
    found = []
    if fitting.parts is not None:
        which = "the first part" if fitting.parts == 1 else f"the first {fitting.parts} parts"
        found.append(f"the model is called on {which} of each batch: of the {len(batch)} it does not take the rest")
    if fitting.left:
        found.append(
            f"of each batch the model is not given {', '.join(map(repr, fitting.left))}, which it does not take"
        )
    if fitting.dtype is not None:
        given = Fitting(fitting.parts, fitting.left).applied(batch)
        others = {t.dtype for t in tensors_in(given) if t.is_floating_point()} - {fitting.dtype}
        kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        own = str(fitting.dtype).removeprefix("torch.")
        found.append(f"inputs are cast from {kinds} to {own}, in which the model computes")
    return tuple(found)
