"""Networks with fewer neurons: rows, norm entries and columns really removed, or zeroed where they are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.errors import UnsupportedModule
from convexprune.links import Link, find_links
from convexprune.matrices import unsupported
from convexprune.plan import check_module
from convexprune.solvers.errors import InvalidInput, NonFinite, ShapeMismatch

__all__ = ["mask_neurons_", "remove_neurons_", "resize_", "restoring"]

_Axes = dict[str, tuple[str, ...]]

_CHANNELS: _Axes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), ("num_features",))
_AXES: dict[type[nn.Module], _Axes] = {
    nn.Linear: {"weight": ("out_features", "in_features"), "bias": ("out_features",)},
    nn.Conv2d: {"weight": ("out_channels", "in_channels"), "bias": ("out_channels",)},
    nn.BatchNorm1d: _CHANNELS,
    nn.BatchNorm2d: _CHANNELS,
}  # by kind of module: its tensors, and the attributes that say how long their first axes are


def remove_neurons_(model: nn.Module, link: Link, kept: Tensor, scales: Tensor | None = None) -> None:
    """Remove all other neurons of the link's producer, with their entries in its norms and columns in its consumers.

    The tensors that shrink are new ones, without gradients: an optimiser must be made anew.

    Args:
        model: The network in which ``find_links`` found the link; it may have been shrunk since.
        link: The layer and its surroundings.
        kept: The neurons that stay [k], int64, ascending.
        scales: Factors [k] of their columns in the consumers; None: 1.

    Raises:
        InvalidInput: ``kept`` or ``scales`` cannot be used, or the model has no such modules.
        ShapeMismatch: The modules, or the scales, are of other sizes than the link, or ``kept``, says.
        UnsupportedModule: A module is not a plain Linear, Conv2d or BatchNorm.
        NonFinite: The scales, or the weights times them, hold NaN or infinity. In any case nothing was changed.
    """
    producer, norms, consumers = _checked(model, link, kept, scales)
    smaller = [
        (module, {name: _selected(tensor, kept).contiguous() for name, tensor in _tensors(module).items()})
        for module in (producer, *norms)
    ]
    for layer in consumers:
        weight, columns = layer.get_parameter("weight"), _columns(layer, _size(producer), kept, scales)
        smaller.append((layer, {"weight": columns.reshape(len(weight), -1, *weight.shape[2:]).contiguous()}))
    for module, tensors in smaller:
        _replace_(module, tensors)
    for norm in norms:  # one that holds no tensors has a size too
        vars(norm).update(num_features=len(kept))


def mask_neurons_(model: nn.Module, link: Link, kept: Tensor, scales: Tensor | None = None) -> None:
    """As ``remove_neurons_``, with zeros in place of what would be removed; the Parameter objects stay.

    In eval mode the outputs are those after ``remove_neurons_``, up to rounding. Norms stay as they are.

    Raises:
        InvalidInput, ShapeMismatch, UnsupportedModule, NonFinite: As in ``remove_neurons_``.
    """
    producer, _, consumers = _checked(model, link, kept, scales)
    columns = [_columns(layer, _size(producer), kept, scales) for layer in consumers]
    removed = torch.ones(_size(producer), dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
    with torch.no_grad():
        for tensor in _tensors(producer).values():
            tensor[removed.to(tensor.device)] = 0
        for layer, staying in zip(consumers, columns, strict=True):
            weight = layer.get_parameter("weight")
            masked = torch.zeros_like(weight).reshape(len(weight), len(removed), -1)
            masked[:, kept.to(weight.device)] = staying
            weight.copy_(masked.reshape(weight.shape))


def resize_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make a model as small as a state dict's tensors, for load_state_dict.

    Only neurons that ``find_links`` finds are removed, with all that belongs to them; the first of each layer stay.
    Keys that only one of the two has are left to ``load_state_dict``. Where shapes agree, nothing is traced.

    Raises:
        ShapeMismatch: Shapes differ in another way, or do not fit each other.
        UnsupportedModule: Shapes differ, and the model's forward cannot be traced.
        InvalidInput: The model is no module. In any case nothing was changed.
    """
    misfits = _misfits(check_module(model), state)
    if not misfits:
        return
    try:
        links, _ = find_links(model)
    except UnsupportedModule as error:
        raise UnsupportedModule(f"{misfits}; and {error}") from error
    with restoring(model):
        for link in links.values():
            key, neurons = f"{link.producer}.weight", _size(model.get_submodule(link.producer))
            shape = state[key].shape if key in state else ()
            if shape and 0 < shape[0] < neurons:
                remove_neurons_(model, link, torch.arange(shape[0]))
        if misfits := _misfits(model, state):
            raise ShapeMismatch(f"{misfits}: only neurons that find_links finds may be missing, with all their weights")


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """If the body raises, modules, parameters, buffers and whole-number attributes (sizes, flags) are as they were.

    The objects are the same, with the same values, whether they were replaced or written to.

    Raises:
        InvalidInput: The model is no module.
    """
    found = list(check_module(model).modules())
    modules = [(module, [dict(table) for table in _tables(module)], _numbers(module)) for module in found]
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if _has_shape(tensor)]
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for module, tables, numbers in modules:
            for table, before in zip(_tables(module), tables, strict=True):
                table.clear()
                table.update(before)
            vars(module).update(numbers)
        for tensor, value in zip(tensors, values, strict=True):
            _put_back_(tensor, value)
        raise


def _checked(
    model: nn.Module, link: Link, kept: Tensor, scales: Tensor | None
) -> tuple[nn.Module, list[nn.Module], list[nn.Module]]:
    """The producer, the norms and the consumers, which fit together."""
    producer, names = _module(model, link.producer), (*link.norms, *link.consumers)
    neurons, others = _size(producer), [_module(model, name) for name in names]
    expected = [neurons] * len(link.norms) + [neurons * repeat for repeat in link.repeat]
    found = [_size(module, axis=-1) for module in others]
    if found != expected:
        sizes = f"{', '.join(names)} take {found} inputs, and {neurons} neurons of {link.producer} give {expected}"
        raise ShapeMismatch(f"{sizes}: take the link from find_links(model)")
    _check_kept(kept, neurons)
    if scales is not None:
        _check_scales(scales, len(kept))
    return producer, others[: len(link.norms)], others[len(link.norms) :]


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise InvalidInput(f"the model has no module {name!r}: take the link from find_links(model)") from error
    reason = None if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) else unsupported(module)
    if reason or not _axes(module):
        raise UnsupportedModule(f"{name}: {reason or 'filters of a grouped convolution cannot be removed'}")
    return module


def _check_kept(kept: Tensor, neurons: int) -> None:
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.dim() != 1:
        found = f"{kept.dtype} {list(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
        raise InvalidInput(f"kept: expected neuron numbers [k], int64 (mask.nonzero().flatten()), found {found}")
    if not len(kept):
        raise InvalidInput("kept: expected at least one neuron, found none")
    if kept[0] < 0 or kept[-1] >= neurons or (kept.diff() <= 0).any():
        numbers = kept.tolist()
        raise InvalidInput(f"kept: expected numbers from 0 to {neurons - 1}, ascending, each once, found {numbers}")


def _check_scales(scales: Tensor, count: int) -> None:
    if not isinstance(scales, Tensor) or scales.is_complex():
        raise InvalidInput(f"scales: expected a tensor of real numbers, found {getattr(scales, 'dtype', type(scales))}")
    if scales.shape != (count,):
        raise ShapeMismatch(f"scales: expected one for each of the {count} kept neurons, found {list(scales.shape)}")
    if not scales.isfinite().all():
        raise NonFinite("scales: found NaN or infinity, expected factors of the kept neurons' outgoing weights")


def _columns(layer: nn.Module, neurons: int, kept: Tensor, scales: Tensor | None) -> Tensor:
    """A consumer's weights of the neurons that stay, scaled: [outputs, k, weights of one neuron]."""
    weight = layer.get_parameter("weight")
    columns = _selected(weight.reshape(len(weight), neurons, -1), kept, axis=1)
    if scales is None:
        return columns
    columns = (columns * scales.detach().to(weight.device)[:, None]).to(weight.dtype)
    if not columns.isfinite().all():
        raise NonFinite(f"{type(layer).__name__} weights times scales: found NaN or infinity as {weight.dtype}")
    return columns


def _selected(tensor: Tensor, kept: Tensor, axis: int = 0) -> Tensor:
    return tensor.detach().index_select(axis, kept.to(tensor.device))


def _axes(module: nn.Module) -> _Axes:
    """Of a module that can shrink."""
    grouped = getattr(module, "groups", 1) != 1
    return {} if grouped else next((axes for kind, axes in _AXES.items() if isinstance(module, kind)), {})


def _size(module: nn.Module, axis: int = 0) -> int:
    """Outputs of a layer; inputs for axis -1."""
    return int(getattr(module, _axes(module)["weight"][axis]))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Those of the module's parameters and buffers that shrink with it."""
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    return {name: own[name] for name in _axes(module) if name in own and _has_shape(own[name])}


def _has_shape(value: object) -> bool:
    return isinstance(value, Tensor) and not nn.parameter.is_lazy(value)


def _misfits(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    return "; ".join(
        f"{key} is {list(state[key].shape)} in the state, expected {list(tensor.shape)}"
        for key, tensor in model.state_dict().items()
        if key in state and _has_shape(tensor) and tensor.shape != state[key].shape
    )


def _replace_(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """New parameters and buffers in place of the module's, and their sizes."""
    for name, tensor in tensors.items():
        old = getattr(module, name)
        parameter = isinstance(old, nn.Parameter)
        setattr(module, name, nn.Parameter(tensor, requires_grad=old.requires_grad) if parameter else tensor)
        vars(module).update(zip(_axes(module)[name], tensor.shape, strict=False))


def _tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def _numbers(module: nn.Module) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if isinstance(value, int)}


def _put_back_(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        if (tensor.shape, tensor.dtype, tensor.device) == (value.shape, value.dtype, value.device):
            tensor.copy_(value)
        else:
            tensor.data = value
