"""What our fits and penalties say of themselves, as numpy arrays for the conic form."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from convexprune.solvers.programs.claims import FITS, NORMS, is_plain
from convexprune.solvers.programs.fits.measures import HalfSquare, LayerBall
from convexprune.solvers.programs.penalties import L1, GroupL2
from convexprune.solvers.programs.program import LayerProgram

Array = npt.NDArray[Any]
_CVXPY = "the solver 'cvxpy' takes any that has a cvxpy formulation"


def refusal(program: LayerProgram) -> str | None:
    """Why the program has no conic form here, or None."""
    fit, penalty = program.fit, program.penalty
    if not penalty.convex:
        return f"{type(penalty).__name__} is not convex"
    if not is_plain(fit, FITS):
        return f"a conic form is known for the fits of this library, not for {type(fit).__name__}; {_CVXPY}"
    if not is_plain(penalty, NORMS):
        return f"a conic form is known for L1 and GroupL2, not for {type(penalty).__name__}; {_CVXPY}"
    return None


def separable(program: LayerProgram) -> bool:
    """Whether it is a program for each neuron: neither a ball nor a group spans several."""
    labels = _groups(program)[0]
    column = np.broadcast_to(np.arange(program.shape[1]), labels.shape)
    owner = np.zeros(labels.max() + 1, dtype=int)
    owner[labels] = column
    whole = isinstance(getattr(program.fit, "measure", None), LayerBall)
    return not whole and bool((owner[labels] == column).all())


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a fit says of the outputs of some neurons.

    Attributes:
        X: [P, N], and as a sparse matrix ``inputs``.
        anchor: a [P, M].
        free: [P, M], whether an output counts on both sides of its anchor.
        room: [P, M], whether the measure sees an output and leaves it room: if not, it is bound to the anchor.
        radii: Of the balls that hold outputs with room.
        ball: [M], which ball a neuron's outputs are in.
        weight: Of a loss; 0 for sets.
    """

    X: Array
    inputs: Any
    anchor: Array
    free: Array
    room: Array
    radii: Array
    ball: Array
    weight: float

    @classmethod
    def of(cls, program: LayerProgram) -> "Outputs":
        """All outputs of a program that is not refused."""
        from scipy import sparse

        fit: Any = program.fit
        X, M, measure = _array(program.inputs), program.shape[1], fit.measure
        anchor, free = (_array(a.expand(fit.shape)) for a in (fit.anchor, fit.unrestricted()))
        seen = np.ones(fit.shape) if fit.seen() is None else _array(fit.seen().expand(fit.shape))
        radii, ball, weight = np.full(M, np.inf), np.arange(M), 0.0
        if isinstance(measure, HalfSquare):
            weight = measure.weight
        elif isinstance(measure, LayerBall):
            radii, ball = np.array([measure.eps]), np.zeros(M, dtype=int)
        else:
            radii = _array(measure.eps)
        return cls(X, sparse.csr_array(X), anchor, free, (seen > 0) & (radii[ball] > 0), radii, ball, weight)

    def of_neurons(self, columns: slice) -> "Outputs":
        """Those of some neurons, with the balls that they need."""
        anchor, free, room = (array[:, columns] for array in (self.anchor, self.free, self.room))
        ball = self.ball[columns]
        used = np.unique(ball[room.any(0)]) if not self.weight else np.zeros(0, dtype=int)
        return replace(
            self, anchor=anchor, free=free, room=room, radii=self.radii[used], ball=np.searchsorted(used, ball)
        )

    @property
    def unit(self) -> float:
        """Of the slacks: that in which a loss is half their square."""
        return self.weight**-0.5 if self.weight else 1.0

    @property
    def equal(self) -> Array:
        """[P, M]: outputs that must be at their anchor, but for a slack."""
        return self.free & ~self.two_sided

    @property
    def below(self) -> Array:
        """[P, M]: one-sided outputs."""
        return ~self.free

    @property
    def slack(self) -> Array:
        """[P, M]: outputs with a slack of their own: all that a loss sees, and one-sided ones with room in a ball."""
        return self.room & ~self.two_sided

    @property
    def two_sided(self) -> Array:
        """[P, M]: outputs on both sides of their anchor in a ball."""
        return self.free & self.room & (self.weight == 0)

    def rows(self, mask: Array) -> Any:
        """x_p over u, the weights neuron after neuron, for each output of the mask, neuron after neuron."""
        from scipy import sparse

        neuron, sample = np.nonzero(mask.T)
        rows = self.inputs[sample]
        N, M = self.X.shape[1], mask.shape[1]
        columns = rows.indices + np.repeat(neuron * N, np.diff(rows.indptr))
        return sparse.csr_array((rows.data, columns, rows.indptr), shape=(len(sample), N * M))

    def slacks(self, mask: Array) -> Any:
        """For each output of the mask, neuron after neuron, a row with its slack's unit, if it has a slack."""
        from scipy import sparse

        slack, on = self.slack.T.reshape(-1), mask.T.reshape(-1)
        held = slack[on]
        column = (np.cumsum(slack) - 1)[on][held]
        parts = (np.full(len(column), self.unit), column, np.append(0, np.cumsum(held)))
        return sparse.csr_array(parts, shape=(len(held), int(slack.sum())))


@dataclass(frozen=True, eq=False)
class Prices:
    """What a penalty Σ_g w_g ‖ℓ∘u_g‖ says of u, the weights of some neurons, neuron after neuron.

    Attributes:
        at: Which entries of u are priced.
        group: The group of each of those, from 0.
        lengths: ℓ of each of those.
        weights: w of each group.
        single: Whether a group is one entry, whose length is |ℓu|.
    """

    at: Array
    group: Array
    lengths: Array
    weights: Array
    single: Array

    @classmethod
    def of(cls, program: LayerProgram, columns: slice) -> "Prices":
        """Those of a program that is not refused; a price is shared evenly between w and ℓ, whoever named it."""
        labels, lengths, weights = _groups(program)
        flat, prices = (array[:, columns].T.reshape(-1) for array in (labels, lengths * weights[labels]))
        at = np.flatnonzero(prices > 0)
        _, group, count = np.unique(flat[at], return_inverse=True, return_counts=True)
        # Prices that differ by 1e12 leave half of the digits to either, where solvers measure their residuals.
        shares = np.exp(np.bincount(group, np.log(prices[at]), len(count)) / (2 * count))
        return cls(at, group, prices[at] / shares[group], shares, count == 1)

    def bounds(self, u: Array) -> Array:
        """‖ℓ∘u_g‖ of each group."""
        return np.sqrt(np.bincount(self.group, (self.lengths * u[self.at]) ** 2, len(self.weights)))


def _groups(program: LayerProgram) -> tuple[Array, Array, Array]:
    """(labels [N, M], lengths [N, M], a weight for each label); in the ℓ1 norm each entry is a group."""
    (N, M), penalty = program.shape, program.penalty
    if isinstance(penalty, L1):
        return np.arange(N * M).reshape(N, M), np.ones((N, M)), _array(penalty.cost((N, M))).reshape(-1)
    assert isinstance(penalty, GroupL2)  # noqa: S101 - ``refusal`` saw to it
    if isinstance(penalty.groups, Tensor):
        labels = _array(penalty.groups)
    else:
        labels = np.indices((N, M))[0 if penalty.groups == "rows" else 1]
    lengths = np.ones((N, M)) if penalty.lengths is None else np.broadcast_to(_array(penalty.lengths), (N, M))
    weights = _array(penalty.weights) if isinstance(penalty.weights, Tensor) else np.ones(labels.max() + 1)
    return labels, lengths, weights


def _array(tensor: Tensor) -> Array:
    array = tensor.detach().cpu().numpy()
    return array.astype(np.float64) if array.dtype.kind == "f" else array
