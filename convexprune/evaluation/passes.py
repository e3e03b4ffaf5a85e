"""Passes over the samples, on which all networks see one and the same batch, corrupted or noisy, that is made once.

What is kept of outputs are sums, and an outcome a sample.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from convexprune.evaluation.inputs import Distribution, Distributions, Normalisation, as_samples, labelled
from convexprune.evaluation.measures import (
    BINS,
    Predictions,
    calibration_error,
    calibration_sums,
    class_sums,
    likeness_sums,
    mistake_sums,
)
from convexprune.evaluation.networks import Answer, Metric, Network
from convexprune.evaluation.noise import Noise
from convexprune.evaluation.rows import DistributionRow, NoiseRow, Outcomes
from convexprune.layers.memory import Batch, samples_of
from convexprune.network.forwards import check_module, uncompiled
from convexprune.options import plain
from convexprune.runs.run import Progress, silent
from convexprune.solvers.arrays import checked_count
from convexprune.solvers.errors import InvalidInput, ShapeMismatch


class Tally:
    """Sums over samples, and an outcome for each: outputs are not kept."""

    def __init__(self) -> None:
        self._samples = 0
        self._outcomes: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}

    def add(self, answer: Answer, labels: Tensor | None, parent: Predictions | None) -> None:
        """A batch: what the network answers, its true labels, if they are known, and what the parent says."""
        self._samples += answer.shape[0]
        said, truth = answer.said, None if labels is None else labels.cpu().long()
        right = said.classes == truth if said is not None and truth is not None else None
        if answer.scores is not None:
            self._outcomes.append(answer.scores)
        elif right is not None:
            self._outcomes.append(right)
        if said is not None and right is not None and truth is not None:
            self._add("calibration", calibration_sums(said.confidence, right))
            self._add("classes", class_sums(truth, right, answer.shape[1]))
            if parent is not None:
                self._add("mistakes", mistake_sums(said, truth, parent))
        if said is not None and parent is not None:
            self._add("likeness", likeness_sums(said, parent))

    def row(self, distribution: Distribution) -> DistributionRow:
        """The figures of all batches."""
        sums, outcomes = self._sums, torch.cat(self._outcomes) if self._outcomes else None
        counts, right = sums.get("classes", torch.zeros(2, 0))
        _, same, apart = _means(sums.get("likeness"))
        mistakes, right_on_mistakes, confidence = _means(sums.get("mistakes"))
        return DistributionRow(
            distribution.name,
            distribution.severity,
            distribution.category,
            self._samples,
            score=None if outcomes is None else float(outcomes.double().mean()),
            classes=tuple(r / n if n else None for n, r in zip(counts.tolist(), right.tolist(), strict=True)) or None,
            calibration_error=calibration_error(sums["calibration"]) if "calibration" in sums else None,
            agreement=same,
            distance=apart,
            mistakes=None if mistakes is None else int(mistakes),
            accuracy_on_mistakes=right_on_mistakes,
            confidence_on_mistakes=confidence,
            outcomes=None if outcomes is None else Outcomes.of(outcomes),
        )

    def noise_row(self, radius: float, draws: int) -> NoiseRow:
        """How like the parent the network is in all batches, and how good."""
        _, same, apart = self._sums["likeness"].tolist()
        outcomes = torch.cat(self._outcomes) if self._outcomes else None
        score = None if outcomes is None else float(outcomes.double().mean())
        kept = None if outcomes is None else Outcomes.of(outcomes)
        return NoiseRow(radius, self._samples, same / self._samples, apart / self._samples, score, kept, draws)

    def _add(self, name: str, sums: Tensor) -> None:
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums


def _means(sums: Tensor | None) -> tuple[float | None, ...]:
    """A number of samples, and the means over these of what was summed; None where there are none."""
    if sums is None:
        return None, None, None
    count, *totals = sums.tolist()
    return (count, *(total / count if count else None for total in totals))


PARENT, CONTROL = "the parent", "the control"


class Settings(TypedDict, total=False):
    """What ``evaluate`` takes beside a network, its data and its parent."""

    control: nn.Module | None
    mean: object
    std: object
    shape: Sequence[int] | None
    corruptions: Iterable[str] | None
    severities: Iterable[int] | int
    noise: Noise | None
    metric: Metric | None
    seed: int
    textures: Sequence[npt.NDArray[Any]] | None
    batch_size: int | None
    progress: Progress | None


@dataclass(frozen=True, eq=False)
class Request:
    """What is wanted of networks; the fields are the arguments of ``evaluate``."""

    data: object
    parent: nn.Module | None
    control: nn.Module | None = None
    mean: object = None
    std: object = None
    shape: Sequence[int] | None = None
    corruptions: Iterable[str] | None = None
    severities: Iterable[int] | int = (3,)
    noise: Noise | None = None
    metric: Metric | None = None
    seed: int = 0
    textures: Sequence[npt.NDArray[Any]] | None = None
    batch_size: int | None = None
    progress: Progress | None = None


class Passes:
    """Networks and samples, checked.

    Args:
        models: By what errors call them.
        request: What is wanted of them.

    Raises:
        InvalidInput, InvalidTolerance: As ``evaluate``.
    """

    def __init__(self, models: Mapping[str, nn.Module], request: Request) -> None:
        for name, given in (("progress", request.progress), ("metric", request.metric)):
            if given is not None and not callable(given):
                raise InvalidInput(f"{name}: expected a function, found {given!r}")
        if request.noise is not None and not isinstance(request.noise, Noise):
            raise InvalidInput(f"noise: expected Noise(radii, images, draws), found {request.noise!r}")
        for name, needs in (("control", request.control), ("noise", request.noise)):
            if needs is not None and request.parent is None:
                raise InvalidInput(f"{name}: networks are compared with their parent: give parent=, too")
        near = {PARENT: request.parent, CONTROL: request.control}
        models = {title: model for title, model in near.items() if model is not None} | dict(models)
        self.models = {title: uncompiled(check_module(model)) for title, model in models.items()}
        self.data = as_samples(request.data, request.batch_size)
        self._seed = checked_count("seed", request.seed, 0)
        self._noise, self._metric, self._show = request.noise, request.metric, request.progress or silent
        self._normalisation = Normalisation.of(request.mean, request.std, request.shape)
        self.distributions = Distributions(
            request.corruptions, request.severities, self._normalisation, self._seed, request.textures
        )
        self.notices: list[str] = []
        self._networks: list[Network] = []

    def rows(self) -> dict[str, tuple[DistributionRow, ...]]:
        """Of each model a row a distribution, in one pass; raises as ``evaluate``."""
        tallies, start, total = defaultdict[object, Tally](Tally), 0, self._batches()
        for number, (batch, labels) in enumerate(labelled(self.data, any_kind=self._metric is not None)):
            if not number:
                self._begin(batch, labels)
            for place, (distribution, shown) in enumerate(self.distributions.versions(batch, start), 1):
                for title, answer, parent in self._answers(shown, labels, distribution.title):
                    tallies[title, distribution].add(answer, labels, parent)
                count = len(self.distributions.found)
                self._show("evaluate", number * count + place, total * count)
            start += samples_of(batch)
        found = self.distributions.found
        return {title: tuple(tallies[title, one].row(one) for one in found) for title in self.models}

    def noise_rows(self, samples: int) -> dict[str, tuple[NoiseRow, ...]]:
        """Of each model a row a radius, in another pass; none where no noise is wanted."""
        if self._noise is None:
            return dict.fromkeys(self.models, ())
        tallies, start, total = defaultdict[object, Tally](Tally), 0, self._batches()
        chosen = self._noise.chosen(samples, self._seed)
        for number, (batch, labels) in enumerate(labelled(self.data, any_kind=self._metric is not None), 1):
            for radius, taken, shown in self._noise.versions(batch, start, chosen, self._seed):
                truth = None if labels is None else labels[taken]
                for title, answer, parent in self._answers(shown, truth, f"noise of at most {radius:g}"):
                    tallies[title, radius].add(answer, truth, parent or answer.said)
            self._show("noise", number, total)
            start += samples_of(batch)
        radii, draws = self._noise.radii, self._noise.draws
        return {
            title: tuple(tallies[title, radius].noise_row(radius, draws) for radius in radii) for title in self.models
        }

    def settings(self) -> dict[str, object]:
        """What figures depend on beside models and data, as plain data."""
        found = self.distributions.found
        return {
            "seed": self._seed,
            "mean": list(self._normalisation.mean),
            "std": list(self._normalisation.std),
            "shape": list(self._normalisation.shape),
            "corruptions": list(dict.fromkeys(one.name for one in found if one.severity is not None)),
            "severities": sorted({one.severity for one in found if one.severity is not None}),
            "noise": plain(self._noise),
            "metric": None if self._metric is None else plain(self._metric),
            "bins": BINS,
        }

    def _begin(self, batch: Batch, labels: Tensor | None) -> None:
        """Look at how the models are to be called on such batches."""
        if labels is None and (self._metric is not None or PARENT not in self.models):
            why = "metric= needs them" if self._metric is not None else "without a parent= they are needed"
            raise InvalidInput(
                f"data: found no labels (whole numbers, one a sample), and {why}: give (inputs, labels), batches of "
                "these, mappings with the entry 'labels', or Data(inputs, labels=…)"
            )
        for title, model in self.models.items():
            network, notices = Network.fitted(title, model, batch, self.data.forward)
            self._networks.append(network)
            self.notices += [notice for notice in notices if notice not in self.notices]

    def _answers(
        self, batch: Batch, labels: Tensor | None, where: str
    ) -> Iterator[tuple[str, Answer, Predictions | None]]:
        """What each network answers, with what the parent says, which comes first."""
        parent: Answer | None = None
        for network in self._networks:
            answer = network.answer(batch, labels, self._metric, where)
            if parent is not None and answer.shape != parent.shape:
                raise ShapeMismatch(
                    f"{network.title}: expected outputs {list(parent.shape)}, as the parent's, found "
                    f"{list(answer.shape)}"
                )
            if answer.said is None and self._noise is not None:
                raise InvalidInput("noise: it compares predictions, and outputs or labels are no classes: leave it out")
            yield network.title, answer, None if parent is None else parent.said
            parent = answer if network.title == PARENT else parent

    def _batches(self) -> int:
        """How many there are; 0 if that is not known."""
        inputs = self.data.inputs
        if isinstance(inputs, Tensor | np.ndarray) and inputs.ndim:
            return -(-len(inputs) // self.data.batch_size)
        if isinstance(inputs, Sized) and not isinstance(inputs, Mapping):
            with suppress(TypeError):  # a loader of a stream
                return len(inputs)
        return int(isinstance(inputs, Mapping))
