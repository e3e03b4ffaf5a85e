"""What a plan says of its layers, put to the test on the model itself before anything is solved.

A layer's program takes three things for granted: that the layer's outputs are its inputs times its weights, and nothing
else reads these weights; that a BatchNorm which is part of the program scales and shifts each of the outputs by itself,
and nothing else reads them; and that where errors count behind a ReLU, nothing but this ReLU reads what is before it.
Each is tested by numbers, on a few samples of the calibration data, for all layers at once: the first by the product
itself, all of them by interventions under which the model's outputs must not change (``network.taps.Trial``).
Weights are scaled, output by output, and the outputs scaled back where the plan says that they are; shifts are changed,
and what the norm gives put back; what a ReLU makes 0 is replaced.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from convexprune.layers import input_matrices, output_matrices, weight_matrices, write_back_
from convexprune.layers.memory import Batch, samples_of
from convexprune.layers.support import supported
from convexprune.network.forwards import Forward, evaluating
from convexprune.network.taps import (
    Tap,
    Taps,
    Trial,
    at,
    attention_of,
    generator,
    hooked,
    replaced,
    rounding,
    without_hooks,
)
from convexprune.runs.fits import FITS
from convexprune.runs.layer import Layer, Versions
from convexprune.solvers.arrays import norm, working_dtype
from convexprune.solvers.errors import ShapeMismatch

_Affine = tuple[Tensor, Tensor, int]
"""What a norm multiplies by, what it gives at 0, and the axis along which these lie."""


@dataclass(eq=False)
class CheckedPlan:
    """The plan as far as it holds.

    Attributes:
        layers: Layers with what was found to follow them; what was planned otherwise is in their notes.
        without_norm: What is planned for a layer if the norm is no part of its program.
        given: Whether a layer's fit is the caller's own choice, which is kept.
        left: Layers that cannot be pruned, by name, with the reason.
        mixing: How samples of a batch see each other; None if they do not.
        forwards: How many were run.
        samples: Of how many samples each at most.
    """

    layers: dict[str, Layer]
    without_norm: Callable[[Layer], Layer]
    given: Callable[[str], bool]
    left: dict[str, str] = field(default_factory=dict)
    mixing: str | None = None
    forwards: int = 0
    samples: int = 0
    _wrong: dict[str, str] = field(default_factory=dict)  # what was measured in a forward
    _axes: dict[str, int] = field(default_factory=dict)  # along which norms are taken to run

    def test(self, model: nn.Module, batch: Batch, names: Sequence[str], forward: Forward | None) -> None:
        """Put these layers to the test on a batch; the model is left as found, ``forward`` is as for ``prune_``."""
        names = [name for name in names if name in self.layers]
        if not names:
            return
        self._wrong.clear()
        with evaluating(model):
            trial = Trial(model, batch, forward, self._products(names))
            self.left |= self._wrong
            self._test(trial, [name for name in names if name not in self.left])
            self.mixing = self.mixing or trial.mixes_samples()
        self.layers = {name: layer for name, layer in self.layers.items() if name not in self.left}
        self.forwards, self.samples = self.forwards + trial.forwards, max(self.samples, samples_of(batch))

    def _test(self, trial: Trial, names: Sequence[str]) -> None:
        """All tests but that of products, which the trial's first forward was."""
        for name in names:
            layer = self.layers[name]
            outputs = sum(W.shape[1] for W in weight_matrices(layer.module))
            if layer.norm is not None and outputs != (channels := layer.norm.get_parameter("bias").numel()):
                self._take_norm_out(name, f"it normalises {channels} channels, and the layer has {outputs} outputs")
        self._axes = dict.fromkeys(names, 1)
        fixed = trial.settle(names, partial(self._rewritten, trivial=True))
        for name in fixed:
            self._take_norm_out(name, _UNTESTED)
            self._count_before_relu(name, _UNTESTED)
        open_to_tests = [name for name in names if name not in fixed]
        self._test_weights(trial, open_to_tests)
        self._test_relus(trial, [name for name in open_to_tests if name not in self.left])

    def _products(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """Inside, each call of a layer is compared with its inputs times its weights."""

        def see(name: str, tap: Tap, _module: nn.Module, args: Batch, kwargs: Batch, returned: Batch) -> None:
            moved = _off_product(self.layers[name], tap, args, kwargs, returned)
            if moved is not None:
                self._wrong.setdefault(name, f"its outputs are not its inputs times its weights{moved}: {_OTHER}")

        return hooked(at({name: self.layers[name].taps for name in names}, see))

    def _test_weights(self, trial: Trial, names: Sequence[str]) -> None:
        """Nothing but the layers' outputs shows their weights, and norms run output by output."""
        waiting = list(names)
        while waiting:
            self._wrong.clear()
            shown = trial.revealing(waiting, partial(self._rewritten, trivial=False))
            failing = [name for name in waiting if name in shown or name in self._wrong]
            for name in failing:
                if self.layers[name].norm is None:
                    self.left[name] = _READ
                elif self._axes[name] == 1:
                    self._axes[name] = -1  # a norm that moves this axis itself
                else:
                    self._take_norm_out(name, self._wrong.get(name, _READ_BESIDE))
            waiting = [name for name in failing if name not in self.left]

    def _test_relus(self, trial: Trial, names: Sequence[str]) -> None:
        """Where errors count behind a ReLU, nothing else is read."""
        layers = {name: self.layers[name] for name in names if self.layers[name].fit.relu}
        places = {name: (Tap(layer.norm),) if layer.norm else layer.taps for name, layer in layers.items()}
        unseen = [name for name, taps in places.items() if not all(tap.returns_outputs for tap in taps)]
        for name in unseen:
            self._count_before_relu(name, _UNSEEN)
        for name in _read_beyond_relu(trial, {name: taps for name, taps in places.items() if name not in unseen}):
            self._count_before_relu(name, _NOT_ALONE)

    def _take_norm_out(self, name: str, why: str) -> None:
        layer = self.layers[name]
        if layer.norm is not None:
            self._note(self.without_norm(layer), f"{layer.norm_name} is no part of its program: {why}")

    def _count_before_relu(self, name: str, why: str) -> None:
        layer = self.layers[name]
        if layer.fit.relu and self.given(name):
            self._note(layer, f"the fit {layer.fit.name!r} was chosen, which counts errors behind a ReLU: {why}")
        elif layer.fit.relu:
            self._note(replace(layer, fit=FITS["ball"]), f"errors count on its own outputs, before any ReLU: {why}")

    def _note(self, layer: Layer, note: str) -> None:
        self.layers[layer.name] = replace(layer, notes=(*layer.notes, note))

    @contextmanager
    def _rewritten(self, names: Sequence[str], trivial: bool) -> Iterator[None]:
        """Inside, outputs are scaled by the weights and scaled back later; norms' shifts are others and put back.

        Factors are powers of two or their negatives, so that what is scaled back is the same bit by bit.
        """
        layers = {name: self.layers[name] for name in names}
        versions, plain = Versions(layers), dict[str, Tensor]()
        before: list[Batch] = []
        after: list[Batch] = []
        try:
            for name, layer in layers.items():
                if layer.norm is None and not all(tap.returns_outputs for tap in layer.taps):
                    continue
                draws = generator(name)
                factors = _scale_outputs_(layer, draws, trivial)
                if layer.norm is None:
                    plain[name] = factors
                    continue
                shift, axis = _shift_norm_(layer.norm, draws, trivial), self._axes[name]
                mean, bias = layer.norm.get_buffer("running_mean").double(), layer.norm.get_parameter("bias")
                now = (layer.norm_scale, bias.detach().double() - mean * layer.norm_scale, axis)
                before.append((layer.norm, partial(_to_norm, factors, axis)))
                after.append((layer.norm, partial(self._from_norm, name, shift, now)))
            taps = {name: layers[name].taps for name in plain}

            def scaled_back(name: str, outputs: Tensor) -> Tensor:
                return _divided(outputs, plain[name], supported(layers[name].module).axis)

            with hooked(after, before), replaced(taps, scaled_back):
                yield
        finally:
            versions.restore_()

    def _from_norm(
        self, name: str, shift: Tensor, fold: _Affine, norm: nn.Module, args: Batch, kwargs: Batch, given: Tensor
    ) -> Tensor:
        if (off := _off_fold(*fold, args[0], given)) is not None:
            self._wrong.setdefault(name, f"{_OTHER_NORM}{off}")
        again: Tensor = without_hooks(norm, {"bias": shift}, args, kwargs)
        return again


_OTHER = "the module computes something else"
_READ = (
    "the model's outputs show its weights in another way than through the layer's own outputs, so that something else "
    "reads them, or keeps a copy: weights can be pruned for one use only"
)
_READ_BESIDE = "something beside the norm reads the layer's outputs, its weights or the norm's shift"
_OTHER_NORM = "on the data it does not scale and shift each of the layer's outputs by itself, by its running statistics"
_NOT_ALONE = (
    "the model's outputs change when what is ≤ 0 there is replaced by other such values, so more is read than its ReLU"
)
_UNSEEN = "its outputs are not among what the module returns, so that what reads them cannot be found out"
_UNTESTED = "the model's outputs change, or it fails, as soon as the layer's are looked at"


def _read_beyond_relu(trial: Trial, places: Taps) -> list[str]:
    """The layers of which more than the ReLU of what is seen at these places is read.

    Values ≤ 0 are replaced by others: zeros, random ones of the same size, and random ones of all sizes from a
    thousandth of that to a thousand times as much.
    """
    found: list[str] = []
    for kind in ("zeros", "of the size", "of all sizes"):

        def with_negatives(names: Sequence[str], kind: str = kind) -> AbstractContextManager[None]:
            generators = {name: generator(name) for name in names}

            def value(name: str, outputs: Tensor) -> Tensor:
                # In the same layout, for what follows to be added up in the same order.
                negatives = torch.empty_like(outputs).copy_(_negatives(kind, outputs.detach(), generators[name]))
                return torch.where(outputs > 0, outputs, negatives)

            return replaced({name: places[name] for name in names}, value)

        found += trial.revealing([name for name in places if name not in found], with_negatives)
    return [name for name in places if name in found]


def _negatives(kind: str, outputs: Tensor, draws: torch.Generator) -> Tensor:
    if kind == "zeros" or not outputs.numel():
        return torch.zeros(outputs.shape)
    size = float(outputs.double().square().mean().sqrt()) or 1.0
    if kind == "of the size":
        return -torch.randn(outputs.shape, generator=draws).abs() * size
    powers = 6 * torch.rand(outputs.shape, generator=draws, dtype=torch.float64) - 3
    return -(10**powers * size).clamp(max=torch.finfo(outputs.dtype).max / 4)


def _off_product(layer: Layer, tap: Tap, args: Batch, kwargs: Batch, returned: Batch) -> str | None:
    """How far the outputs of a call are from inputs times weights, in words; None if not beyond rounding."""
    raw = tap.received(args, kwargs, returned)
    X, U = input_matrices(layer.module, raw), weight_matrices(layer.module)
    dtype = working_dtype(U[0].dtype)
    products = [x.to(dtype) @ u.to(dtype) for x, u in zip(X, U, strict=True)]
    outputs = tap.outputs(returned)
    try:
        if outputs is not None:
            computed: Sequence[Tensor] = output_matrices(layer.module, outputs)
        else:
            shaped = [p.to(r).reshape(*r.shape[:-1], -1) for p, r in zip(products, raw, strict=True)]
            products, computed = [attention_of(tap.module, shaped, args, kwargs)], [returned[0]]  # type: ignore[arg-type]
    except ShapeMismatch as error:
        return f" ({error})"
    if [p.shape for p in products] != [c.shape for c in computed]:
        return f" (they are {[list(c.shape) for c in computed]}, not {[list(p.shape) for p in products]})"
    off = _length([c.to(dtype) - p for c, p in zip(computed, products, strict=True)])
    eps, size = _eps(*X, *U, *computed), _length(products)
    terms = _length([norm(x.to(dtype)) * norm(u.to(dtype)) for x, u in zip(X, U, strict=True)])
    allowed = 8 * eps * size + (eps + 64 * torch.finfo(dtype).eps) * terms
    return None if off <= allowed else f" (they differ by {off / (size or 1.0):.2g} of their size)"


def _off_fold(scale: Tensor, at_0: Tensor, axis: int, taken: Tensor, given: Tensor) -> str | None:
    """How far what a norm gave is from what the fold says, in words; None if not beyond rounding."""
    if taken.shape != given.shape or taken.shape[axis] != len(scale):
        return f" (it is given {list(taken.shape)}, with {len(scale)} outputs of the layer expected along axis {axis})"
    scaled, shift = taken.double() * _along(scale, taken, axis), _along(at_0, taken, axis).expand_as(taken)
    off, size = float(norm(given.double() - scaled - shift)), float(norm(scaled) + norm(shift))
    fits = off <= rounding(_eps(taken, given)) * size
    return None if fits else f" (it differs by {off / (size or 1.0):.2g} of its size)"


def _scale_outputs_(layer: Layer, draws: torch.Generator, trivial: bool) -> Tensor:
    """Scale the weights output by output; the factors: ±1/2 and ±1 at random, never the same for all."""
    trained = weight_matrices(layer.module)
    widths = [W.shape[1] for W in trained]
    factors = torch.ones(sum(widths))
    if not trivial:
        factors = torch.tensor([0.5, -0.5, 1.0, -1.0])[torch.randint(4, (sum(widths),), generator=draws)]
        factors[0], factors[-1] = 1.0, -0.5
    write_back_(layer.module, [W * t.to(W) for W, t in zip(trained, torch.split(factors, widths), strict=True)])
    return factors


def _shift_norm_(norm: nn.Module, draws: torch.Generator, trivial: bool) -> Tensor:
    """Change the norm's shift; what it was before."""
    shift = norm.get_parameter("bias")
    before = shift.detach().clone()
    if not trivial:
        size = 1 + float(before.double().square().mean().sqrt())
        with torch.no_grad():
            shift.copy_(before + ((0.5 + torch.rand(len(shift), generator=draws)) * size).to(before))
    return before


def _to_norm(factors: Tensor, axis: int, _module: nn.Module, args: Batch, kwargs: Batch) -> Batch:
    fits = args[0].shape[axis] == len(factors)
    return (_divided(args[0], factors, axis), *args[1:]) if fits else args, kwargs


def _divided(tensor: Tensor, factors: Tensor, axis: int) -> Tensor:
    return tensor / _along(factors, tensor, axis).to(tensor.dtype)


def _along(values: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """Values along one axis of a tensor, for broadcasting."""
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return values.to(tensor.device).reshape(shape)


def _length(tensors: Sequence[Tensor]) -> float:
    return float(norm(torch.stack([norm(tensor) for tensor in tensors])))


def _eps(*tensors: Tensor) -> float:
    """Of the coarsest dtype that was computed in; other hardware, or a setting of torch, may round products more."""
    finest = all(t.device.type == "cpu" for t in tensors) and torch.get_float32_matmul_precision() == "highest"
    eps = max(torch.finfo(tensor.dtype).eps for tensor in tensors)
    return eps if finest or eps < torch.finfo(torch.float32).eps else max(eps, 2.0**-10)
