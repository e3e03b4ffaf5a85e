"""A network's forward on a batch, in eval mode, with nothing of the caller's changed.

Models that torch.compile made are run as the modules that they were made of: the compiler would trace the hooks that
look into a forward, with a warning for each thing that it cannot trace, and compile anew for every layer.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from convexprune.layers.memory import Batch, mapped, overlaps_itself, tensors_in
from convexprune.solvers.errors import ConvexPruneError, InvalidInput

Forward = Callable[[nn.Module, Batch], Batch]
"""Called with the model and a batch, in the place of the model's own call."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, with the same parameters; any other model itself."""
    # Not imported, which takes seconds: where it is not, nothing was compiled.
    made = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    while made is not None and isinstance(model, made):
        model = model.get_submodule("_orig_mod")
    return model


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside, compiled modules and functions are run, and may be traced by torch.fx, as what they were made of."""
    with ExitStack() as stack:
        if dynamo := sys.modules.get("torch._dynamo"):
            stack.enter_context(dynamo.config.patch(error_on_nested_fx_trace=False))
            if set_stance := getattr(torch.compiler, "set_stance", None):
                stack.enter_context(set_stance("force_eager"))
            else:  # before torch 2.6
                stack.enter_context(dynamo.config.patch(disable=True))
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode, without gradients, and runs ``as_written``."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        stack.enter_context(as_written(model))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs eagerly, out of inference mode, and without fused paths that call no layers.

    Nor does a caller's autocast reach inside: it keeps rounded copies of weights, which would outlive their change.
    A forward may open one of its own.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        # The fused eval path of nn.TransformerEncoderLayer calls none of its layers, so no hook would see them.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for device in {parameter.device.type for parameter in model.parameters()} - {"meta"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(eagerly())
        # Inference tensors could not be used with autograd later.
        stack.enter_context(torch.inference_mode(False))
        yield


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside, random numbers follow from the seed, on the CPU and on the model's devices; afterwards all is as before.

    Other devices are left alone, which ``torch.manual_seed`` would seed, too.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def run_model(model: nn.Module, batch: Batch, forward: Forward | None) -> Batch:
    """The model's own return value for a copy of the batch on the device of the first parameter.

    What a model does to its inputs in place is done to the copy, and what it does to its attributes and buffers is
    taken back, however it is left. InvalidInput is raised if the model cannot be called on the batch; what ``forward``
    raises is raised as it is.
    """
    own = copy_for(model, batch)
    with left_as_found(model):
        return call_model(model, own, forward)


def copy_for(model: nn.Module, batch: Batch) -> Batch:
    """A copy of the batch on the device of the model's first parameter."""
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device

    def whole(part: Batch) -> Batch:  # such as a PackedSequence, which knows what of it moves
        own = copy.deepcopy(part, {id(tensor): tensor.detach().clone() for tensor in tensors_in(part)})
        return own if device is None else own.to(device)

    return mapped(batch, lambda tensor: tensor.detach().to(device or tensor.device, copy=True), whole)


def call_model(model: nn.Module, own: Batch, forward: Forward | None) -> Batch:
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


def _advice(model: nn.Module, own: Batch) -> str:
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


def outputs_of(outputs: object) -> Tensor:
    """One batch's outputs as [samples, values], or as one row if its tensors do not agree on the samples."""
    found = [tensor.detach() for tensor in tensors_in(outputs) if tensor.is_floating_point()]
    if not found:
        raise InvalidInput("the model returned no floating-point tensor: give forward=, a function that returns one")
    lengths = {len(tensor) if tensor.dim() else 1 for tensor in found}
    rows = max(1, lengths.pop()) if len(lengths) == 1 else 1
    return torch.cat([tensor.reshape(rows, -1) for tensor in found], dim=1)


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Afterwards modules have the attributes and buffers of before, with their values; parameters do not count.

    Lazy modules, which a first forward completes, stay complete; of compiled ones the values of buffers are looked at.
    """
    restore = state_of(model, parameters=False)
    try:
        yield
    finally:
        restore()


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """If the body raises, modules, parameters, buffers and attributes are the objects of before, with their values.

    InvalidInput is raised if the model is no module.
    """
    restore = state_of(check_module(model), parameters=True)
    try:
        yield
    except BaseException:
        restore()
        raise


def state_of(model: nn.Module, parameters: bool) -> Callable[[], None]:
    """A function that gives modules the attributes and tensors, with their values, that they have now."""

    def is_lazy(module: nn.Module) -> bool:
        return any(map(nn.parameter.is_lazy, chain(module.parameters(recurse=False), module.buffers(recurse=False))))

    def can_change(tensor: Tensor) -> bool:
        """Not what has no values yet, and here not what was made in inference mode."""
        known = tensor.layout == torch.strided and not nn.parameter.is_lazy(tensor) and not tensor.is_meta
        return known and not tensor.is_inference() and (parameters or not isinstance(tensor, nn.Parameter))

    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule) and not is_lazy(m)]
    tables: list[dict[str, Batch]] = [table for module in modules for table in (vars(module), module._buffers)]
    tables += [table for module in modules if parameters for table in (module._parameters, module._modules)]
    before = [(table, dict(table)) for table in tables]
    classes = [(module, type(module)) for module in modules]  # which change where a layer loses all its channels
    tensors = chain(tensors_in([vars(module) for module in modules]), model.buffers(), model.parameters())
    own = {id(tensor): tensor for tensor in tensors if can_change(tensor)}
    values = [(tensor, tensor.detach(), tensor.detach().clone()) for tensor in own.values()]

    def restore() -> None:
        for module, kind in classes:
            if type(module) is not kind:
                module.__class__ = kind
        for table, entries in before:
            table.clear()
            table.update(entries)
        with torch.no_grad():
            for tensor, place, value in values:
                if (tensor.data_ptr(), tensor.shape) != (place.data_ptr(), place.shape):
                    tensor.data = place
                # By value: what writes through .data or numpy leaves no other trace. NaN is copied: it is not itself.
                if not (torch.equal(tensor, value) or overlaps_itself(tensor)):
                    tensor.copy_(value)

    return restore


def check_module(model: nn.Module) -> nn.Module:
    """The model itself; InvalidInput is raised if it is no module."""
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model: expected a torch.nn.Module, found {model!r}")
    return model
