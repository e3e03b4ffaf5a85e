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

from dataclasses import dataclass
from typing import Any

import numpy as np

from convexprune.solvers.methods.backends.parts import Array, Outputs, Prices, separable
from convexprune.solvers.programs.program import LayerProgram

_ENTRIES = 50_000  # of X, counted once a neuron, that separable programs are solved together up to


@dataclass(frozen=True, eq=False)
class ConicForm:
    """One conic program, with the way there and back.

    Attributes:
        P, q, A, b: The data; sparse matrices by columns, P whole.
        zero, nonneg: How many rows of these kinds come first.
        cones: The sizes of the second-order cones that the other rows are in; the head comes first in each.
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

    def zeros(self, x: Array, y: Array, s: Array) -> Array:  # noqa: ARG002 - a point of the form
        """[N, M]: the weights that are 0 by strict complementarity: what holds them there outweighs what is left."""
        p, zero = self.prices, np.zeros(self.outputs.X.shape[1] * self.outputs.anchor.shape[1], dtype=bool)
        rows = np.empty((2, len(y)))
        rows[:, self.order] = s, y
        _, up, down, _, heads, bodies, *_ = np.split(rows, self.ends, axis=1)
        one, many = p.single[p.group], np.flatnonzero(~p.single[p.group])
        zero[p.at[one]] = (up[0] < up[1]) & (down[0] < down[1])
        group = (np.cumsum(~p.single) - 1)[p.group[many]]
        pull = np.sqrt(np.bincount(group, bodies[1] ** 2, int((~p.single).sum())))
        zero[p.at[many]] = (heads[0] < heads[1] - pull)[group]
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
        pull = (o.X.T @ L).T.reshape(-1)[p.at] / p.lengths
        balls = [L.T[mask.T] for mask in _in_balls(o)]
        size = np.sqrt(np.bincount(_owner(o), np.concatenate(balls) ** 2, len(o.radii)))
        flat = [(w - pull)[one] / 2, (w + pull)[one] / 2, L.T[o.below.T], p.weights[~p.single], pull[~one]]
        return np.concatenate([L.T[o.equal.T], *flat, size, *(-ball for ball in balls)])[self.order]


def conic_forms(program: LayerProgram) -> list[tuple[slice, ConicForm]]:
    """The conic form of a program that is not refused, or several, each for some of the neurons, that add up to it.

    Where the program separates, so do the iterations, and each neuron stops when it is done; but a program has a cost
    of its own, so small neurons are taken a few at a time.
    """
    M, outputs = program.shape[1], Outputs.of(program)
    together = max(1, _ENTRIES // outputs.X.size) if separable(program) else M
    parts = [slice(first, min(first + together, M)) for first in range(0, M, together)]
    return [(part, _form(outputs.of_neurons(part), Prices.of(program, part))) for part in parts]


def _form(o: Outputs, p: Prices) -> ConicForm:
    from scipy import sparse

    widths = (o.X.shape[1] * o.anchor.shape[1], len(p.weights), int(o.slack.sum()))
    parts = [*_flat_parts(o, p, widths), *_cone_parts(o, p, widths)]
    sizes = [len(b) for _, b in parts]
    groups = int((~p.single).sum())
    group = (np.cumsum(~p.single) - 1)[p.group[~p.single[p.group]]]
    cone = np.concatenate([np.arange(groups), group, groups + np.arange(len(o.radii)), groups + _owner(o)])
    flat = sum(sizes[:4])
    order = np.concatenate([np.arange(flat), flat + np.argsort(cone, kind="stable")])
    A = sparse.vstack([_row(blocks, len(b), widths) for blocks, b in parts], format="csr")
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


def _flat_parts(o: Outputs, p: Prices, widths: tuple[int, int, int]) -> list[_Part]:
    """equal, up, down, below."""
    one = np.flatnonzero(p.single[p.group])
    u, t = _pick(p.at[one], p.lengths[one], widths[0]), _pick(p.group[one], np.ones(len(one)), widths[1])
    return [
        ((o.rows(o.equal), None, -o.slacks(o.equal)), o.anchor.T[o.equal.T]),
        ((u, -t, None), np.zeros(len(one))),
        ((-u, -t, None), np.zeros(len(one))),
        ((o.rows(o.below), None, -o.slacks(o.below)), o.anchor.T[o.below.T]),
    ]


def _cone_parts(o: Outputs, p: Prices, widths: tuple[int, int, int]) -> list[_Part]:
    """groups and balls, the heads of each kind before its bodies."""
    many, heads = np.flatnonzero(~p.single[p.group]), np.flatnonzero(~p.single)
    two_sided, slack = _in_balls(o)
    rows, held = o.rows(two_sided), np.arange(slack.sum())
    return [
        ((None, -_pick(heads, np.ones(len(heads)), widths[1]), None), np.zeros(len(heads))),
        ((-_pick(p.at[many], p.lengths[many], widths[0]), None, None), np.zeros(len(many))),
        ((None, None, None), o.radii),
        ((-rows, None, None), -o.anchor.T[two_sided.T]),
        ((None, None, -_pick(held, np.ones(len(held)), widths[2])), np.zeros(len(held))),
    ]


def _in_balls(o: Outputs) -> tuple[Array, Array]:
    """Masks [P, M] of the two-sided outputs and of the slacks that balls hold: none of a loss."""
    return o.two_sided, o.slack & (o.weight == 0)


def _owner(o: Outputs) -> Array:
    """Which ball holds each of those."""
    return np.concatenate([np.repeat(o.ball, mask.sum(0)) for mask in _in_balls(o)])


def _pick(at: Array, values: Array, width: int) -> Any:
    """For each of ``at`` a row with one value, in that column."""
    from scipy import sparse

    return sparse.csr_array((values, at, np.arange(len(at) + 1)), shape=(len(at), width))


def _row(blocks: tuple[Any, ...], height: int, widths: tuple[int, ...]) -> Any:
    from scipy import sparse

    zeros = [sparse.csr_array((height, width)) for width in widths]
    return sparse.hstack([z if b is None else b for b, z in zip(blocks, zeros, strict=True)], format="csr")
