"""A network's forward on a batch, in eval mode, with nothing of the caller's changed."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.network.compiled import eagerly
from convexprune.network.untouched import left_as_found
from convexprune.network.watch import tensors_in
from convexprune.solvers.errors import ConvexPruneError, InvalidInput

Forward = Callable[[nn.Module, Any], Any]
"""Called with the model and a batch, in the place of the model's own call."""


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
            stack.enter_context(eagerly())
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

    What a model does to its inputs in place is done to the copy, and what it does to its attributes and buffers is
    taken back, however it is left: neither the caller nor the next forward sees it.

    Raises:
        InvalidInput: The model cannot be called on the batch. What ``forward`` raises is raised as it is.
    """
    own = copy_for(model, batch)
    with left_as_found(model):
        return call_model(model, own, forward)


def copy_for(model: nn.Module, batch: Any) -> Any:
    """A copy of the batch on the device of the model's first parameter."""
    parameter = next(model.parameters(), None)
    return _own(batch, None if parameter is None else parameter.device)


def call_model(model: nn.Module, own: Any, forward: Forward | None) -> Any:
    """As ``run_model``, on a batch that is the model's to change, and with whatever it does to itself."""
    if forward is not None:
        return forward(model, own)
    try:
        if isinstance(own, Mapping):
            return model(**own)
        return model(*own) if isinstance(own, tuple | list) else model(own)
    except (torch.cuda.OutOfMemoryError, MemoryError, ConvexPruneError):
        raise
    except Exception as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_in(own))
        found = f"{type(error).__name__}: {error}"
        raise InvalidInput(f"the model failed on a batch of shape {shapes} ({found}); {_advice(model, own)}") from error


def _advice(model: nn.Module, own: Any) -> str:
    """What may help where the model cannot be called on a batch."""
    if isinstance(own, tuple | list) and len(own) > 1:
        return "if a part holds labels, drop it with forward=lambda model, batch: model(batch[0])"
    types = {tensor.dtype for tensor in tensors_in(own)}
    whole = [str(dtype).removeprefix("torch.") for dtype in types if not dtype.is_floating_point]
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if whole and len(whole) == len(types) and parameter is not None:
        computed = str(parameter.dtype).removeprefix("torch.")
        return (
            f"the batch holds {' and '.join(sorted(whole))} and the model computes in {computed}: if these are no "
            "tokens, convert and scale them as in training (images: batch.float() / 255)"
        )
    return "pass what the model takes"


def outputs_of(outputs: Any) -> Tensor:
    """One batch's outputs as [samples, values], or as one row if its tensors do not agree on the samples."""
    found = [tensor.detach() for tensor in tensors_in(outputs) if tensor.is_floating_point()]
    if not found:
        raise InvalidInput("the model returned no floating-point tensor: give forward=, a function that returns one")
    lengths = {len(tensor) if tensor.dim() else 1 for tensor in found}
    rows = max(1, lengths.pop()) if len(lengths) == 1 else 1
    return torch.cat([tensor.reshape(rows, -1) for tensor in found], dim=1)


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
