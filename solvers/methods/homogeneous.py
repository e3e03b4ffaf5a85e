"""A primal-dual interior point method for conic programs with a quadratic objective, on the homogeneous embedding.

    minimise ½xᵀPx + qᵀx   subject to   Ax + s = b,   s in {0} × R₊ × second-order cones

Mehrotra's predictor and corrector with the scaling of Nesterov and Todd, on the embedding of Goulart and Chen,
"Clarabel: an interior-point solver for conic programs with quadratic objectives" (2024), whose equations (in their
notation) are solved here: a solution has κ = 0, a proof that there is none has τ = 0. Products of cones on stacked
vectors: Vandenberghe, "The CVXOPT linear and quadratic cone program solvers" (2010), sections 3 to 5; the sparse form
of H is that of Domahidi, Chu, Boyd, "ECOS" (2013).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Move = tuple[Array, Array, Array, float, float]
"""Changes of x, z, s, τ and κ."""
Point = tuple[Array, Array, Array]
"""x, z and s."""
Pair = tuple[Array, Array]
Solve = Callable[[Array, Array], Pair]

_SHIFT = 1e-13  # of the diagonal of the linear system, which refinement takes back
_REFINEMENTS = 4
_SHORT = 0.99  # of the way to the boundary
_LEAST = 1e-6  # length of a step that is worth its while


class Cones:
    """{0}^zero × R₊^flat × second-order cones of the sizes [K]; in each of these the head comes first.

    Nonnegative numbers are at ``line``, heads of cones at ``heads`` [K], all else that is in a cone at ``bodies``, each
    of these in the cone ``owner``. The ``degree`` counts nonnegative numbers and cones.
    """

    def __init__(self, zero: int, flat: int, sizes: Array) -> None:
        self.sizes, self.rows, self.degree = sizes, zero + flat + int(sizes.sum()), flat + len(sizes)
        self.line = slice(zero, zero + flat)
        self.heads = zero + flat + np.cumsum(sizes) - sizes
        self.bodies = np.setdiff1d(np.arange(zero + flat, self.rows), self.heads)
        self.owner = np.repeat(np.arange(len(sizes)), sizes - 1)

    def inner(self, a: Array, b: Array) -> Array:
        """[K] ⟨a, b⟩ over the bodies alone."""
        return np.bincount(self.owner, a[self.bodies] * b[self.bodies], len(self.sizes))

    def identity(self) -> Array:
        """e: 1 for nonnegative numbers and heads, 0 elsewhere."""
        e = np.zeros(self.rows)
        e[self.line] = e[self.heads] = 1.0
        return e

    def margin(self, a: Array) -> tuple[Array, Array]:
        """[K] head − ‖body‖ and head + ‖body‖."""
        length = np.sqrt(self.inner(a, a))
        return a[self.heads] - length, a[self.heads] + length

    def product(self, a: Array, b: Array) -> Array:
        """a∘b: entry by entry, and (⟨a, b⟩; a₀b₁ + b₀a₁) in a cone."""
        c = a * b
        c[self.heads] += self.inner(a, b)
        c[self.bodies] = a[self.heads][self.owner] * b[self.bodies] + b[self.heads][self.owner] * a[self.bodies]
        return c

    def quotient(self, a: Array, b: Array) -> Array:
        """c with a∘c = b; 0 in the zero cone."""
        c = np.zeros_like(b)
        c[self.line] = b[self.line] / a[self.line]
        low, high = self.margin(a)
        head = (a[self.heads] * b[self.heads] - self.inner(a, b)) / (low * high)
        c[self.heads] = head
        c[self.bodies] = (b[self.bodies] - head[self.owner] * a[self.bodies]) / a[self.heads][self.owner]
        return c

    def reach(self, a: Array, d: Array) -> float:
        """The largest t, infinite if there is none, for which a + td is in the cones; a is inside."""
        falling = d[self.line] < 0
        steps = [-a[self.line][falling] / d[self.line][falling]]
        (low, high), heads = self.margin(a), self.heads
        square = d[heads] ** 2 - self.inner(d, d)
        mixed, rest = a[heads] * d[heads] - self.inner(a, d), low * high
        # mixed² ≥ square·rest, for a is inside; with equality, which rounding hides, where d is a multiple of it.
        below = np.sqrt(np.maximum(mixed**2 - square * rest, 0)) - mixed
        steps += [rest[below > 0] / below[below > 0]]
        return float(min((step.min() for step in steps if len(step)), default=np.inf))


class NesterovTodd:
    """The scaling W with Wz = W⁻¹s = λ for s and z inside the cones.

    On R₊ it is w = √(s/z); in a cone W = η·[w₀, w₁ᵀ; w₁, I + w₁w₁ᵀ/(1 + w₀)] with w₀² = 1 + ‖w₁‖².
    """

    def __init__(self, cones: Cones, s: Array, z: Array) -> None:
        self.cones, line, heads, bodies, owner = cones, cones.line, cones.heads, cones.bodies, cones.owner
        w = np.zeros_like(s)
        w[line] = np.sqrt(s[line] / z[line])
        size_s, size_z = (np.sqrt(np.multiply(*cones.margin(a))) for a in (s, z))
        a, b = s / 1.0, z / 1.0
        for vector, size in ((a, size_s), (b, size_z)):
            vector[heads] /= size
            vector[bodies] /= size[owner]
        gamma = np.sqrt((1 + a[heads] * b[heads] + cones.inner(a, b)) / 2)
        w[bodies] = (a[bodies] - b[bodies]) / (2 * gamma[owner])
        w[heads] = np.sqrt(1 + cones.inner(w, w))
        self.w, self.eta = w, np.sqrt(size_s / size_z)  # w on R₊ and, with length 1, in the cones; η [K]
        self.point = self.apply(z)  # λ

    def apply(self, a: Array, sign: float = 1.0) -> Array:
        """Wa, or W⁻¹a for a sign of -1."""
        c, w, out = self.cones, self.w, np.zeros_like(a)
        out[c.line] = a[c.line] * w[c.line] ** sign
        inner, head, eta = c.inner(w, a), a[c.heads], self.eta**sign
        out[c.heads] = eta * (w[c.heads] * head + sign * inner)
        along = sign * head + inner / (1 + w[c.heads])
        out[c.bodies] = eta[c.owner] * (a[c.bodies] + w[c.bodies] * along[c.owner])
        return out

    def square(self, a: Array) -> Array:
        """Ha, H = W²."""
        return self.apply(self.apply(a))

    def sparse(self) -> tuple[Array, Array, Array]:
        """(D, u, v), vectors over all rows: H is diag(D) + uuᵀ − vvᵀ in each cone, diag(D) elsewhere."""
        c, w = self.cones, self.w
        D, u, v = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
        D[c.line] = w[c.line] ** 2
        w0, length2 = w[c.heads], c.inner(w, w)
        alpha = 1 + w0 + length2 / (1 + w0)
        beta = 1 + 2 / (1 + w0) + length2 / (1 + w0) ** 2
        d = 0.5 * (w0**2 + length2 * (1 - alpha**2 / (1 + length2 * beta)))
        u0 = np.sqrt(w0**2 + length2 - d)
        u1 = alpha / u0
        v1 = np.sqrt(np.maximum(u1**2 - beta, 0))
        D[c.heads], D[c.bodies] = self.eta**2 * d, (self.eta**2)[c.owner]
        u[c.heads], u[c.bodies] = self.eta * u0, (self.eta * u1)[c.owner] * w[c.bodies]
        v[c.bodies] = (self.eta * v1)[c.owner] * w[c.bodies]
        return D, u, v


class Embedding:
    """A program of P, q, A and b, sparse matrices by columns, P whole, and where its iteration has come to."""

    def __init__(self, P: Any, q: Array, A: Any, b: Array, cones: Cones) -> None:
        self.P, self.q, self.A, self.b, self.cones = P, q, A, b, cones
        self.x, self.z, self.s = np.zeros(len(q)), cones.identity(), cones.identity()
        self.tau, self.kappa, self.stuck = 1.0, 1.0, False
        self.system = _System(P, A, cones)

    @property
    def mu(self) -> float:
        """The mean complementarity."""
        return (float(self.s @ self.z) + self.tau * self.kappa) / (self.cones.degree + 1)

    def point(self) -> Point:
        """(x, z, s) of the program itself."""
        return self.x / self.tau, self.z / self.tau, self.s / self.tau

    def ray(self) -> Point:
        """Where there is no solution: x = 0, and a z with Aᵀz ≈ 0 and bᵀz < 0."""
        return np.zeros_like(self.x), self.z, self.s

    def lacking(self) -> dict[str, float]:
        """Relative residuals of the program itself, by name."""
        dual, primal, _ = self.residuals()
        sizes = (1 + np.abs(self.q).max(initial=0), 1 + np.abs(self.b).max(initial=0))
        worst = (float(np.abs(part).max(initial=0)) / self.tau for part in (dual, primal))
        return {name: value / size for name, value, size in zip(("dual", "primal"), worst, sizes, strict=True)}

    def residuals(self) -> tuple[Array, Array, float]:
        """Of x, z and τ: what the embedding's equations lack."""
        Px = self.P @ self.x
        dual = Px + self.A.T @ self.z + self.q * self.tau
        primal = self.A @ self.x + self.s - self.b * self.tau
        gap = self.q @ self.x + self.b @ self.z + self.kappa + self.x @ Px / self.tau
        return dual, primal, float(gap)

    def step(self) -> None:
        """One predictor and corrector; ``stuck`` where rounding leaves none of a useful length."""
        with np.errstate(all="ignore"):  # what overflows shows in the step
            try:
                move, length = self._move()
            except RuntimeError:  # a singular factor
                length = 0.0
        if not length > _LEAST:
            self.stuck = True
            return
        dx, dz, ds, dtau, dkappa = move
        self.x, self.z, self.s = self.x + length * dx, self.z + length * dz, self.s + length * ds
        self.tau, self.kappa = self.tau + length * dtau, self.kappa + length * dkappa
        # The embedding is homogeneous: only ratios count.
        size = max(self.tau, self.kappa)
        self.x, self.z, self.s = self.x / size, self.z / size, self.s / size
        self.tau, self.kappa = self.tau / size, self.kappa / size

    def _move(self) -> tuple[Move, float]:
        """The next step and its length, NaN where it is not finite."""
        W = NesterovTodd(self.cones, self.s, self.z)
        solve = self.system.factorised(W)
        constant = solve(-self.q, self.b)
        residuals = self.residuals()
        square = self.cones.product(W.point, W.point)
        affine = self._direction(W, solve, constant, residuals, (square, self.tau * self.kappa))
        sigma = (1 - min(1.0, self._reach(affine))) ** 3
        _, dz, ds, dtau, dkappa = affine
        mu, left = self.mu, 1 - sigma
        bent = square + self.cones.product(W.apply(ds, -1.0), W.apply(dz)) - sigma * mu * self.cones.identity()
        r = (left * residuals[0], left * residuals[1], left * residuals[2])
        c = (bent, self.tau * self.kappa + dtau * dkappa - sigma * mu)
        move = self._direction(W, solve, constant, r, c)
        finite = all(np.isfinite(part).all() for part in move)
        return move, min(1.0, _SHORT * self._reach(move)) if finite else np.nan

    def _direction(
        self, W: NesterovTodd, solve: Solve, constant: Pair, r: tuple[Array, Array, float], c: tuple[Array, float]
    ) -> Move:
        """Newton's step (x, z, s, τ, κ) against residuals r and complementarities c of the cones and of τ and κ."""
        ds, dk = c
        shift = W.apply(self.cones.quotient(W.point, ds))
        x1, z1 = solve(-r[0], shift - r[1])
        x2, z2 = constant
        xi = self.x / self.tau
        Pxi = self.P @ xi
        slope = self.q + 2 * Pxi
        lacking = -r[2] + dk / self.tau - slope @ x1 - self.b @ z1
        dtau = float(lacking / (slope @ x2 + self.b @ z2 - self.kappa / self.tau - xi @ Pxi))
        dx, dz = x1 + dtau * x2, z1 + dtau * z2
        return dx, dz, -shift - W.square(dz), dtau, -(dk + self.kappa * dtau) / self.tau

    def _reach(self, move: Move) -> float:
        """How far along a step everything stays in its cone."""
        _, dz, ds, dtau, dkappa = move
        pairs = ((self.tau, dtau), (self.kappa, dkappa))
        scalars = (-value / change for value, change in pairs if change < 0)
        return min(self.cones.reach(self.s, ds), self.cones.reach(self.z, dz), *scalars, np.inf)


class _System:
    """[P, Aᵀ; A, −H], with two more rows for each cone that keep H's part in it sparse."""

    def __init__(self, P: Any, A: Any, cones: Cones) -> None:
        from scipy import sparse

        self.P, self.A, self.cones = P, A, cones

        (m, n), K, one, other = A.shape, len(cones.sizes), P.tocoo(), A.tocoo()
        size, diagonal = n + m + 2 * K, np.arange(n + m + 2 * K)
        inside = n + m - int(cones.sizes.sum()) + np.arange(int(cones.sizes.sum()))
        u = n + m + np.repeat(np.arange(K), cones.sizes)
        row = np.concatenate([one.row, other.row + n, other.col, diagonal, inside, u, inside, u + K])
        column = np.concatenate([one.col, other.col, other.row + n, diagonal, u, inside, u + K, inside])
        # Entries of P's diagonal and its shift share a place.
        places, self.place = np.unique(column * size + row, return_inverse=True)
        pattern = (np.zeros(len(places)), (places % size, places // size))
        self.matrix = sparse.csc_matrix(pattern, shape=(size, size))
        self.fixed = np.concatenate([one.data, other.data, other.data, np.full(n, _SHIFT)])  # the first of the values

    def factorised(self, W: NesterovTodd) -> Solve:
        """A function that solves the system for right sides of x and z; a RuntimeError where it is singular."""
        from scipy.sparse.linalg import splu

        (m, n), K, (D, u, v) = self.A.shape, len(self.cones.sizes), W.sparse()
        u, v = (part[m - int(self.cones.sizes.sum()) :] for part in (u, v))
        values = np.concatenate([self.fixed, -D - _SHIFT, np.ones(K), -np.ones(K), u, u, v, v])
        matrix = self.matrix.copy()
        matrix.data = np.bincount(self.place, values, matrix.nnz)
        factor = splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=1e-3, options={"SymmetricMode": True})

        def solve(rx: Array, rz: Array) -> tuple[Array, Array]:
            x, z = np.zeros(n), np.zeros(m)
            best, least, left = (x, z), np.inf, (rx, rz)
            for _ in range(_REFINEMENTS + 1):
                found = factor.solve(np.concatenate([*left, np.zeros(2 * K)]))
                x, z = x + found[:n], z + found[n : n + m]
                left = (rx - self.P @ x - self.A.T @ z, rz - self.A @ x + W.square(z))
                error = max(np.abs(part).max(initial=0) for part in left)
                if not error < least:
                    break
                best, least = (x, z), error
            return best

        return solve
