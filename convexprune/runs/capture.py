"""What layers receive from the calibration data, as problems: in cascade beside what they received when trained."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from convexprune.layers.memory import samples_of
from convexprune.network.calibration import Calibration
from convexprune.network.forwards import Forward, evaluating
from convexprune.network.padding import Masks
from convexprune.network.passes import received
from convexprune.network.taps import Received
from convexprune.runs.layer import Layer, Versions
from convexprune.runs.plan import Plan
from convexprune.runs.problem import Accumulator, Problem
from convexprune.solvers.arrays import working_dtype

_Matrices = tuple[Tensor, ...]  # X of each group
_Pair = tuple[_Matrices, _Matrices]


@dataclass(frozen=True, eq=False)
class Capture:
    """How problems are made of a model and data; attributes as those of ``Run``."""

    model: nn.Module
    data: Calibration | None
    forward: Forward | None
    plan: Plan
    trained: Mapping[str, tuple[Tensor, ...]]
    versions: Versions
    samples_needed: bool

    def problems(self, names: Sequence[str], *, cascade: bool) -> dict[str, tuple[Problem, ...]]:
        """The data of each layer's groups, from one pass; with ``cascade`` inputs are those of the network now.

        An expert behind a router may receive other rows then, and has the trained network's inputs in their place.
        """
        gathered: dict[str, tuple[list[Accumulator], int]] = {}
        original = False
        if self.data is not None:
            try:
                gathered = self._gathered(names, cascade=cascade)
            except _OtherRows:
                gathered, original = self._gathered(names, cascade=False), True
        return {name: self._joined(name, *gathered.pop(name, ([], 1)), original) for name in names}

    def _joined(
        self, name: str, gathered: Sequence[Accumulator], positions: int, original: bool
    ) -> tuple[Problem, ...]:
        layer, trained = self.plan.layers[name], self.trained[name]
        ends = list(accumulate((W.numel() for W in trained), initial=0))
        parts = [(start / ends[-1], end / ends[-1]) for start, end in pairwise(ends)]
        accumulated: Sequence[Accumulator | None] = gathered or [None] * len(trained)
        problems, own = [], (layer.biased, layer.fit)
        for rows, stored, fold, part in zip(accumulated, trained, layer.folds, parts, strict=True):
            X, Y = (None, None) if rows is None else rows.joined()
            samples, after = 0 if rows is None else rows.samples, (layer.kernel, layer.activation)
            problems.append(Problem(name, X, Y, stored, fold, *own, samples, part, original, positions, *after))
        return tuple(problems)

    def _gathered(self, names: Sequence[str], *, cascade: bool) -> dict[str, tuple[list[Accumulator], int]]:
        """(X, Y) of each group: in cascade inputs are those of the network now, else the trained one's; positions."""
        layers = {name: self.plan.layers[name] for name in names}
        weights, gathered, rows_of_a_sample = {}, {}, {}
        for name, layer in layers.items():
            trained = self.trained[name]
            weights[name] = [
                fold.apply(W.to(working_dtype(W.dtype))) for W, fold in zip(trained, layer.folds, strict=True)
            ]
            gathered[name] = [Accumulator(layer.fit.linear and not self.samples_needed) for _ in trained]
            rows_of_a_sample[name] = set[float]()
        with evaluating(self.model), nullcontext() if cascade else self.versions.as_trained():
            for batch in self.data or ():
                for name, pairs in self._pairs(layers, batch, cascade=cascade).items():
                    rows = 0
                    for now, before in pairs:
                        for so_far, X, X0, W in zip(gathered[name], now, before, weights[name], strict=True):
                            so_far.add(X, layers[name].fit.targets(X0.to(W) @ W))
                        rows += len(now[0])
                    rows_of_a_sample[name].add(rows / samples_of(batch))
        return {
            name: (gathered[name], self._positions(layer, rows_of_a_sample[name])) for name, layer in layers.items()
        }

    def _positions(self, layer: Layer, rows_of_a_sample: set[float]) -> int:
        """Rows that each sample has, of a convolution; 1 where samples differ in this."""
        alike = len(rows_of_a_sample) == 1 and not any(self.plan.counted.layers.get(layer.name, ()))
        each = rows_of_a_sample.pop() if alike and hasattr(layer.module, "kernel_size") else 1
        return int(each) if each == int(each) else 1

    def _pairs(self, layers: Mapping[str, Layer], batch: object, *, cascade: bool) -> dict[str, list[_Pair]]:
        """For each call the inputs now, and those of the trained network: the same unless in cascade."""
        now = before = self._received(layers, batch)
        if cascade:
            with self.versions.as_trained():
                before = self._received(layers, batch)
            if _shapes(now) != _shapes(before):
                raise _OtherRows
        return {name: list(zip(calls, before[name], strict=True)) for name, calls in now.items()}

    def _received(self, layers: Mapping[str, Layer], batch: object) -> dict[str, list[_Matrices]]:
        """X of each group of layers, of rows that count alone, call after call."""
        taps = {name: layer.taps for name, layer in layers.items()}
        calls = {name: layer.calls for name, layer in layers.items()}
        found, masks = received(self.model, batch, taps, calls, self.forward), self.masks(batch)
        return {name: [self.matrices(layers[name], raw, masks) for raw in each] for name, each in found.items()}

    def masks(self, batch: object) -> Masks:
        """Which positions of a batch count."""
        return () if self.data is None else self.data.masks_of(batch)

    def matrices(self, layer: Layer, raw: Received, masks: Masks) -> tuple[Tensor, ...]:
        """X of each group, of rows that count alone."""
        return layer.inputs(self.plan.counted.inputs(layer.name, layer.module, raw, masks))


def _shapes(received: Mapping[str, list[_Matrices]]) -> list[list[torch.Size]]:
    return [[X.shape for X in matrices] for calls in received.values() for matrices in calls]


class _OtherRows(Exception):
    """A layer receives other rows in the pruned network than in the trained one, such as an expert behind a router."""
