"""Which pixels a network's decision rests on, and whether they are enough for another network.

Carter, Mueller, Jain and Gifford, What made you do this? Understanding black-box decisions with sufficient input
subsets, AISTATS 2019 (BackSelect); compared between networks as in Liebenwein, Baykal, Carter, Gifford and Rus, Lost in
pruning, MLSys 2021, section 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from convexprune.network.forwards import Forward, check_module, evaluating, run_model
from convexprune.report.tables import as_text, layer_table
from convexprune.runs.data import logits_of
from convexprune.runs.run import Progress, silent
from convexprune.solvers.arrays import as_number, check_finite, checked_count
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, NonFinite, ShapeMismatch

if TYPE_CHECKING:
    from rich.table import Table

_FORWARD = 512  # images at a time
_ROUNDS = 32


@dataclass(frozen=True)
class Features:
    """What the pixels that networks rest on are to each other.

    Attributes:
        names: Of the networks.
        keep: The part of the pixels that stay.
        confidence: Of each network (row) whose pixels were kept, what each network (column) then gives to the class,
            the mean over the images; pixels that go are 0.
        sufficient: Of each network the least part of the pixels, along its ranking, that keep its own confidence at the
            threshold or above, the mean over the images; 1 where none do.
        threshold: Of confidence.
        images: How many.
        forwards: How many images went through each network to rank the pixels.
        order: Of each network the pixels [images, pixels] in the order in which they were masked, the last that it
            could do without first; not in ``to_dict``.
    """

    names: tuple[str, ...]
    keep: float
    confidence: tuple[tuple[float, ...], ...]
    sufficient: tuple[float, ...]
    threshold: float
    images: int
    forwards: int
    order: tuple[Tensor, ...] = field(repr=False)

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {name: value for name, value in vars(self).items() if name != "order"}

    def table(self, width: int = 140) -> "Table":
        """A rich table, a row for each network whose pixels were kept."""
        rows = [
            [name, *(f"{value:.3f}" for value in values), f"{part:.1%}"]
            for name, values, part in zip(self.names, self.confidence, self.sufficient, strict=True)
        ]
        caption = [
            f"confidence in the class, from the {self.keep:.0%} of the pixels that count most for the row's network",
            f"sufficient: the part of the pixels that gives itself a confidence of {self.threshold:g}",
            f"{self.images} images, {self.forwards:,} forwards a network to rank their pixels",
        ]
        return layer_table([], ("pixels of", *self.names, "sufficient"), rows, caption, width)

    def __str__(self) -> str:
        return as_text(self.table)


def forwards_of(pixels: int, rounds: int) -> int:
    """How many images go through a network to rank the pixels of one: Σ over rounds of the pixels that are there."""
    return sum(_left(pixels, rounds))


def informative_features(
    models: Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor | None = None,
    *,
    keep: float = 0.1,
    threshold: float = 0.9,
    rounds: int | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> Features:
    """Rank the pixels of a few images by each network, and ask each what it makes of the others' most important ones.

    Pixels are masked, by 0 in all channels (the mean colour of normalised images), greedily: in each round those go
    without which the confidence in the class is the largest, so that the last ones are those that it rests on.
    In ``rounds`` rounds about pixels·rounds/2 images go through each network for each image: 16,900 for 32 × 32 pixels
    and 32 rounds. As published one pixel goes a round, ``rounds=pixels``: 524,800.

    Args:
        models: The networks by name, such as a parent, what was pruned from it, and one trained separately.
        images: [n, channels, height, width], as the networks take them; a handful.
        labels: The classes [n] whose confidence counts; None: what each network predicts on the whole image.
        keep: The part of the pixels, above 0 to 1, that the other networks are given.
        threshold: Of confidence, at which pixels suffice.
        rounds: In how many all pixels are masked; None: 32, or as many as there are pixels, if these are fewer.
        forward: Called as ``forward(model, batch)`` in place of ``model(batch)``.
        progress: Called as ``progress(name, done, total)``, with images.

    Raises:
        InvalidInput: There is no network, or no image; labels are no classes. ShapeMismatch: Images or labels have
            another shape. NonFinite: NaN or infinity in images or outputs. InvalidTolerance: A number out of its range.
    """
    if not models:
        raise InvalidInput("models: expected at least one network by name, found none")
    for name, value in (("keep", keep), ("threshold", threshold)):
        if not 0 < as_number(name, value) <= 1:
            raise InvalidTolerance(f"{name}: expected a number above 0 and at most 1, found {value}")
    pixels, show = _checked_pixels(images, labels), progress or silent
    rounds = min(_ROUNDS, pixels) if rounds is None else checked_count("rounds", rounds)
    if rounds > pixels:
        raise InvalidTolerance(f"rounds: expected at most the {pixels:,} pixels of an image, found {rounds:,}")
    orders, parts, classes = list[Tensor](), list[float](), dict[str, Tensor]()
    for name, model in models.items():
        judge = _Judge(check_module(model), forward, name)
        classes[name] = judge.classes(images, labels)
        ranked = list[tuple[Tensor, float]]()
        for number, (image, label) in enumerate(zip(images, classes[name].tolist(), strict=True)):
            show(name, number, len(images))
            ranked.append(_ranked(judge, image, label, rounds, threshold))
        show(name, len(images), len(images))
        orders.append(torch.stack([order for order, _ in ranked]))
        parts.append(sum(part for _, part in ranked) / len(ranked))
    kept = max(1, round(keep * pixels))
    confidence = []
    for name, order in zip(models, orders, strict=True):
        mask = torch.zeros(len(images), pixels).scatter_(1, order[:, -kept:], 1.0)
        seen = images * mask.view(len(images), 1, *images.shape[2:]).to(images)
        judged = [_Judge(model, forward, other).probabilities(seen) for other, model in models.items()]
        each = [p[torch.arange(len(images)), classes[name]] for p in judged]
        confidence.append(tuple(float(values.mean()) for values in each))
    cost = len(images) * forwards_of(pixels, rounds)
    return Features((*models,), keep, (*confidence,), (*parts,), threshold, len(images), cost, (*orders,))


@dataclass(frozen=True, eq=False)
class _Judge:
    """A network, and what it makes of images."""

    model: nn.Module
    forward: Forward | None
    name: str

    def probabilities(self, images: Tensor) -> Tensor:
        """Softmax outputs [n, classes] in float64, on the CPU."""
        with evaluating(self.model):
            parts = [logits_of(run_model(self.model, batch, self.forward)) for batch in torch.split(images, _FORWARD)]
        logits = torch.cat(parts).double().cpu()
        if logits.dim() != 2 or len(logits) != len(images):
            raise ShapeMismatch(f"{self.name}: expected outputs [{len(images)}, classes], found {list(logits.shape)}")
        if not bool(logits.isfinite().all()):
            raise NonFinite(f"{self.name}: its outputs hold NaN or infinity")
        return logits.softmax(1)

    def classes(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Those whose confidence counts [n]: as given, or as predicted."""
        found = self.probabilities(images)
        if labels is None:
            return found.argmax(1)
        if not (0 <= int(labels.min()) and int(labels.max()) < found.shape[1]):
            span = f"{int(labels.min())} to {int(labels.max())}"
            raise InvalidInput(f"labels: expected classes from 0 to {found.shape[1] - 1}, found {span}")
        return labels.cpu()


def _checked_pixels(images: Tensor, labels: Tensor | None) -> int:
    """How many pixels an image has."""
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point() or not len(images):
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ShapeMismatch(f"images: expected numbers [n, channels, height, width], normalised; found {found}")
    check_finite("images", images)
    if labels is not None and (labels.is_floating_point() or labels.shape != images.shape[:1]):
        found = f"{labels.dtype} {list(labels.shape)}"
        raise ShapeMismatch(f"labels: expected whole numbers [{len(images)}], found {found}")
    return images.shape[2] * images.shape[3]


def _left(pixels: int, rounds: int) -> Sequence[int]:
    """How many pixels are there at the beginning of each round; as many go in each, but for one."""
    return [pixels - pixels * number // rounds for number in range(rounds)]


def _ranked(judge: _Judge, image: Tensor, label: int, rounds: int, threshold: float) -> tuple[Tensor, float]:
    """The pixels in the order in which they are masked, and the part of them that suffices."""
    pixels, order, enough = image.flatten(1).shape[1], list[Tensor](), 1.0
    there, counts = torch.arange(pixels), [*_left(pixels, rounds), 0]

    def confidence(kept: Tensor) -> Tensor:
        """In the class, of the image with some pixels alone [images, pixels]."""
        masks = kept.view(len(kept), 1, *image.shape[1:]).to(image)
        return judge.probabilities(image * masks)[:, label]

    for now, then in pairwise(counts):
        kept = torch.zeros(pixels).index_fill_(0, there, 1.0)
        without = (kept.expand(len(part), -1).scatter(1, part[:, None], 0.0) for part in torch.split(there, _FORWARD))
        ranking = torch.cat([confidence(part) for part in without]).argsort(descending=True, stable=True)
        order.append(there[ranking[: now - then]])
        there = there[ranking[now - then :]].sort().values
        kept = torch.zeros(1, pixels).index_fill_(1, there, 1.0)
        if float(confidence(kept)[0]) >= threshold:
            enough = len(there) / pixels
    return torch.cat(order), enough
