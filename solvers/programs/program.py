"""The layer program, minimise penalty(U) + fit(X U); its samples in blocks, and changes of its units."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, add_gram, as_matrix, blocks_of, power_of_two, unit_of, working_dtype
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, MissingExtra, NonFinite, ShapeMismatch
from convexprune.solvers.programs.claims import check_fit_claims, check_penalty_claims
from convexprune.solvers.programs.fits import Fit
from convexprune.solvers.programs.gram import Gram
from convexprune.solvers.programs.penalties import L1, Penalty, is_homogeneous

_UNPENALISED = L1()
_LARGEST = 0.9  # of the exponents of the precision: inputs stay below
_UNEVEN = 1e6  # lengths of columns may differ by this factor: float32 holds their squares, and sums tell them apart


@dataclass(frozen=True, eq=False)
class LayerProgram:
    """Minimise g(U) + f(X U) over U [N, M].

    Args:
        X: Layer inputs [P, N], samples first; a last column of ones carries the bias. A tensor on any device and of
            any real dtype (memory is shared), a numpy array, or the ``Gram`` that the fit was built on.
        fit: f, with targets [P, M] on the device of X: a set (``ReluBall``, ``NetTrimSet``, ``Ball``) or a loss
            (``ReluLoss``, ``NetTrimLoss``, ``SquaredLoss``).
        penalty: g, by default the ℓ1 norm: ``L1``, ``GroupL2``, or the budgets ``TopK`` and ``NM``.

    Attributes:
        dtype: The precision solvers work in by default: float64 for float64 inputs, else float32; a ``Gram``'s own.

    Raises:
        ShapeMismatch: X and the targets differ in samples, or the penalty's weights do not fit [N, M].
        NonFinite, EmptyInput: X holds NaN or infinity, or nothing.
        InvalidInput: X and the targets are on different devices; fit or penalty is of another kind, or a user's own
            that is not what it claims to be (``claims``).
    """

    X: ArrayLike | Gram
    fit: Fit
    penalty: Penalty = _UNPENALISED
    dtype: torch.dtype = field(init=False, repr=False)

    def __post_init__(self) -> None:
        known = (("fit", self.fit, "project_dual", "ReluBall(Y, eps)"), ("penalty", self.penalty, "prox", "L1()"))
        for name, value, member, example in known:
            if isinstance(value, type) or not hasattr(value, member):
                raise InvalidInput(f"{name}: expected an instance such as {example}, found {value!r}")
        X = as_matrix("inputs X", self.X.inputs if isinstance(self.X, Gram) else self.X)
        if X.shape[0] != self.fit.shape[0]:
            raise ShapeMismatch(
                f"inputs X {list(X.shape)} and targets {list(self.fit.shape)} differ in the number of samples; "
                "both have samples first: X [P, N], Y [P, M]"
            )
        if X.device != self.fit.Y.device:
            raise InvalidInput(f"inputs X are on {X.device}, the targets elsewhere; move both to one device")
        gram, source = self.X if isinstance(self.X, Gram) else None, getattr(self.fit, "gram", None)
        foreign = source is not None and X.data_ptr() != source.inputs.data_ptr()
        if foreign or (gram is not None and source is not gram):
            raise InvalidInput(
                "fit: expected targets from the same Gram as the inputs, as in LayerProgram(gram, Ball(gram, eps))"
            )
        object.__setattr__(self, "dtype", working_dtype(X.dtype) if source is None else source.dtype)
        object.__setattr__(self, "X", X)
        self.penalty.check(self.shape)
        check_penalty_claims(self.penalty, self.shape)
        check_fit_claims(self.fit)

    @property
    def inputs(self) -> Tensor:
        """X as a tensor [P, N]."""
        return cast(Tensor, self.X)

    @property
    def lengths(self) -> Tensor:
        """‖x_j‖ [N, 1] of the columns of X, in float64, by blocks of rows so that X is never copied whole."""
        X = self.inputs
        squares = [X[rows].to(torch.float64).square().sum(0) for rows in blocks_of(X)]
        return torch.stack(squares).sum(0)[:, None].sqrt()

    @property
    def samples(self) -> int:
        """P."""
        return self.inputs.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[N, M], the shape of the weights."""
        return (self.inputs.shape[1], self.fit.shape[1])

    def to(self, dtype: torch.dtype) -> "LayerProgram":
        """The same program in another precision; what already has it is shared, not copied."""
        X = self.inputs.to(dtype)
        return LayerProgram(X, self.fit.map(lambda array: array.to(dtype)), self.penalty.to(X))

    def to_cvxpy(self) -> tuple[Any, Any]:
        """The reference formulation: ``(problem, variable)``, a cvxpy.Problem and its variable U [N, M].

        The problem's first constraint is Z == X U; its dual value is, up to the solver's sign, Λ [P, M].

        Raises:
            MissingExtra: cvxpy is not installed.
        """
        try:
            import cvxpy as cp
        except ImportError as error:
            raise MissingExtra(
                'the reference formulation needs cvxpy, which is not installed: pip install "convexprune[reference]"'
            ) from error
        U, Z = cp.Variable(self.shape, name="U"), cp.Variable(self.fit.shape, name="Z")
        objective, constraints = self.fit.to_cvxpy(Z)
        link = Z == self.inputs.double().cpu().numpy() @ U
        return cp.Problem(cp.Minimize(self.penalty.to_cvxpy(U) + objective), [link, *constraints]), U


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of a program: their inputs X in the caller's precision, shared, and their fit in the solver's."""

    rows: slice
    X: Tensor
    fit: Fit

    def inputs(self, like: Tensor) -> Tensor:
        """X in the dtype of ``like``; a copy of the block only where that is not its own."""
        return self.X.to(like.dtype)

    def outputs(self, U: Tensor, precision: torch.dtype) -> Tensor:
        """XU in the dtype of U, the product in ``precision``."""
        return torch.mm(self.X.to(precision), U.to(precision)).to(U.dtype)

    def adjoint(self, R: Tensor, precision: torch.dtype) -> Tensor:
        """XᵀR in the dtype of R, the product in ``precision``."""
        return torch.mm(self.X.to(precision).T, R.to(precision)).to(R.dtype)


@dataclass(frozen=True, eq=False)
class Samples:
    """All blocks of a program: a pass over them costs less memory traffic than one over whole [P, M] arrays."""

    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, program: LayerProgram, dtype: torch.dtype) -> Self:
        """X is not copied; targets are where they have another dtype."""
        X, fit = program.inputs, program.fit
        parts = ((rows, fit.map(lambda a, rows=rows: a[rows].to(dtype))) for rows in blocks_of(X, program.shape[1]))  # type: ignore[misc]
        return cls(tuple(Block(rows, X[rows], part) for rows, part in parts))

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def outputs(self, U: Tensor, out: Tensor) -> Tensor:
        """XU, written to ``out`` [P, M]."""
        for block in self:
            torch.mm(block.inputs(out), U, out=out[block.rows])
        return out

    def adjoint(self, rows_of: Callable[[Block], Tensor], like: Tensor) -> Tensor:
        """XᵀA [N, M] for an A that ``rows_of`` gives block by block, in the shape and dtype of ``like``."""
        total = torch.zeros_like(like)
        for block in self:
            total.addmm_(block.inputs(like).T, rows_of(block))
        return total

    def sums(self, Z: Tensor) -> Tensor:
        """The fit's sums of Z [P, M], in float64."""
        return torch.stack([block.fit.sums(Z[block.rows]).to(torch.float64) for block in self]).sum(0)


def gram_matrix(X: Tensor) -> Tensor:
    """XᵀX in float64, by blocks of rows so that X is never copied whole."""
    gram = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=X.device)
    for rows in blocks_of(X):
        add_gram(gram, X[rows].to(torch.float64))
    return gram


def moderated(program: LayerProgram) -> tuple[LayerProgram, float]:
    """The program of cX and f(·/c), with the same solutions and values, and c: 1 unless targets are extreme.

    With c squares of outputs neither overflow nor vanish; it is a power of two, so that nothing is rounded. Λ/c are the
    multipliers of the new program. NonFinite is raised where the weight of a loss leaves the range of float64.
    """
    X, Y = program.inputs, program.fit.Y
    unit = unit_of(Y) if bool(Y.any()) else unit_of(X)
    if unit == 1:
        return program, 1.0
    X = X.to(working_dtype(X.dtype))
    room = torch.finfo(X.dtype).max ** _LARGEST / max(float(X.abs().max()), unit)
    c = power_of_two(min(1 / unit, room))
    try:
        fit = program.fit.map(lambda A: A.to(working_dtype(A.dtype))).rescaled(c)
    except InvalidTolerance as error:
        raise NonFinite(
            f"targets Y: found numbers of about {unit:.1g}, the squares of which float64 does not hold; "
            "divide inputs and targets by the same number"
        ) from error
    return LayerProgram(X * c, fit, program.penalty), c


def leveled(program: LayerProgram) -> tuple[LayerProgram, Tensor]:
    """The program of X/d for the weights dU, and d [N, 1]: 1 unless columns are of extremely different lengths.

    The d are powers of two that make columns, where they are not 0, about as long as the targets.
    """
    X = program.inputs
    lengths = program.lengths
    used = lengths > 0
    if not bool(used.any()) or float(lengths.max()) <= _UNEVEN * float(lengths[used].min()):
        return program, X.new_ones(len(lengths), 1)
    limits = torch.finfo(X.dtype)
    relative = (lengths / (program.fit.size or lengths.max())).clamp(limits.tiny, limits.max / 2)
    d = torch.where(used, relative.log2().round().exp2(), 1.0).to(X)
    return LayerProgram(X / d.T, program.fit, program.penalty.rescaled(d)), d


@dataclass(frozen=True, eq=False)
class Scaling:
    """Columns of X divided by d [N, 1] > 0, outputs multiplied by c > 0, the objective by b > 0.

    V = c·diag(d) U solves the new program.
    """

    d: Tensor
    c: float
    b: float

    @classmethod
    def of(cls, program: LayerProgram) -> Self:
        """Unit root mean square for the columns of X and for the targets, median 1 for the penalty's prices."""
        d = program.lengths / program.samples**0.5
        d = torch.where(d > 0, d, 1.0)
        entries = program.fit.shape[0] * program.fit.shape[1]
        price = program.penalty.to(d).cost(program.shape) / d
        positive = price[price > 0]
        b = 1 / float(positive.median()) if len(positive) else 1.0
        return cls(d, entries**0.5 / (program.fit.size or 1.0), b)

    def apply(self, program: LayerProgram) -> LayerProgram:
        """The program in the new units, in float64; its value is b·c times the old one."""
        wide = program.to(torch.float64)
        penalty: Any = wide.penalty  # what is not homogeneous has ``times``
        if is_homogeneous(penalty):
            penalty = penalty.rescaled(self.d / self.b)
        else:
            penalty = penalty.rescaled(self.c * self.d).times(self.b * self.c)
        return LayerProgram(wide.inputs / self.d.T, wide.fit.rescaled(self.c).times(self.b * self.c), penalty)

    def undo_weights(self, V: Tensor) -> Tensor:
        """U = diag(1/d) V / c."""
        return V / self.d.to(V) / self.c

    def undo_multipliers(self, L: Tensor) -> Tensor:
        """Λ/b: the objective is scaled by b·c, the outputs by c."""
        return L / self.b
