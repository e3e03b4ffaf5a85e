"""One group of a layer as data: what programs, scores and samples are made from, on this machine or on another."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from convexprune.options import Options
from convexprune.runs.fits import LayerFit
from convexprune.runs.layer import Fold
from convexprune.solvers.arrays import checked_positive, norm, stratified, working_dtype
from convexprune.solvers.certificate import Status
from convexprune.solvers.certificate.solution import TracePoint
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.methods import PathPoint
from convexprune.solvers.programs import L1, Fit, Gram, LayerProgram, Penalty, Restricted

TraceCallback = Callable[[TracePoint], bool | None]


@dataclass(eq=False)
class StoppingRule:
    """Who sees trace points, and says between iterations whether to end; and the time that is left.

    Attributes:
        seconds: From when this was made; None: no limit.
        interrupted: Called; a true answer ends the work (Ctrl-C).
        callback: Called with each trace point; a true answer ends the work.
        ended: STOPPED or TIME_LIMIT, once there was a reason; it stays.

    Raises:
        InvalidTolerance: Seconds that are no number > 0.
        InvalidInput: Something to ask that is no function.
    """

    seconds: float | None = None
    interrupted: Callable[[], bool] | None = None
    callback: TraceCallback | None = None
    ended: Status | None = field(default=None, init=False)
    began: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        if self.seconds is not None:
            self.seconds = checked_positive("time_limit", self.seconds)
        if self.interrupted is not None and not callable(self.interrupted):
            raise InvalidInput(f"stop: expected a function without arguments, found {self.interrupted!r}")

    def stopped(self) -> bool:
        """Whether the caller wants an end, or there is one already; time limits do not count."""
        if self.ended is None and self.interrupted is not None and self.interrupted():
            self.ended = Status.STOPPED
        return self.ended is not None

    def __call__(self) -> bool:
        """Whether to end."""
        if not self.stopped() and self.seconds is not None and time.monotonic() - self.began >= self.seconds:
            self.ended = Status.TIME_LIMIT
        return self.ended is not None

    def reason(self) -> str | None:
        """Why a run is to end, as half a sentence; None if it is not."""
        if not self():
            return None
        if self.ended is Status.TIME_LIMIT:
            return f"the time limit of {self.seconds:g} s ran out"
        return "it was interrupted"

    def left(self) -> float | None:
        """Seconds until the limit, at least a little; None without one."""
        return None if self.seconds is None else max(1e-3, self.seconds - (time.monotonic() - self.began))

    def show(self, point: PathPoint) -> bool:
        """Show the last trace point of a point on a path; whether to end."""
        trace = point.solution.trace
        if self.callback is not None and trace and self.callback(trace[-1]):
            self.ended = self.ended or Status.STOPPED
        return self()


@dataclass(frozen=True, eq=False)
class Problem:
    """A group's inputs, targets and trained weights, in the program's units.

    Attributes:
        name: Of the layer.
        X: Inputs [P, N]; with targets known through their products alone a ``Gram`` of both; None without data.
        Y: Targets [P, M]; None with a ``Gram``, or without data.
        stored: Trained weights [N, M] as the module stores them, in its dtype.
        fold: From stored weights to the program's.
        biased: Whether the last row is a bias.
        fit: How errors are measured.
        samples: P.
        part: Where the group's weights begin and end among those of the layer, from 0 to 1.
        original: Whether inputs are the original network's although the mode is cascade: others reach the layer now.
        positions: Rows of X that one sample has, one after another; 1 where samples differ in this.
        kernel: Weights that a neuron has for one channel, one after another.
        activation: What follows the layer, by name.
    """

    name: str
    X: Tensor | Gram | None
    Y: Tensor | None
    stored: Tensor
    fold: Fold
    biased: bool
    fit: LayerFit
    samples: int
    part: tuple[float, float] = (0.0, 1.0)
    original: bool = False
    positions: int = 1
    kernel: int = 1
    activation: str | None = None

    @property
    def W(self) -> Tensor:
        """The trained weights [N, M] of the program."""
        return self.fold.apply(self.stored.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """What weights are computed in."""
        return working_dtype(self.stored.dtype)

    @property
    def rows(self) -> int:
        """N without the bias."""
        return len(self.stored) - self.biased

    @property
    def nbytes(self) -> int:
        """Of the data."""
        return sum(tensor.nbytes for tensor in (self.X, self.Y) if isinstance(tensor, Tensor))

    @property
    def size(self) -> float:
        """‖Y‖_F; NaN without data."""
        if self.X is None:
            return math.nan
        return self.X.size if isinstance(self.X, Gram) else float(norm(self.targets))

    @property
    def inputs(self) -> Tensor:
        """[P, N], or a root of XᵀX.

        Raises:
            InvalidInput: There are no data.
        """
        if self.X is None:
            raise InvalidInput(f"layer {self.name!r}: nothing is known of its inputs: give calibration data")
        return self.X.inputs if isinstance(self.X, Gram) else self.X

    @property
    def targets(self) -> Tensor:
        """[P, M], or what belongs to that root."""
        if isinstance(self.X, Gram):
            return self.X.targets
        assert self.Y is not None  # noqa: S101 - only a Gram, or no data, goes without
        return self.Y

    @property
    def given(self) -> Tensor | Gram:
        """What fits are made of: targets, or the Gram."""
        return self.X if isinstance(self.X, Gram) else self.targets

    def portion(self, count: int) -> int:
        """The group's part of a count for the layer; those of all groups add up to it."""
        before, after = (math.floor(count * end + 1e-9) for end in self.part)
        return max(1, after - before)

    def sample(self, most: int, seed: int) -> "Problem":
        """At most ``most`` of the rows, chosen at random from all parts of the data; a ``Gram`` as it is."""
        if self.Y is None or not isinstance(self.X, Tensor) or len(self.X) <= most:
            return self
        rows = stratified(len(self.X), most, seed)
        return replace(self, X=self.X[rows], Y=self.Y[rows], samples=most)

    def error(self, U: Tensor) -> float:
        """‖σ(XU) − Y‖_F, σ the activation behind which the fit measures; NaN without data."""
        if self.X is None:
            return math.nan
        Y = self.targets
        return float(norm(self.fit.targets(self.inputs.to(Y.dtype) @ U.to(Y.dtype)).sub_(Y)))

    def program(self, fit: Fit, penalty: Penalty) -> LayerProgram:
        """Any program on these data."""
        assert self.X is not None  # noqa: S101 - fits are made of data
        return LayerProgram(self.X, fit, penalty)

    def loss(self) -> Fit:
        """What a budget minimises."""
        return self.fit.loss(self.given)

    def penalty(self, options: Options) -> Penalty:
        """That of the options; by default ℓ1 with a free bias, and where zeros are kept on the others."""
        if callable(options.penalty):
            return self.restricted(options.penalty(*self.stored.shape, self.biased), options)
        if options.penalty != "l1":
            raise InvalidInput(f"penalty: expected 'l1' or a function (N, M, biased), found {options.penalty!r}")
        free = self.biased and not options.penalise_bias
        return self.restricted(L1.free_bias(len(self.stored)) if free else L1(), options)

    def restricted(self, penalty: Penalty, options: Options) -> Penalty:
        """The penalty; where zeros are kept, on the other weights alone."""
        support = self.support(options)
        return penalty if support is None else Restricted(penalty, support)

    def support(self, options: Options) -> Tensor | None:
        """Boolean [N, M], the trained weights that are not zero, and the bias; None where zeros need not stay."""
        if not options.keep_zeros:
            return None
        support = self.stored != 0
        support[self.rows :] = True
        return support

    def within(self, eps: float, options: Options) -> tuple[Fit, float, float]:
        """The set with a radius of eps·‖Y‖_F, its radius, and what its members may miss Y by behind the activation."""
        return self.fit.program_fit(self.inputs, self.given, self.W, eps * self.size, options)


def reducible(rows: int, inputs: int) -> bool:
    """Whether products take less room than so many rows, and these are worth it."""
    return rows > max(1024, inputs)


class Accumulator:
    """Batches of (X, Y) of one group, kept as they are; of linear fits only their products once they exceed N rows.

    Args:
        linear: Whether ‖XU − Y‖ is all that the fit sees.
    """

    def __init__(self, linear: bool) -> None:
        self._linear = linear
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._gram: Gram | None = None
        self.samples = 0

    def add(self, X: Tensor, Y: Tensor) -> None:
        """Take one batch; one without rows says nothing."""
        if not len(X):
            return
        self.samples += len(X)
        self._parts.append((X, Y))
        if self._linear and reducible(sum(len(part) for part, _ in self._parts), X.shape[1]):
            self._reduce()

    def _reduce(self) -> None:
        gram = Gram.of(self._parts, torch.float64)
        self._gram = gram if self._gram is None else self._gram + gram
        self._parts = []

    def joined(self) -> tuple[Tensor | Gram, Tensor | None]:
        """Everything taken: (X, Y), or (Gram, None)."""
        if self._gram is not None:
            if self._parts:
                self._reduce()
            return self._gram, None
        X, Y = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*self._parts, strict=True))
        self._parts = []
        return X, Y
