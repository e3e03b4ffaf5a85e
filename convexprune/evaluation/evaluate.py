"""``evaluate`` and ``evaluate_series``: what is known of pruned networks beyond their accuracy."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any, Unpack

import numpy.typing as npt
import torch
from torch import nn

from convexprune.costs.counts import permanent
from convexprune.evaluation.networks import Metric
from convexprune.evaluation.noise import Noise
from convexprune.evaluation.passes import CONTROL, PARENT, Passes, Request, Settings
from convexprune.evaluation.results import Evaluation
from convexprune.evaluation.rows import DistributionRow
from convexprune.evaluation.series import Series
from convexprune.files.weights import listed, plain
from convexprune.network.forwards import check_module, evaluating
from convexprune.runs.run import Progress
from convexprune.solvers.arrays import as_number
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, ShapeMismatch
from convexprune.solvers.methods.solve import environment


def evaluate(
    model: nn.Module,
    data: object,
    *,
    parent: nn.Module | None = None,
    control: nn.Module | None = None,
    mean: object = None,
    std: object = None,
    shape: Sequence[int] | None = None,
    corruptions: Iterable[str] | None = None,
    severities: Iterable[int] | int = (3,),
    noise: Noise | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    textures: Sequence[npt.NDArray[Any]] | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a network beyond its accuracy: each class, calibration, corruptions, likeness to its parent, noise.

    Models are left as found, and run in eval mode on the devices that they are on.

    Args:
        model: A classifier that returns [samples, classes], pruned or not; with ``metric``, any network.
        data: (inputs, labels), an iterable of batches (inputs, labels) such as a data loader, or of mappings with the
            entry "labels", or ``Data``; with a parent, inputs alone will do for what needs no labels. Gone through
            once, and once more for noise.
        parent: The network before it was pruned.
        control: One that was trained separately: how like each other can networks be expected to be?
        mean: How inputs were normalised, (pixels − mean)/std: a number, or one a channel; None: 0.
        std: Likewise; None: 1.
        shape: That of an image, (channels, height, width), where inputs are flattened images [n, values].
        corruptions: Names, out of ``CORRUPTIONS``; () for none. None: all that can be applied, where inputs are images
            [n, 1 or 3, height, width] with pixels from 0 to 1.
        severities: Of each corruption, 1 to 5.
        noise: Which noise the network is compared with its parent on; None: on none.
        metric: Called as ``metric(outputs, labels)``: a figure for each sample, the more the better, in the place of
            whether it is right.
        seed: Of what is random in corruptions and noise.
        textures: Pictures of frost, uint8 arrays [height, width, 3], for the corruption "frost".
        batch_size: Samples at a time where inputs are one tensor; None: 256, or as ``Data`` says.
        progress: Called as ``progress(stage, done, total)`` with the stage "evaluate" or "noise"; the total is 0 where
            it is not known.

    Returns:
        The figures; its ``notices`` say what was left out, and why.

    Raises:
        InvalidInput: No labels and no parent; a control, or noise, without a parent; a corruption that there is not, or
            that cannot be applied; outputs, or labels, that are no classes.
        ShapeMismatch: The parent has other outputs; or labels, outputs or the metric are not one a sample.
        InvalidTolerance: A severity, a deviation, the seed or the batch size is out of its range.
        MissingExtra: A corruption that was named needs a package that is not installed.
        NonFinite: NaN or infinity in the data, in a network's outputs, or in the metric.
        EmptyCalibration: There is no sample.
    """
    images = (mean, std, shape, corruptions, severities, noise)
    request = Request(data, parent, control, *images, metric, seed, textures, batch_size, progress)
    return _evaluated({"the model": model}, request)["the model"]


def evaluate_series(
    models: Sequence[nn.Module],
    data: object,
    *,
    parent: nn.Module,
    ratios: Sequence[float] | None = None,
    name: str = "pruned",
    **settings: Unpack[Settings],
) -> Series:
    """Evaluate networks that were pruned from one parent to several ratios, all on the same samples.

    Args:
        models: The networks.
        data: As in ``evaluate``.
        parent: The network before it was pruned.
        ratios: Of each network the part of the parent's nonzero weights that is gone, 0 to 1; None: counted in the
            tensors with two axes or more.
        name: Of the method that pruned them.
        settings: All else that ``evaluate`` takes: control, corruptions, noise and so on.

    Raises:
        InvalidInput: There is no network. ShapeMismatch: There are not as many ratios.
        InvalidTolerance: A ratio is not from 0 to 1. UnsupportedModule: Weights cannot be counted.
        And as ``evaluate``.
    """
    networks = list(models)
    if not networks:
        raise InvalidInput("models: expected at least one network, found none")
    gone = _counted(networks, parent) if ratios is None else _checked_ratios(ratios, len(networks))
    titles = [f"model {number} (ratio {ratio:.3g})" for number, ratio in enumerate(gone)]
    found = _evaluated(dict(zip(titles, networks, strict=True)), Request(data, parent, **settings))
    return Series(name, gone, tuple(found[title] for title in titles), found[PARENT], found.get(CONTROL))


def _evaluated(models: Mapping[str, nn.Module], request: Request) -> dict[str, Evaluation]:
    """The evaluations of models, parent and control, by what errors call them."""
    began = time.perf_counter()
    passes = Passes(models, request)
    with ExitStack() as stack:
        for model in passes.models.values():
            stack.enter_context(evaluating(model))
        rows = passes.rows()
        first = next(iter(rows.values()))
        noise = passes.noise_rows(first[0].samples)
    notices = (*passes.notices, *passes.distributions.notices, *_without_samples(first[0]))
    seconds, found = time.perf_counter() - began, dict[str, Evaluation]()
    for title, model in passes.models.items():
        like = next(model.parameters(), torch.empty(0))
        provenance = plain(passes.settings() | environment(like))
        near = (found.get(PARENT), None if title == CONTROL else found.get(CONTROL))
        found[title] = Evaluation(rows[title], noise[title], notices, provenance, seconds, *near)
    return found


def _without_samples(row: DistributionRow) -> list[str]:
    """Which classes have no sample, as a sentence, if there are any."""
    empty = [str(number) for number, value in enumerate(row.classes or ()) if value is None]
    which = f"class {empty[0]} has" if len(empty) == 1 else f"classes {listed(empty)} have"
    return [f"{which} no sample: what the network does there is not known"] if empty else []


def _counted(models: Sequence[nn.Module], parent: nn.Module) -> tuple[float, ...]:
    """Of each model the part of the parent's nonzero weights that is gone."""
    before, *after = (
        sum(int(own.count_nonzero()) for own in permanent(check_module(one)).parameters() if own.dim() > 1)
        for one in chain([parent], models)
    )
    if not before or max(after) > before:
        raise InvalidInput(
            f"ratios: the parent has {before:,} nonzero weights, a pruned network {max(after):,}: give ratios="
        )
    return tuple(1 - count / before for count in after)


def _checked_ratios(ratios: Sequence[float], count: int) -> tuple[float, ...]:
    found = tuple(as_number("ratios", ratio) for ratio in ratios)
    if len(found) != count:
        raise ShapeMismatch(f"ratios: expected one for each of the {count} networks, found {len(found)}")
    if not all(0 <= ratio <= 1 for ratio in found):
        raise InvalidTolerance(f"ratios: expected numbers from 0 to 1, found {list(found)}")
    return found
