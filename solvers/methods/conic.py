"""Layer programs in standard conic form.

    minimise ½xᵀPx + qᵀx   subject to   Ax + s = b,   s in {0} × R₊ × second-order cones

x = (u, t, v): the weights, neuron after neuron; a bound t for each priced group (in the ℓ1 norm, each priced weight); a
slack v for each one-sided output with room, and for each output that a loss sees. Z is eliminated: the multipliers Λ of
Z = XU are those of the rows that hold X. With a the fit's anchor, g = XᵀΛ and penalty Σ w_g‖ℓ∘u_g‖, the parts of s and
y are

    equal    zero       a_pm − x_pᵀu_m   (an output without room)      Λ_pm
    up       R₊         t_i − ℓ_i u_i    (a group of one)              (w_i − g_i/ℓ_i)/2
    down     R₊         t_i + ℓ_i u_i                                  (w_i + g_i/ℓ_i)/2
    below    R₊         a_pm + v_pm − x_pᵀu_m   (v only with room)     Λ_pm ≥ 0
    groups   cone       (t_g; ℓ_i u_i)                                 (w_g; g_i/ℓ_i)
    balls    cone       (ε; x_pᵀu_m − a_pm; v_pm)                      (‖Λ‖; −Λ_pm; −Λ_pm)

A loss ½·weight·‖v‖² has no balls: its two-sided outputs are in "equal", a_pm + v_pm − x_pᵀu_m, so that neither XᵀX nor
differences of nearly equal numbers come in however large the weight is. Its v is in units of 1/√weight.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from convexprune.solvers.programs import L1, GroupL2, LayerProgram
from convexprune.solvers.programs.claims import FITS, NORMS, is_plain
from convexprune.solvers.programs.fits import LossFit

Array = npt.NDArray[Any]
_ENTRIES = 50_000  # of X, counted once a neuron, that separable programs are solved together up to
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
    whole = isinstance(getattr(program.fit, "radii", None), float)
    return not whole and bool((owner[labels] == column).all())


@dataclass(eq=False)
class Outputs:
    """What a fit says of the outputs of some neurons: arrays [P, M] unless said otherwise, most of them masks."""

    X: Array  # [P, N]
    inputs: Any  # X as a sparse matrix
    anchor: Array  # a
    free: Array  # whether an output counts on both sides of its anchor
    room: Array  # whether the measure sees an output and leaves it room: if not, it is bound to the anchor
    radii: Array  # of the balls that hold outputs with room
    ball: Array  # [M], which ball a neuron's outputs are in
    weight: float  # of a loss; 0 for sets

    def __post_init__(self) -> None:
        self.unit = self.weight**-0.5 if self.weight else 1.0  # of slacks: that in which a loss is half their square
        self.below = ~self.free  # one-sided outputs
        self.two_sided = self.free & self.room & (self.weight == 0)  # outputs on both sides of their anchor in a ball
        self.equal = self.free & ~self.two_sided  # those that must be at their anchor, but for a slack
        # Those with a slack of their own: all that a loss sees, and one-sided ones with room in a ball.
        self.slack = self.room & ~self.two_sided
        self.in_balls = (self.two_sided, self.slack & (self.weight == 0))  # outputs and slacks; none of a loss
        self.owner = np.concatenate([np.repeat(self.ball, mask.sum(0)) for mask in self.in_balls])  # the ball of each

    @classmethod
    def of(cls, program: LayerProgram) -> "Outputs":
        """All outputs of a program that is not refused."""
        from scipy import sparse

        fit: Any = program.fit
        X, M = _array(program.inputs), program.shape[1]
        anchor, free = (_array(a.expand(fit.shape)) for a in (fit.anchor, fit.unrestricted()))
        seen = np.ones(fit.shape) if fit.seen() is None else _array(fit.seen().expand(fit.shape))
        radii, ball, weight = np.full(M, np.inf), np.arange(M), 0.0
        if isinstance(fit, LossFit):
            weight = fit.weight
        elif isinstance(fit.radii, float):
            radii, ball = np.array([fit.radii]), np.zeros(M, dtype=int)
        else:
            radii = _array(fit.radii)
        return cls(X, sparse.csr_array(X), anchor, free, (seen > 0) & (radii[ball] > 0), radii, ball, weight)

    def of_neurons(self, columns: slice) -> "Outputs":
        """Those of some neurons, with the balls that they need."""
        anchor, free, room = (array[:, columns] for array in (self.anchor, self.free, self.room))
        ball = self.ball[columns]
        used = np.unique(ball[room.any(0)]) if not self.weight else np.zeros(0, dtype=int)
        radii, ball = self.radii[used], np.searchsorted(used, ball)
        return replace(self, anchor=anchor, free=free, room=room, radii=radii, ball=ball)

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


class Prices:
    """What a penalty Σ_g w_g ‖ℓ∘u_g‖ says of u, the weights of some neurons, neuron after neuron.

    A price is shared evenly between w and ℓ, whoever named it.
    """

    def __init__(self, program: LayerProgram, columns: slice) -> None:
        labels, lengths, weights = _groups(program)
        flat, prices = (array[:, columns].T.reshape(-1) for array in (labels, lengths * weights[labels]))
        self.at = np.flatnonzero(prices > 0)  # which entries of u are priced
        _, self.group, count = np.unique(flat[self.at], return_inverse=True, return_counts=True)  # from 0, of each
        # Prices that differ by 1e12 leave half of the digits to either, where solvers measure their residuals.
        self.weights = np.exp(np.bincount(self.group, np.log(prices[self.at]), len(count)) / (2 * count))  # of groups
        self.lengths = prices[self.at] / self.weights[self.group]  # ℓ of each priced entry
        self.single = count == 1  # whether a group is one entry, whose length is |ℓu|

    def bounds(self, u: Array) -> Array:
        """‖ℓ∘u_g‖ of each group."""
        return np.sqrt(np.bincount(self.group, (self.lengths * u[self.at]) ** 2, len(self.weights)))

    def many(self) -> tuple[Array, Array]:
        """Of priced entries in groups of several: which they are, and their group among those."""
        entries = np.flatnonzero(~self.single[self.group])
        return entries, (np.cumsum(~self.single) - 1)[self.group[entries]]


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


@dataclass(frozen=True, eq=False)
class ConicForm:
    """One conic program, with the way there and back: P, q, A and b, sparse matrices by columns, P whole.

    ``zero`` and ``nonneg`` say how many rows of these kinds come first, ``cones`` are the sizes of the second-order
    cones that the other rows are in; the head comes first in each.
    """

    P: Any
    q: Array
    A: Any
    b: Array
    zero: int
    nonneg: int
    cones: tuple[int, ...]
    outputs: Outputs
    prices: Prices
    ends: Array  # of the parts, made one after the other
    order: Array  # that the rows of all parts were then put into

    def weights(self, x: Array) -> Array:
        """U [N, M]."""
        N, M = self.outputs.X.shape[1], self.outputs.anchor.shape[1]
        U: Array = x[: N * M].reshape(M, N).T
        return U

    def multipliers(self, y: Array) -> Array:
        """Λ [P, M] of Z = XU."""
        o, rows = self.outputs, np.empty_like(y)
        rows[self.order] = y
        equal, _, _, below, _, _, _, two_sided, _ = np.split(rows, self.ends)
        L: Array = np.empty_like(o.anchor)
        L.T[o.equal.T], L.T[o.below.T], L.T[o.two_sided.T] = equal, below, -two_sided
        return L

    def zeros(self, y: Array, s: Array) -> Array:
        """[N, M]: the weights that are 0 by strict complementarity: what holds them there outweighs what is left."""
        p, zero = self.prices, np.zeros(self.outputs.X.shape[1] * self.outputs.anchor.shape[1], dtype=bool)
        rows = np.empty((2, len(y)))
        rows[:, self.order] = s, y
        _, up, down, _, heads, bodies, *_ = np.split(rows, self.ends, axis=1)
        one, (many, group) = p.single[p.group], p.many()
        zero[p.at[one]] = (up[0] < up[1]) & (down[0] < down[1])
        length = np.sqrt(np.bincount(group, bodies[1] ** 2, int((~p.single).sum())))
        zero[p.at[many]] = (heads[0] < heads[1] - length)[group]
        return zero.reshape(self.outputs.anchor.shape[1], -1).T

    def start(self, U: Array, L: Array | None) -> tuple[Array, Array, Array]:
        """(x, y, s) at weights U [N, M] and multipliers Λ [P, M]; without those, y = 0."""
        o, u = self.outputs, U.T.reshape(-1)
        over = o.X @ U - o.anchor
        over = np.where(o.below, np.maximum(over, 0), over) / o.unit
        x = np.concatenate([u, self.prices.bounds(u), over.T[o.slack.T]])
        y = np.zeros(len(self.b)) if L is None else self._duals(L)
        return x, y, self.b - self.A @ x

    def _duals(self, L: Array) -> Array:
        o, p = self.outputs, self.prices
        one, w = p.single[p.group], p.weights[p.group]
        g = (o.X.T @ L).T.reshape(-1)[p.at] / p.lengths
        balls = [L.T[mask.T] for mask in o.in_balls]
        size = np.sqrt(np.bincount(o.owner, np.concatenate(balls) ** 2, len(o.radii)))
        flat = [(w - g)[one] / 2, (w + g)[one] / 2, L.T[o.below.T], p.weights[~p.single], g[~one]]
        return np.concatenate([L.T[o.equal.T], *flat, size, *(-ball for ball in balls)])[self.order]


def conic_forms(program: LayerProgram) -> list[tuple[slice, ConicForm]]:
    """The conic form of a program that is not refused, or several, each for some of the neurons, that add up to it.

    Where the program separates, so do the iterations, and each neuron stops when it is done; but a program has a cost
    of its own, so small neurons are taken a few at a time.
    """
    M, outputs = program.shape[1], Outputs.of(program)
    together = max(1, _ENTRIES // outputs.X.size) if separable(program) else M
    parts = [slice(first, min(first + together, M)) for first in range(0, M, together)]
    return [(part, _form(outputs.of_neurons(part), Prices(program, part))) for part in parts]


def _form(o: Outputs, p: Prices) -> ConicForm:
    from scipy import sparse

    widths = (o.X.shape[1] * o.anchor.shape[1], len(p.weights), int(o.slack.sum()))
    parts = _parts(o, p, widths)
    sizes = [len(b) for _, b in parts]
    groups = int((~p.single).sum())
    cone = np.concatenate([np.arange(groups), p.many()[1], groups + np.arange(len(o.radii)), groups + o.owner])
    flat = sum(sizes[:4])
    order = np.concatenate([np.arange(flat), flat + np.argsort(cone, kind="stable")])
    A = sparse.block_array([blocks for blocks, _ in parts], format="csr")
    loss = np.concatenate([np.zeros(sum(widths[:2])), np.full(widths[2], float(o.weight > 0))])
    return ConicForm(
        P=sparse.csc_matrix(sparse.diags_array(loss)),
        q=np.concatenate([np.zeros(widths[0]), p.weights, np.zeros(widths[2])]),
        A=sparse.csc_matrix(A[order]),
        b=np.concatenate([b for _, b in parts])[order],
        zero=sizes[0],
        nonneg=flat - sizes[0],
        cones=tuple(np.bincount(cone).tolist()),
        outputs=o,
        prices=p,
        ends=np.cumsum(sizes)[:-1],
        order=order,
    )


_Part = tuple[tuple[Any, Any, Any], Array]
"""Rows of A over u, t and v (None: zeros), and of b."""


def _parts(o: Outputs, p: Prices, widths: tuple[int, int, int]) -> list[_Part]:
    """equal, up, down, below; groups and balls, the heads of each kind before its bodies."""
    from scipy import sparse

    one, many, heads = np.flatnonzero(p.single[p.group]), p.many()[0], np.flatnonzero(~p.single)
    u, t = _pick(p.at[one], p.lengths[one], widths[0]), _pick(p.group[one], np.ones(len(one)), widths[1])
    two_sided, slack = o.in_balls
    held = np.arange(slack.sum())
    return [
        ((o.rows(o.equal), None, -o.slacks(o.equal)), o.anchor.T[o.equal.T]),
        ((u, -t, None), np.zeros(len(one))),
        ((-u, -t, None), np.zeros(len(one))),
        ((o.rows(o.below), None, -o.slacks(o.below)), o.anchor.T[o.below.T]),
        ((None, -_pick(heads, np.ones(len(heads)), widths[1]), None), np.zeros(len(heads))),
        ((-_pick(p.at[many], p.lengths[many], widths[0]), None, None), np.zeros(len(many))),
        ((None, None, sparse.csr_array((len(o.radii), widths[2]))), o.radii),
        ((-o.rows(two_sided), None, None), -o.anchor.T[two_sided.T]),
        ((None, None, -_pick(held, np.ones(len(held)), widths[2])), np.zeros(len(held))),
    ]


def _pick(at: Array, values: Array, width: int) -> Any:
    """For each of ``at`` a row with one value, in that column."""
    from scipy import sparse

    return sparse.csr_array((values, at, np.arange(len(at) + 1)), shape=(len(at), width))
