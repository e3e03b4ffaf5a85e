"""A model's weights: loaded from a file, saved, and taken out with the neurons that they belong to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from convexprune.errors import UnsupportedModule
from convexprune.files.weights import (
    KEYS,
    MAX_RATIO,
    StrPath,
    listed,
    load_weights,
    safetensors_bytes,
    write_atomically,
)
from convexprune.layers.emptied import without_channels_
from convexprune.network.forwards import check_module, restoring
from convexprune.network.graph import inputs_of, outputs_of
from convexprune.network.links import Link, find_links
from convexprune.solvers.errors import InvalidInput, NonFinite, ShapeMismatch

_ROWS = ("weight", "bias", "running_mean", "running_var")  # all tensors that have an entry, or more, for each output
_SIZES = ("num_features", "num_parameters", "in_channels", "out_channels", "groups")  # of what is on the way


def load_weights_into_(model: nn.Module, path: StrPath, *, resize: bool = False, max_ratio: float = MAX_RATIO) -> None:
    """Load a file of weights into ``model`` in place, strictly; on any error the model stays as it was.

    Only ``num_batches_tracked`` may be missing, as in plain torch: files from before torch 0.4.1 lack it.

    Args:
        model: The architecture that the weights were saved from.
        path: As for ``load_weights``.
        resize: Whether the file may hold the same network with neurons removed: layers then become as small as it says,
            along what ``find_links`` finds. The network's own inputs and outputs stay.
        max_ratio: As for ``load_weights``.

    Raises:
        ShapeMismatch: a tensor has another shape than the model's, or than the other tensors leave to it.
        InvalidInput: keys are missing or unexpected (the message lists them), or the model is no module.
        UnsupportedModule: layers have to shrink, and the model cannot be traced.
        NonFinite: a tensor holds NaN or infinity in the model's dtype.
        FileNotFoundError, DamagedFile: as in ``load_weights``.
    """
    weights = load_weights(path, max_ratio=max_ratio)
    with restoring(model):
        if resize:
            try:
                resize_(model, weights)
            except (ShapeMismatch, UnsupportedModule) as error:
                raise type(error)(f"{path}: {error}") from error
        own = model.state_dict()
        weights |= {k: own[k] for k in own.keys() - weights.keys() if k.endswith("num_batches_tracked")}
        _check_keys(path, weights, own)
        for key, tensor in weights.items():
            if not bool(torch.isfinite(tensor.to(own[key].dtype)).all()):
                raise NonFinite(f"{path}: {key!r} holds NaN or infinity as {own[key].dtype}; train or export it again.")
        model.load_state_dict(weights)


def save_weights(model: nn.Module, path: StrPath) -> Path:
    """Write the model's state dict as safetensors that ``load_state_dict(load_file(path))`` takes, atomically.

    Tied tensors are written once under each of their names, so that the strict load of plain torch finds all keys.

    Raises:
        InvalidInput: ``path`` does not end in ``.safetensors``, or an entry is not a dense tensor with data.
        OSError: the file could not be written; what was at ``path`` before is still there.
    """
    path, state = Path(path), model.state_dict()
    if path.suffix.lower() != ".safetensors":
        raise InvalidInput(f"{path}: weights are written as safetensors; give a path ending in .safetensors.")
    content = safetensors_bytes(_unshared(state), {"format": "pt", KEYS: json.dumps(list(state))})
    return write_atomically(content, path)


def remove_neurons_(model: nn.Module, link: Link, kept: Tensor) -> None:
    """Remove all other neurons of the link's producers, with their entries on the way and columns in its consumers.

    The tensors that shrink are new ones, without gradients: an optimiser must be made anew.

    Where no neuron stays, a residual block is its shortcut, and whatever a norm behind its last layer makes of zeros.
    That layer, the consumer, returns its bias at every position, or zeros; convolutions and batch norms become modules
    of classes that need no channels (``convexprune.layers.emptied``), which torch's own do.

    Args:
        model: The network.
        link: What ``find_links`` found in it; it may have been shrunk since.
        kept: The neurons that stay [k], int64, ascending; none of them where all are to go.

    Raises:
        InvalidInput: ``kept`` cannot be used, or no neuron is to stay where a pool on the way needs one.
        ShapeMismatch: The layers are of other sizes than the link says. In either case nothing was changed.
    """
    _rewire_(_place(model, link, kept))


def mask_neurons_(model: nn.Module, link: Link, kept: Tensor) -> None:
    """As ``remove_neurons_``, with zeros in place of what would be removed; the Parameter objects stay.

    In eval mode the outputs are those after ``remove_neurons_``, up to rounding, and errors the same. What is on the
    way stays as it is: behind a norm a removed neuron is no zero, but nothing takes it.
    """
    at = _place(model, link, kept)
    at = at._replace(kept=torch.ones(at.neurons).index_fill(0, at.kept, 0).nonzero()[:, 0])  # those that go
    with torch.no_grad():
        for layer in at.consumers:
            weight = layer.get_parameter("weight")
            weight[:, at.entries(weight.shape[1])] = 0
        for tensor in (tensor for layer in at.producers for tensor in _tensors(layer).values()):
            tensor[at.entries(len(tensor))] = 0


def resize_links_(model: nn.Module, links: Mapping[str, Link], widths: Mapping[str, int]) -> None:
    """Give links as many neurons as ``widths`` says, fewer or more, for weights that are to be drawn anew.

    Until then the first neurons stay, and those beyond the number of before repeat them.

    Args:
        model: The network.
        links: Found in it by ``find_links``.
        widths: How many neurons each is to have, ≥ 0.

    Raises:
        InvalidInput: No neuron is to stay where a pool on the way needs one.
        ShapeMismatch: A link without neurons is to have some, or layers are of other sizes than a link says. What was
            resized before stays so.
    """
    for name, link in links.items():
        before = outputs_of(model.get_submodule(name))
        if widths[name] and not before:
            raise ShapeMismatch(f"{name} has no neurons, so what belongs to one is unknown: give the network of before")
        at = _place(model, link, torch.arange(min(before, widths[name])))
        _rewire_(at._replace(kept=torch.arange(widths[name]) % max(before, 1)))


def resize_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make a model as small as a state dict's tensors, for load_state_dict.

    Only neurons that ``find_links`` finds are removed, with all that belongs to them; the first of each layer stay.
    Keys that only one of the two has are left to ``load_state_dict``. Where shapes agree, nothing is traced.

    Raises:
        ShapeMismatch: Shapes differ in another way, or do not fit each other.
        InvalidInput: A layer has no neurons left, and a pool behind it needs one.
        UnsupportedModule: Shapes differ, and the model's forward cannot be traced. In any case nothing was changed.
    """
    misfits = _misfits(check_module(model), state)
    if not misfits:
        return
    try:
        links, _ = find_links(model, residual=True)
    except UnsupportedModule as error:
        raise UnsupportedModule(f"{misfits}; and {error}") from error
    with restoring(model):
        for link in links.values():
            key, neurons = f"{link.producer}.weight", outputs_of(model.get_submodule(link.producer))
            shape = state[key].shape if key in state else ()
            if shape and shape[0] < neurons:
                remove_neurons_(model, link, torch.arange(shape[0]))
        if misfits := _misfits(model, state):
            raise ShapeMismatch(f"{misfits}: only neurons that find_links finds may be missing, with all their weights")


class _Place(NamedTuple):
    """The modules of a link; ``carriers`` are norms, and what else is on the way."""

    neurons: int
    kept: Tensor  # numbers of the neurons that are meant, int64
    producers: list[nn.Module]
    carriers: list[nn.Module]
    consumers: list[nn.Module]

    def entries(self, count: int) -> Tensor:
        """The numbers of their entries along an axis of so many, as many for each neuron."""
        each = count // max(self.neurons, 1)
        return (self.kept[:, None] * each + torch.arange(each)).flatten()


def _place(model: nn.Module, link: Link, kept: Tensor) -> _Place:
    """Where the link's neurons are; that its modules can lose them was seen when it was found."""
    names = (link.producers, (*link.norms, *link.along), (*link.consumers, *link.emptied))
    producers, carriers, consumers = ([model.get_submodule(name) for name in each] for each in names)
    neurons = outputs_of(producers[0])
    found = [*map(outputs_of, producers), *map(inputs_of, consumers[: len(link.repeat)])]
    expected = [neurons for _ in producers] + [neurons * repeat for repeat in link.repeat]
    if found != expected:
        sizes = f"neurons of {', '.join(link.producers)} and inputs of {', '.join(link.consumers)} are {found}"
        raise ShapeMismatch(f"{sizes}, expected {expected}: take the link from find_links(model)")
    numbers = isinstance(kept, Tensor) and kept.dtype == torch.int64 and kept.dim() == 1
    if not numbers or (kept < 0).any() or (kept >= neurons).any() or (kept.diff() <= 0).any():
        shape = f"{kept.dtype} {list(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
        raise InvalidInput(
            f"kept: expected neuron numbers [k], int64, from 0 to {neurons - 1}, ascending, each once, "
            f"found {kept.tolist() if numbers else shape}"
        )
    if link.pools and not len(kept):
        pools = f"{', '.join(link.pools)}, and torch has no such pool for maps without channels"
        raise InvalidInput(f"kept: the filters of {link.producer} go through {pools}; keep one of them")
    return _Place(neurons, kept.cpu(), producers, carriers, consumers)


@torch.inference_mode(False)  # else the new parameters could never be trained
def _rewire_(at: _Place) -> None:
    """The neurons that are meant, in this order, in place of all that there are."""
    chosen = {
        module: {name: tensor[at.entries(len(tensor))] for name, tensor in _tensors(module).items()}
        for module in (*at.producers, *at.carriers)
    }
    for layer in at.consumers:  # which may be a producer too
        weight = chosen.setdefault(layer, {}).get("weight", layer.get_parameter("weight").detach())
        chosen[layer]["weight"] = weight[:, at.entries(weight.shape[1])]
    _replace_(chosen)
    for layer in (*at.producers, *at.consumers):
        names = ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", "in_channels")
        vars(layer).update(zip(names, layer.get_parameter("weight").shape, strict=False))
    for module in at.carriers:  # a norm that holds no tensors has a size too
        sizes = {name: getattr(module, name) for name in _SIZES if hasattr(module, name)}
        vars(module).update({name: size // max(at.neurons, 1) * len(at.kept) for name, size in sizes.items()})
    for module in chosen:
        without_channels_(module)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Those of the module's parameters and buffers that have rows for neurons."""
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    return {name: own[name] for name in _ROWS if _has_shape(own.get(name))}


def _has_shape(value: object) -> bool:
    return isinstance(value, Tensor) and not nn.parameter.is_lazy(value)


def _misfits(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    return "; ".join(
        f"{key} is {list(state[key].shape)} in the state, expected {list(tensor.shape)}"
        for key, tensor in model.state_dict().items()
        if key in state and _has_shape(tensor) and tensor.shape != state[key].shape
    )


def _replace_(tensors: Mapping[nn.Module, Mapping[str, Tensor]]) -> None:
    """New parameters and buffers in place of the modules'; a buffer that several have is one again."""
    made = dict[Tensor, Tensor]()
    for module, name, tensor in [(module, name, own[name]) for module, own in tensors.items() for name in own]:
        old = getattr(module, name)
        order = sorted(range(old.dim()), key=old.stride, reverse=True)  # of axes in memory, such as channels last
        new = tensor.permute(order).contiguous().permute([order.index(axis) for axis in range(old.dim())])
        parameter = isinstance(old, nn.Parameter)
        new = nn.Parameter(new, requires_grad=old.requires_grad) if parameter else new
        setattr(module, name, made.setdefault(old, new))


def _check_keys(path: StrPath, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    faults = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": [
            f"{key} (file {list(weights[key].shape)}, model {list(own[key].shape)})"
            for key in own
            if key in weights and weights[key].shape != own[key].shape
        ],
    }
    if text := "; ".join(f"{fault}: {listed(keys)}" for fault, keys in faults.items() if keys):
        kind = InvalidInput if faults["missing"] or faults["unexpected"] else ShapeMismatch
        raise kind(f"{path} does not fit the model, {text}. Build the model that these weights were saved from.")


def _unshared(state: Mapping[str, object]) -> dict[str, Tensor]:
    """The state dict's tensors on the CPU, contiguous, no two on the same storage: safetensors refuses shared ones."""
    tensors, storages = dict[str, Tensor](), set[int]()
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            raise InvalidInput(f"{key!r} is not a dense tensor with data; safetensors cannot hold it, remove it first.")
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors
