"""What a network computes on calibration data: its outputs, the inputs of its layers, and what follows each layer."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.calibration import as_batches, samples_of
from convexprune.solvers.arrays import norm, working_dtype
from convexprune.solvers.errors import ConvexPruneError, InvalidInput, NonFinite
from convexprune.watch import Watch, summary, tensors_in

__all__ = ["Capture", "Forward", "LayerCapture", "capture", "evaluating", "network_outputs", "outputs_of", "run_model"]

Forward = Callable[[nn.Module, Any], Any]
See = Callable[[str, Tensor, Any], None]


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
    """The layers by qualified name, the network's outputs, the sample count.

    Layers are in the order of their first calls; one that was never called is absent.
    """

    layers: dict[str, LayerCapture]
    outputs: Tensor
    samples: int

    def error(self, outputs: Tensor) -> float:
        """‖f̂(x) − f(x)‖_F/‖f(x)‖_F for outputs f̂(x) of the network now; not relative where f(x) is 0."""
        return float(norm(outputs - self.outputs)) / (float(norm(self.outputs)) or 1.0)


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
    inputs: dict[str, list[Tensor]] = {}
    outputs = []

    def keep(name: str, received: Tensor, _output: Any) -> None:
        if not received.isfinite().all():
            raise NonFinite(f"NaN or infinity reaches layer {name!r}: check the layers before it and the data's scale")
        # Always a copy: an in-place operation (ReLU(inplace=True), +=) may change it later, and nothing tells now.
        inputs.setdefault(name, []).append(received.detach().clone())

    with evaluating(model):
        activations = _activations(model, listed[0], layers, forward)
        with _hooked(layers, keep):
            for done, batch in enumerate(listed, start=1):
                outputs.append(outputs_of(run_model(model, batch, forward)))
                if progress is not None:
                    progress(done, len(listed))
    seen = {name: LayerCapture(tuple(kept), activations.get(name)) for name, kept in inputs.items()}
    return Capture(seen, _joined(outputs), sum(map(samples_of, listed)))


def network_outputs(model: nn.Module, batches: Any, forward: Forward | None = None) -> Tensor:
    """The network's outputs [samples, values], evaluated as in ``capture``; one column if batches differ in width.

    Half precision is returned as float32, for differences of outputs to be exact.

    Raises:
        InvalidInput: the model cannot be called on a batch, or returns no floating-point tensor.
        EmptyCalibration: there is no sample.
        NonFinite: a batch holds NaN or infinity.
    """
    listed = as_batches(batches)
    with evaluating(model):
        return _joined([outputs_of(run_model(model, batch, forward)) for batch in listed])


def _activations(
    model: nn.Module, batch: Any, layers: Mapping[str, nn.Module], forward: Forward | None
) -> dict[str, str]:
    calls: dict[str, list[list[str]]] = {}
    watch = Watch()

    def follow(name: str, _received: Tensor, output: Any) -> None:
        consumers: list[str] = []
        calls.setdefault(name, []).append(consumers)
        for tensor in tensors_in(output):
            watch.follow(tensor, consumers)

    with _hooked(layers, follow), watch:
        outputs = run_model(model, batch, forward)
    watch.note(tensors_in(outputs), "output")
    return {name: summary(consumers) for name, consumers in calls.items()}


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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode, without gradients and without fused paths that call no layers.

    Nor does a caller's autocast reach inside: it keeps rounded copies of weights, which would outlive their change.
    A forward may open one of its own.
    """
    flags = [(module, module.training) for module in model.modules()]
    fast, cached = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    devices = {parameter.device.type for parameter in model.parameters()} - {"meta"}
    try:
        model.eval()
        torch.set_autocast_cache_enabled(False)
        # The fused eval path of nn.TransformerEncoderLayer calls none of its layers, so no hook would see them.
        torch.backends.mha.set_fastpath_enabled(False)
        with ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            # Inference tensors could not be used with autograd later.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in flags:
            module.training = training


def run_model(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """The model's own return value for a copy of the batch on the device of the first parameter.

    What a model does to its inputs in place is done to the copy: neither the caller nor the next forward sees it.

    Raises:
        InvalidInput: The model cannot be called on the batch. What ``forward`` raises is raised as it is.
    """
    parameter = next(model.parameters(), None)
    own = _own(batch, None if parameter is None else parameter.device)
    if forward is not None:
        return forward(model, own)
    try:
        if isinstance(own, Mapping):
            return model(**own)
        return model(*own) if isinstance(own, tuple | list) else model(own)
    except (torch.cuda.OutOfMemoryError, MemoryError, ConvexPruneError):
        raise
    except Exception as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_in(batch))
        advice = "pass what the model takes"
        if isinstance(own, tuple | list) and len(own) > 1:
            advice = "if a part holds labels, drop it with forward=lambda model, batch: model(batch[0])"
        found = f"{type(error).__name__}: {error}"
        raise InvalidInput(f"the model failed on a batch of shape {shapes} ({found}); {advice}") from error


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise InvalidInput(f"the model has no module {name!r}: take names from model.named_modules()") from error


def _own(batch: Any, device: torch.device | None) -> Any:
    """The batch with copies of its tensors, on the device."""
    if isinstance(batch, Tensor):
        return batch.detach().to(batch.device if device is None else device, copy=True)
    if hasattr(batch, "to"):  # such as a PackedSequence, which knows what of it moves
        own = copy.deepcopy(batch, {id(tensor): tensor.detach().clone() for tensor in tensors_in(batch)})
        return own if device is None else own.to(device)
    if isinstance(batch, Mapping):
        return {key: _own(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_own(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if is_dataclass(batch) and not isinstance(batch, type):
        own = copy.copy(batch)
        for field in fields(batch):
            object.__setattr__(own, field.name, _own(getattr(batch, field.name), device))  # frozen ones, too
        return own
    return batch


def outputs_of(outputs: Any) -> Tensor:
    """One batch's outputs as [samples, values], or as one row if its tensors do not agree on the samples."""
    found = [tensor.detach() for tensor in tensors_in(outputs) if tensor.is_floating_point()]
    if not found:
        raise InvalidInput("the model returned no floating-point tensor: give forward=, a function that returns one")
    lengths = {len(tensor) if tensor.dim() else 1 for tensor in found}
    rows = max(1, lengths.pop()) if len(lengths) == 1 else 1
    return torch.cat([tensor.reshape(rows, -1) for tensor in found], dim=1)


def _joined(parts: list[Tensor]) -> Tensor:
    same_width = len({part.shape[1] for part in parts}) == 1
    outputs = torch.cat(parts if same_width else [part.reshape(-1, 1) for part in parts])
    return outputs.to(working_dtype(outputs.dtype))
