"""A model and its data as they are named on the command line: read from files, and checked."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convexprune.cli.reference import REFERENCE_MODELS, find_model
from convexprune.files.arrays import INPUT_NAMES, LABEL_NAMES, Array, load_array, load_arrays
from convexprune.files.weights import MAX_RATIO
from convexprune.layers.memory import samples_at, samples_of
from convexprune.network.padding import KEY
from convexprune.network.weights import load_weights_into_
from convexprune.runs.data import Data
from convexprune.solvers.arrays import stratified
from convexprune.solvers.errors import InvalidInput, ShapeMismatch

_IMAGE_NAMES = ("x_test", *INPUT_NAMES)
_BATCH = 256
_SAME = 1e-4  # what pixels may differ by
_ALONE = ""  # the name of an array that needs none

Inputs = Any
"""A tensor, or batches of several tensors by name, or whatever else a user's ``prepare`` gives."""


@dataclass(frozen=True, eq=False)
class ModelData:
    """A model and its data, as the files hold them.

    Attributes:
        model: With its weights.
        prepare: What makes inputs of arrays.
        inputs: Those to fit to.
        holdout: Those that are held out.
        labels: Of the inputs, if a key of them was given.
        notices: What was chosen of the files.
    """

    model: nn.Module
    prepare: Callable[..., object]
    inputs: Inputs = None
    holdout: Inputs = None
    labels: Tensor | None = None
    notices: tuple[str, ...] = ()

    @property
    def batch(self) -> Inputs:
        """Some inputs, such as the model takes; None without any."""
        if self.inputs is None or isinstance(self.inputs, Tensor):
            return self.inputs if self.inputs is None else self.inputs[:_BATCH]
        return {name: value for name, value in self.inputs[0].items() if name in _arguments(self.model)}


def read_source(
    name: str,
    weights: Path,
    calibration: Path | None = None,
    key: str | None = None,
    *,
    mask: str | bool | None = None,
    samples: int | None = None,
    max_ratio: float = MAX_RATIO,
    holdout: int | None = None,
    labels_key: str | None = None,
) -> ModelData:
    """Read a model and its inputs as they are named on the command line.

    Args:
        name: The model's, as ``find_model`` takes it.
        weights: The file of its weights.
        calibration: That of the inputs; None: the method needs none.
        key: The array of inputs.
        mask: The name of the array that says which positions count; None for "attention_mask" if there is one, or
            False for none.
        samples: How many of the samples are taken, at random and the same each time; None: all.
        max_ratio: As for ``load_weights``.
        holdout: How many of these are held out.
        labels_key: The array of labels, of which each is to have its share of the samples.

    Raises:
        InvalidInput: As many are to be held out as there are, or more; and as the readers of files.
        ShapeMismatch: Arrays of one file that are not equally long.
    """
    if labels_key is not None and calibration is None:
        raise InvalidInput("--labels-key names an array of the calibration file: give --calibration, too")
    reference = find_model(name, Path.cwd)
    model = reference.build()
    load_weights_into_(model, weights, resize=True, max_ratio=max_ratio)
    if calibration is None:
        return ModelData(model, reference.prepare)
    names = () if name in REFERENCE_MODELS else _arguments(model)  # these take one array of images
    arrays = _inputs(calibration, key, names, mask, INPUT_NAMES, max_ratio)
    labels = None if labels_key is None else load_array(calibration, labels_key, max_ratio=max_ratio)
    total, notices = _length(calibration, [*arrays.values(), labels]), tuple[str, ...]()
    rows = np.arange(total)
    if samples is not None and samples < total:
        rows = stratified(total, samples).numpy()
        if labels is not None:
            rows = np.sort(np.argsort(labels, kind="stable")[rows])
        of = "" if labels is None else ", of each label its share"
        notices = (f"fitted to {samples:,} of {total:,} samples: a random choice, the same each time{of}",)
    held = np.zeros(len(rows), dtype=bool)
    if holdout is not None:
        if holdout >= len(rows):
            raise InvalidInput(f"--holdout: expected fewer than the {len(rows)} samples, found {holdout}")
        held[stratified(len(rows), holdout).numpy()] = True
    return ModelData(
        model,
        reference.prepare,
        inputs=_prepared(reference.prepare, arrays, rows[~held]),
        holdout=_prepared(reference.prepare, arrays, rows[held]) if held.any() else None,
        labels=None if labels is None else torch.from_numpy(np.asarray(labels[rows[~held]])),
        notices=notices,
    )


def evaluation_samples(
    model: nn.Module,
    prepare: Callable[..., object],
    path: Path,
    data_key: str | None,
    label_key: str | None,
    samples: int | None,
    max_ratio: float,
) -> tuple[Data, dict[str, Any] | None]:
    """Labelled samples of a file, and how pixels became inputs, as ``evaluate`` takes it; None if that is not known.

    Of ``samples`` at random, the same each time, each label has its share.
    """
    labels = load_array(path, label_key, LABEL_NAMES, max_ratio=max_ratio)
    arrays = _inputs(path, data_key, _arguments(model), False, _IMAGE_NAMES, max_ratio)
    total = _length(path, [*arrays.values(), labels])
    rows = np.arange(total)
    if samples is not None and samples < total:
        rows = np.sort(np.argsort(labels, kind="stable")[stratified(total, samples).numpy()])
    inputs = _prepared(prepare, arrays, rows)
    data = Data(inputs, labels=torch.from_numpy(np.asarray(labels[rows])))
    return data, pixel_scale(inputs, arrays[_ALONE][rows[:_BATCH]]) if _ALONE in arrays else None


def pixel_scale(inputs: Inputs, images: Array) -> dict[str, Any] | None:
    """By which mean and std inputs are (pixels − mean)/std of images, a number a channel; None if they are not.

    Args:
        inputs: Those of the images, or of more that come after them.
        images: [n, height, width], with channels behind or before, or [n, values] where inputs are images; whole
            numbers to 255, or others to 1 or 255.

    Returns:
        The arguments mean, std and shape of ``evaluate``; the last is None where inputs are no flattened images.
    """
    x = inputs[: len(images)] if isinstance(inputs, Tensor) and inputs.is_floating_point() else torch.empty(0)
    if images.dtype.kind not in "uif" or x.numel() != images.size:
        return None
    images = images.reshape(x.shape) if images.ndim == 2 else images
    if images.ndim not in (3, 4):
        return None
    pixels = torch.from_numpy(images.astype(np.float64))
    pixels = pixels / (255 if images.dtype.kind in "ui" or float(pixels.max()) > 2 else 1)
    pixels = pixels[:, None] if images.ndim == 3 else pixels.movedim(3, 1) if images.shape[3] in (1, 3) else pixels
    if pixels.shape[1] not in (1, 3) or x.shape not in (pixels.shape, pixels.flatten(1).shape):
        return None
    p, q = (each.movedim(1, 0).flatten(1) for each in (pixels, x.double().reshape(pixels.shape)))
    centre, middle = p.mean(1, keepdim=True), q.mean(1, keepdim=True)
    std = ((p - centre) * (q - middle)).sum(1, keepdim=True) / (q - middle).square().sum(1, keepdim=True)
    mean = centre - std * middle  # so that std·q + mean is next to p, by least squares
    if not (bool((std > 0).all()) and float((std * q + mean - p).abs().max()) <= _SAME):  # nor where that is NaN
        return None
    shape = None if x.shape == pixels.shape else tuple(pixels.shape[1:])
    return {"mean": tuple(mean[:, 0].tolist()), "std": tuple(std[:, 0].tolist()), "shape": shape}


def labelled_samples(
    read: ModelData, path: Path, data_key: str | None, label_key: str | None, max_ratio: float
) -> tuple[Inputs, Tensor]:
    """Inputs and labels of a file, for the accuracy before and after."""
    labels = load_array(path, label_key, LABEL_NAMES, max_ratio=max_ratio)
    names = () if isinstance(read.inputs, Tensor) else _arguments(read.model)
    arrays = _inputs(path, data_key, names, False, _IMAGE_NAMES, max_ratio)
    total = _length(path, list(arrays.values()))
    if total != len(labels):
        raise ShapeMismatch(f"{path}: {total} inputs and {len(labels)} labels; choose --data-key, --label-key")
    return _prepared(read.prepare, arrays, np.arange(total)), torch.from_numpy(np.asarray(labels))


def _arguments(model: nn.Module) -> tuple[str, ...]:
    """What the model's forward takes by name; labels only where it needs them."""
    found = inspect.signature(model.forward).parameters.values()
    named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return tuple(p.name for p in named if p.default is p.empty or p.name not in LABEL_NAMES)


def _inputs(
    path: Path,
    key: str | None,
    arguments: tuple[str, ...],
    mask: str | bool | None,
    names: tuple[str, ...],
    max_ratio: float,
) -> dict[str, Array]:
    """One array without a name; or, of a file with several that are named as the model's arguments or the mask, these.

    A ``key`` names the array for the model's first argument.
    """
    hides = mask if isinstance(mask, str) else KEY if mask is None else ""
    found = load_arrays(path, [hides, *(arguments if key is None else ())], max_ratio=max_ratio) if arguments else {}
    if isinstance(mask, str) and mask not in found:
        raise InvalidInput(f"--mask: {path} holds no array {mask!r} that could hide positions of this model's inputs")
    if len(found) > 1:
        return found
    one = load_array(path, key, (*names, *arguments), max_ratio=max_ratio)
    return {arguments[0]: one, **found} if hides in found else {_ALONE: one}


def _length(path: Path, arrays: Sequence[Array | None]) -> int:
    """How many samples there are; ShapeMismatch is raised for arrays of other lengths."""
    lengths = [len(array) for array in arrays if array is not None]
    if len(set(lengths)) > 1:
        raise ShapeMismatch(f"{path}: its arrays have {lengths} samples, expected as many in each")
    return lengths[0]


def _prepared(prepare: Callable[..., object], arrays: Mapping[str, Array], rows: Array) -> Inputs:
    """The inputs of these samples: a tensor as it is, several by name as batches."""
    chosen = {name: array[rows] for name, array in arrays.items()}
    inputs = prepare(chosen.get(_ALONE, chosen))
    if not isinstance(inputs, Mapping):
        return inputs
    return [samples_at(inputs, slice(start, start + _BATCH)) for start in range(0, samples_of(inputs), _BATCH)]
