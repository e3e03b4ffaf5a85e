"""The reference architectures, and finding a model by name."""

import difflib
import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from convexprune.files.arrays import Array
from convexprune.solvers.errors import EmptyInput, InvalidInput, NonFinite, ShapeMismatch

Arrays = Array | Mapping[str, Array]
"""One array [samples, ...], or several by name, as long as each other."""


@dataclass(frozen=True)
class ReferenceModel:
    """An architecture by name.

    Attributes:
        name: What ``find_model`` finds it by.
        build: Makes the module, with fresh weights.
        prepare: Turns raw arrays, as they lie in a file, into the network's input.
    """

    name: str
    build: Callable[[], nn.Module]
    prepare: Callable[..., object]


def find_model(spec: str, folder: Callable[[], Path] | None = None) -> ReferenceModel:
    """Find a built-in model by name, or the user's own as ``package.module:factory``.

    ``factory()``, which only ``build`` calls, returns the module; ``factory.prepare``, where there is one, turns arrays
    into its input (several come as a mapping by name); without it floats are taken as they are.

    Args:
        spec: The name.
        folder: Gives a folder that the user's own modules may lie in. It comes last on the path, so that nothing in it
            takes the place of an installed package.

    Raises:
        InvalidInput: no such built-in name, module or attribute, a factory or ``prepare`` that cannot be called; from
            ``build``: the factory fails or returns something else than an ``nn.Module``.
    """
    if spec in REFERENCE_MODELS:
        return REFERENCE_MODELS[spec]
    module_name, colon, attribute = spec.partition(":")
    if not colon:
        hint, known = _suggest(spec, REFERENCE_MODELS), ", ".join(REFERENCE_MODELS)
        raise InvalidInput(f"No model is called {spec!r}{hint}; built in: {known}; your own: package.module:factory.")
    if not module_name or not attribute:
        raise InvalidInput(f"{spec!r} names no model; write package.module:factory, for example my_models:build.")
    if folder is not None and (own := str(folder())) not in sys.path:
        sys.path.append(own)
    module = _imported(module_name)
    if not hasattr(module, attribute):
        raise InvalidInput(f"The module {module_name!r} has no {attribute!r}{_suggest(attribute, vars(module))}.")
    factory = getattr(module, attribute)
    prepare = getattr(factory, "prepare", _as_inputs)
    for what, value in ((f"{spec!r} is", factory), (f"{spec!r} has a prepare that is", prepare)):
        if not callable(value):
            raise InvalidInput(f"{what} a {type(value).__name__}; expected a function or class to call.")
    return ReferenceModel(spec, functools.partial(_build, spec, factory), prepare)


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise InvalidInput(
                f"There is no module {error.name!r}, looking for {name!r}; write the dotted name that `import` takes, "
                "without .py or slashes, and check the folder you are in."
            ) from error
        raise InvalidInput(
            f"Importing {name!r} failed: {type(error).__name__}: {error}; mend it, or install what it needs."
        ) from error


def _build(spec: str, factory: Callable[[], object]) -> nn.Module:
    try:
        model = factory()
    except Exception as error:
        failed = f"{spec!r} failed when called without arguments"
        raise InvalidInput(f"{failed}: {type(error).__name__}: {error}.") from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"{spec!r} returned a {type(model).__name__}; expected a torch.nn.Module.")
    return model


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _lenet_300_100() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def _lenet_5() -> nn.Module:
    convolutions = [nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


def _as_inputs(arrays: Arrays) -> object:
    """Floats as float32; of several arrays by name the others, such as tokens and masks, as they are."""
    if isinstance(arrays, Mapping):
        return {name: _as_floats(a) if a.dtype.kind == "f" else torch.from_numpy(a) for name, a in arrays.items()}
    return _as_floats(arrays)


def _as_floats(array: Array) -> Tensor:
    if array.dtype.kind != "f":
        advice = "scale it as in training and save it as float32, or give the factory a `prepare` function"
        raise InvalidInput(f"The input array is {array.dtype}, expected floats; {advice}.")
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _mnist_pixels(images: Array) -> Tensor:
    """Images as float32 pixels in [0, 1], flattened to [n, 784]."""
    if images.shape[1:] not in ((784,), (28, 28), (1, 28, 28)):
        raise ShapeMismatch(f"The images have shape {images.shape}; expected (n, 784), (n, 28, 28) or (n, 1, 28, 28).")
    if len(images) == 0:
        raise EmptyInput(f"The images have shape {images.shape}; expected at least one.")
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise InvalidInput(f"The images are {images.dtype}; expected uint8 in 0..255, or floats in [0, 1].")
    pixels = torch.from_numpy(images.reshape(len(images), 784).astype(np.float32))
    if images.dtype == np.uint8:
        return pixels / 255
    if not bool(torch.isfinite(pixels).all()):
        raise NonFinite("The images hold NaN or infinity; remove or repair those samples.")
    low, high = float(pixels.min()), float(pixels.max())
    if low < -0.5 or high > 1.5:  # room for resampling overshoot, yet raw or standardised pixels do not pass
        raise InvalidInput(f"The float images range over [{low:g}, {high:g}], expected [0, 1]; divide pixels by 255.")
    return pixels


_LENETS = (
    ReferenceModel("lenet-300-100", _lenet_300_100, _mnist_pixels),
    ReferenceModel("lenet-5", _lenet_5, lambda images: _mnist_pixels(images).reshape(-1, 1, 28, 28)),
)
REFERENCE_MODELS = {model.name: model for model in _LENETS}
