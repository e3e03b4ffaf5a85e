"""What a network computes on calibration data: its outputs, the inputs of its layers, and what follows each layer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convexprune.errors import EmptyCalibration
from convexprune.solvers.errors import InvalidInput, NonFinite

__all__ = ["Capture", "LayerCapture", "as_batches", "capture", "network_outputs"]

Forward = Callable[[nn.Module, Any], Any]
See = Callable[[str, Tensor, Any], None]

# Operations that may copy but keep every entry: what follows them follows the layer. Views are recognised by storage.
_SAME_ENTRIES = {"bfloat16", "clone", "contiguous", "cpu", "cuda", "detach", "double", "flatten", "float", "half"}
_SAME_ENTRIES |= {"requires_grad", "reshape", "to"}
# Results that describe a tensor (shape, dtype, device ...) without using its entries.
_METADATA = (bool, int, str, tuple, torch.dtype, torch.device, torch.layout)


@dataclass(frozen=True, eq=False)
class LayerCapture:
    """What one layer saw.

    ``inputs`` holds the module's raw input tensor of each call, batch after batch. Their sizes may differ;
    ``input_matrices`` of each, concatenated, is X. ``activation`` names what consumes the layer's output: ``"relu"`` if
    only ReLUs do, ``"output"`` if nothing does, ``"several: relu, add"`` if different operations do; None if the first
    batch did not reach the layer. What TorchScript functions consume is not seen.
    """

    inputs: tuple[Tensor, ...]
    activation: str | None


@dataclass(frozen=True, eq=False)
class Capture:
    """The layers by qualified name (one that was never called is absent), the network's outputs, the sample count."""

    layers: dict[str, LayerCapture]
    outputs: Tensor
    samples: int


def as_batches(calibration: Any, batch_size: int = 256) -> list[Any]:
    """Calibration data as a list of batches: a tensor or array [samples, ...] is cut, an iterable of batches is listed.

    A mapping is one batch. Batches without samples are dropped.

    Raises:
        InvalidInput: not a tensor, an array or an iterable of batches, or a batch size below 1.
        EmptyCalibration: there is no sample.
        NonFinite: a batch holds NaN or infinity; the message says which.
    """
    batches = [batch for batch in _cut(calibration, batch_size) if _samples(batch)]
    if not batches:
        raise EmptyCalibration("the calibration data holds no sample: pass a tensor, an array or a list of batches")
    for number, batch in enumerate(batches):
        if not all(tensor.isfinite().all() for tensor in _tensors(batch)):
            raise NonFinite(f"batch {number} of the calibration data (the first is 0) holds NaN or infinity: remove it")
    return batches


def capture(
    model: nn.Module,
    batches: Any,
    names: Iterable[str],
    *,
    forward: Forward | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Capture:
    """Run the model in eval mode on every batch and record the inputs of the named layers.

    The model is left as found: hooks, training flags, gradients. The first batch is run once more, to see what follows
    each layer. Inputs are copies, on the device where the layer received them.

    Args:
        model: the network.
        batches: what ``as_batches`` takes. A mapping is passed as ``model(**batch)``, a tuple or list as
            ``model(*batch)``, anything else as ``model(batch)``.
        names: qualified names of modules, as in ``model.named_modules()``.
        forward: computes the outputs in another way, called as ``forward(model, batch)``.
        progress: called as ``progress(done, total)`` after each batch.

    Raises:
        InvalidInput: no module has the name, or the model cannot be called on a batch.
        EmptyCalibration: there is no sample.
        NonFinite: a batch, or what reaches a layer, holds NaN or infinity.
    """
    listed = as_batches(batches)
    layers = {name: _named(model, name) for name in names}
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    outputs = []

    def keep(name: str, received: Tensor, _output: Any) -> None:
        if not received.isfinite().all():
            raise NonFinite(f"NaN or infinity reaches layer {name!r}: check the layers before it and the data's scale")
        # Always a copy: an in-place operation (ReLU(inplace=True), +=) may change it later, and nothing tells now.
        inputs[name].append(received.detach().clone())

    with _evaluating(model):
        activations = _activations(model, listed[0], layers, forward)
        with _hooked(layers, keep):
            for done, batch in enumerate(listed, start=1):
                outputs.append(_rows(_run(model, batch, forward)))
                if progress is not None:
                    progress(done, len(listed))
    seen = {name: LayerCapture(tuple(kept), activations.get(name)) for name, kept in inputs.items() if kept}
    return Capture(seen, _joined(outputs), sum(map(_samples, listed)))


def network_outputs(model: nn.Module, batches: Any, forward: Forward | None = None) -> Tensor:
    """The network's outputs [samples, values], evaluated as in ``capture``; one column if batches differ in width.

    Raises:
        InvalidInput: the model cannot be called on a batch, or returns no floating-point tensor.
        EmptyCalibration: there is no sample.
        NonFinite: a batch holds NaN or infinity.
    """
    listed = as_batches(batches)
    with _evaluating(model):
        return _joined([_rows(_run(model, batch, forward)) for batch in listed])


class _Watch(TorchFunctionMode):
    """Follows tensors through views and copies, and notes the name of every operation that consumes their entries."""

    def __init__(self) -> None:
        super().__init__()
        # Keyed by id, with the tensor: one that is held cannot hand its id on to another.
        self._followed: dict[int, tuple[Tensor, list[list[str]]]] = {}

    def follow(self, tensor: Tensor, consumers: list[str]) -> None:
        self._followed.setdefault(id(tensor), (tensor, []))[1].append(consumers)

    def note(self, tensors: Iterable[Tensor], name: str, result: Any = None) -> None:
        for tensor, consumers in [self._followed[id(t)] for t in tensors if id(t) in self._followed]:
            if _passes_on(name, tensor, result):
                for noted in consumers if result is not tensor else ():
                    self.follow(result, noted)
                continue
            for noted in consumers:
                noted.append(name)
            if result is tensor:  # changed in place: its storage, under any view, no longer holds the layer's output
                self._forget(tensor)

    def _forget(self, tensor: Tensor) -> None:
        self._followed = {key: kept for key, kept in self._followed.items() if not _share(kept[0], tensor)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = _operation(func, args, kwargs or {})
        if any(True for _ in _tensors(result)) or not (name == "get" or isinstance(result, _METADATA)):
            self.note({id(t): t for t in _tensors((args, kwargs))}.values(), name, result)
        return result


def _operation(func: Any, args: Any, kwargs: Any) -> str:
    """The operation's name without the marks of its variants; a clamp at zero from below is a ReLU."""
    name = str(getattr(func, "__name__", func)).strip("_").lower()
    if name in ("clamp", "clamp_min", "clip"):
        bounds = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
        lowest = bounds.get("min")
        if isinstance(lowest, int | float) and lowest == 0 and bounds.get("max") is None:
            return "relu"
    return name


def _passes_on(name: str, tensor: Tensor, result: Any) -> bool:
    """Whether the result holds the tensor's entries, all and unchanged, in some shape."""
    if result is tensor:  # dropout returns its input in eval mode
        return name in _SAME_ENTRIES or "dropout" in name
    if not isinstance(result, Tensor) or result.numel() != tensor.numel():
        return False
    return name in _SAME_ENTRIES or _share(result, tensor)


def _share(one: Tensor, other: Tensor) -> bool:
    if one.layout != torch.strided or other.layout != torch.strided or one.dtype != other.dtype:
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _activations(
    model: nn.Module, batch: Any, layers: Mapping[str, nn.Module], forward: Forward | None
) -> dict[str, str]:
    calls: dict[str, list[list[str]]] = {}
    watch = _Watch()

    def follow(name: str, _received: Tensor, output: Any) -> None:
        consumers: list[str] = []
        calls.setdefault(name, []).append(consumers)
        for tensor in _tensors(output):
            watch.follow(tensor, consumers)

    with _hooked(layers, follow), watch:
        outputs = _run(model, batch, forward)
    watch.note(_tensors(outputs), "output")
    return {name: _summary(consumers) for name, consumers in calls.items()}


def _summary(calls: list[list[str]]) -> str:
    kinds = list(dict.fromkeys(kind for call in calls for kind in call or ["output"]))
    return kinds[0] if len(kinds) == 1 else f"several: {', '.join(kinds)}"


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Calls ``see(name, input, output)`` after each layer, before other hooks replace its output; always unhooked."""

    def hook(name: str, _layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        see(name, args[0] if args else kwargs["input"], output)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_hook(partial(hook, name), prepend=True, with_kwargs=True))
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        # The fused eval path of nn.TransformerEncoderLayer calls none of its layers, so no hook would see them.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be used with autograd later
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in flags:
            module.training = training


def _run(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    parameter = next(model.parameters(), None)
    moved = batch if parameter is None else _moved(batch, parameter.device)
    if forward is not None:
        return forward(model, moved)
    if isinstance(moved, Mapping):
        return model(**moved)
    if not isinstance(moved, tuple | list):
        return model(moved)
    try:
        return model(*moved)
    except TypeError as error:
        if len(moved) < 2:
            raise
        raise InvalidInput(
            f"the model cannot be called as model(*batch) on a batch of {len(moved)} parts ({error}); if one of them "
            "holds labels, drop it with forward=lambda model, batch: model(batch[0])"
        ) from error


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise InvalidInput(f"the model has no module {name!r}: take names from model.named_modules()") from error


def _cut(calibration: Any, batch_size: int) -> list[Any]:
    if batch_size < 1:
        raise InvalidInput(f"batch_size must be at least 1; got {batch_size}")
    data = _as_tensor(calibration)
    if isinstance(data, Tensor) and data.dim() > 0:
        return [data[start : start + batch_size] for start in range(0, len(data), batch_size)]
    if isinstance(data, Mapping):
        return [data]
    if isinstance(data, Tensor | str) or not isinstance(data, Iterable):
        found = type(calibration).__name__
        raise InvalidInput(f"calibration data must be a tensor [samples, ...] or an iterable of batches; got {found}")
    return [_as_tensor(batch) for batch in data]


def _as_tensor(batch: Any) -> Any:
    # A copy: torch warns when it shares an array that is read-only.
    return torch.tensor(batch) if isinstance(batch, np.ndarray) else batch


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings, sequences and dataclasses."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _tensors(branch)
    elif is_dataclass(tree) and not isinstance(tree, type):
        yield from _tensors([getattr(tree, field.name) for field in fields(tree)])


def _moved(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_moved(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _samples(batch: Any) -> int:
    """The length of the batch's first tensor; a batch without one is a sample."""
    first = next(_tensors(batch), None)
    return 1 if first is None or first.dim() == 0 else len(first)


def _rows(outputs: Any) -> Tensor:
    """One batch's outputs as [samples, values], or as one row if its tensors do not agree on the samples."""
    found = [tensor.detach() for tensor in _tensors(outputs) if tensor.is_floating_point()]
    if not found:
        raise InvalidInput("the model returned no floating-point tensor: give forward=, a function that returns one")
    lengths = {len(tensor) if tensor.dim() else 1 for tensor in found}
    rows = max(1, lengths.pop()) if len(lengths) == 1 else 1
    return torch.cat([tensor.reshape(rows, -1) for tensor in found], dim=1)


def _joined(parts: list[Tensor]) -> Tensor:
    same_width = len({part.shape[1] for part in parts}) == 1
    return torch.cat(parts if same_width else [part.reshape(-1, 1) for part in parts])
