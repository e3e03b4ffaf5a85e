"""What ``convexprune prune`` reads, does and writes: everything is read and checked before anything is solved."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from convexprune.coresets import Guarantee, coreset_prune_
from convexprune.coresets.base import Method
from convexprune.evaluate import accuracy
from convexprune.files import LABEL_NAMES, load_array, load_weights_into_, save_json, save_weights, write_atomically
from convexprune.nettrim import prune_
from convexprune.reference import find_model
from convexprune.report import Report
from convexprune.solvers.errors import ConvexPruneError, InvalidInput, ShapeMismatch

__all__ = ["Job", "Labelled", "parsed_options", "parsed_size", "parsed_table"]

_IMAGE_NAMES = ("x_test", "x_train", "x", "images", "inputs")


@dataclass(frozen=True)
class Labelled:
    """Samples for the accuracy before and after."""

    data: Path
    data_key: str | None
    label_key: str | None


class Job:
    """A model, its data, and where the results go.

    Raises:
        InvalidInput: A target exists already, or a file lies where its folder should be; and as ``find_model`` and the
            readers of files.
    """

    def __init__(
        self,
        model: str,
        weights: Path,
        out: Path,
        calibration: Path | None,
        key: str | None,
        samples: int | None,
        labels_key: str | None,
        labelled: Labelled | None,
    ) -> None:
        self.targets = [out / name for name in ("model.safetensors", "report.json", "multipliers.safetensors")]
        existing = [str(path) for path in self.targets if path.exists()]
        if existing:
            raise InvalidInput(f"{', '.join(existing)}: there already, and not overwritten; choose another --out")
        place = next(path for path in (out, *out.parents) if path.exists())
        if not place.is_dir():
            raise InvalidInput(f"{place}: a file, where a folder is to be; choose another --out")
        reference = find_model(model)
        self.model = reference.build()
        load_weights_into_(self.model, weights, resize=True)
        self.inputs = None if calibration is None else reference.prepare(load_array(calibration, key)[:samples])
        self.labels = None
        if labels_key is not None:
            if calibration is None:
                raise InvalidInput("--labels-key names an array of the calibration file: give --calibration, too")
            self.labels = torch.from_numpy(np.asarray(load_array(calibration, labels_key)[:samples]))
        self.labelled = None if labelled is None else _read(labelled, reference.prepare)
        self.accuracy: dict[str, float] = {}

    def net_trim(self, **recipe: Any) -> Report:
        """``prune_``, with the accuracy before and after.

        Raises:
            InvalidInput: There are no calibration data.
        """
        if self.inputs is None:
            raise InvalidInput("Net-Trim fits each layer to what it computes on data: give --calibration")
        self._measure("before")
        report = prune_(self.model, self.inputs, **recipe)
        self._measure("after")
        return report

    def coreset(self, method: str | Method, size: Any, **recipe: Any) -> Report:
        """``coreset_prune_``, with the accuracy before and after."""
        self._measure("before")
        report = coreset_prune_(self.model, self.inputs, method, size, labels=self.labels, **recipe)
        self._measure("after")
        return report

    def written(self, report: Report) -> Iterator[str]:
        """Write the results; a line about each."""
        if self.accuracy:
            yield "accuracy {before:.2%} before, {after:.2%} after".format(**self.accuracy)
        yield f"pruned model: {save_weights(self.model, self.targets[0])}"
        yield f"report: {save_json(report.to_dict() | {'accuracy': self.accuracy}, self.targets[1])}"
        kept = {f"{name}.{i}": s.multipliers for name, group in report.solutions.items() for i, s in enumerate(group)}
        if kept:
            tensors = {name: tensor.contiguous() for name, tensor in kept.items() if tensor is not None}
            yield f"multipliers: {write_atomically(save(tensors), self.targets[2])}"

    def _measure(self, when: str) -> None:
        if self.labelled is not None:
            inputs, labels = self.labelled
            self.accuracy[when] = accuracy(self.model, inputs, labels)


def _read(labelled: Labelled, prepare: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    labels = load_array(labelled.data, labelled.label_key, LABEL_NAMES)
    images = load_array(labelled.data, labelled.data_key, _IMAGE_NAMES)
    if len(images) != len(labels):
        counts = f"{len(images)} inputs and {len(labels)} labels"
        raise ShapeMismatch(f"{labelled.data}: {counts}; choose --data-key, --label-key")
    return prepare(images), torch.from_numpy(np.asarray(labels))


def parsed_table(option: str, texts: Sequence[str], value: Callable[[str], Any] = float) -> Any:
    """["0.1"] or ["features.*=0.05", "0.1"]: patterns in their order, then the plain value for the rest.

    Raises:
        InvalidInput: A value is no number, or none that ``value`` takes.
    """
    table: dict[str, Any] = {}
    for text in texts:
        pattern, equals, given = text.rpartition("=")
        try:
            table[pattern if equals else "*"] = value(given)
        except ConvexPruneError:
            raise  # it is a number, but not one that will do
        except ValueError:
            raise InvalidInput(f"{option}: expected a number or PATTERN=number, found {text!r}") from None
    rest = table.pop("*", None)
    return table | ({} if rest is None else {"*": rest}) if table else rest


def parsed_size(keep: Sequence[str] | None, eps: Sequence[str] | None, delta: float | None) -> Any:
    """The size of a coreset: from --keep, or from --eps and --delta.

    Raises:
        InvalidInput: Both or neither were given, or something that is no size.
        InvalidTolerance: An eps or delta out of its range.
    """
    if delta is not None and eps and not keep:
        return parsed_table("--eps", eps, lambda text: Guarantee(float(text), delta))
    if delta is not None or eps:
        raise InvalidInput("a coreset's size is either --keep, or --eps with --delta")
    if not keep:
        raise InvalidInput("--keep: expected a ratio (0.1) or a count (30) to keep, or --eps with --delta; found none")
    return parsed_table("--keep", keep, _ratio_or_count)


def _ratio_or_count(text: str) -> float | int:
    return float(text) if any(mark in text.lower() for mark in ".e") else int(text)


def parsed_options(texts: Sequence[str]) -> dict[str, Any]:
    """["beta=2", "points=incoming"] as a method's options: numbers where they are numbers.

    Raises:
        InvalidInput: Something that is not NAME=VALUE.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidInput(f"--option: expected NAME=VALUE, found {text!r}")
        try:
            found[name] = _ratio_or_count(value)
        except ValueError:
            found[name] = value
    return found
