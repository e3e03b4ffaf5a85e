"""Products of cones {0} × R₊ × second-order cones, as an interior point method needs them, on stacked numpy vectors.

Formulas: Vandenberghe, "The CVXOPT linear and quadratic cone program solvers" (2010), sections 3 to 5; the sparse form
of H is that of Domahidi, Chu, Boyd, "ECOS" (2013).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Cones:
    """{0}^zero × R₊^flat × second-order cones.

    Args:
        zero, flat: Sizes of the first two.
        sizes: [K] of the cones; in each the head comes first.
    """

    zero: int
    flat: int
    sizes: Array

    @property
    def rows(self) -> int:
        """Of a vector."""
        return self.zero + self.flat + int(self.sizes.sum())

    @property
    def degree(self) -> int:
        """One for each nonnegative number and each cone."""
        return self.flat + len(self.sizes)

    @cached_property
    def line(self) -> slice:
        """Where the nonnegative numbers are."""
        return slice(self.zero, self.zero + self.flat)

    @cached_property
    def heads(self) -> Array:
        """[K] indices."""
        return self.zero + self.flat + np.cumsum(self.sizes) - self.sizes

    @cached_property
    def bodies(self) -> Array:
        """Indices of all that are no heads."""
        inside = np.ones(self.rows, dtype=bool)
        inside[: self.zero + self.flat] = False
        inside[self.heads] = False
        return np.flatnonzero(inside)

    @cached_property
    def owner(self) -> Array:
        """Which cone each of the bodies' entries is in."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes - 1)

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


@dataclass(frozen=True, eq=False)
class NesterovTodd:
    """The scaling W with Wz = W⁻¹s = λ for s and z inside the cones.

    On R₊ it is w = √(s/z); in a cone W = η·[w₀, w₁ᵀ; w₁, I + w₁w₁ᵀ/(1 + w₀)] with w₀² = 1 + ‖w₁‖².
    """

    cones: Cones
    w: Array  # on R₊ and, with length 1, in the cones
    eta: Array  # [K]
    point: Array  # λ

    @classmethod
    def of(cls, cones: Cones, s: Array, z: Array) -> "NesterovTodd":
        """That of s and z."""
        w, line, heads, bodies, owner = np.zeros_like(s), cones.line, cones.heads, cones.bodies, cones.owner
        w[line] = np.sqrt(s[line] / z[line])
        size_s, size_z = (np.sqrt(np.multiply(*cones.margin(a))) for a in (s, z))
        a, b = s / 1.0, z / 1.0
        for vector, size in ((a, size_s), (b, size_z)):
            vector[heads] /= size
            vector[bodies] /= size[owner]
        gamma = np.sqrt((1 + a[heads] * b[heads] + cones.inner(a, b)) / 2)
        w[bodies] = (a[bodies] - b[bodies]) / (2 * gamma[owner])
        w[heads] = np.sqrt(1 + cones.inner(w, w))
        new = cls(cones, w, np.sqrt(size_s / size_z), w)
        return cls(cones, w, new.eta, new.apply(z))

    def apply(self, a: Array) -> Array:
        """Wa."""
        return self._times(a, 1.0)

    def undo(self, a: Array) -> Array:
        """W⁻¹a."""
        return self._times(a, -1.0)

    def _times(self, a: Array, sign: float) -> Array:
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
