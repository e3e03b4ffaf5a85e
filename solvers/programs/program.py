"""The layer program: minimise penalty(U) + fit(X U)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, working_dtype
from convexprune.solvers.errors import InvalidInput, MissingExtra, ShapeMismatch
from convexprune.solvers.programs.claims import check_fit_claims, check_penalty_claims
from convexprune.solvers.programs.fits import Fit
from convexprune.solvers.programs.gram import Gram
from convexprune.solvers.programs.penalties import L1, Penalty

_UNPENALISED = L1()


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
        dtype: The precision solvers work in unless told otherwise: float64 for float64 inputs, else float32; for a
            ``Gram`` that of its products.

    Raises:
        ShapeMismatch: X and the targets differ in samples, or the penalty's weights do not fit [N, M].
        NonFinite, EmptyInput: X holds NaN or infinity, or nothing.
        InvalidInput: X and the targets are on different devices; fit or penalty is of another kind, or one of your own
            that is not what it claims to be (``claims``).
    """

    X: ArrayLike | Gram
    fit: Fit
    penalty: Penalty = _UNPENALISED
    dtype: torch.dtype = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value, kind in (("fit", self.fit, "curb"), ("penalty", self.penalty, "prox")):
            if isinstance(value, type) or not hasattr(value, kind):
                raise InvalidInput(f"{name}: expected an instance such as {_EXAMPLES[name]}, found {value!r}")
        X = as_matrix("inputs X", self.X.inputs if isinstance(self.X, Gram) else self.X)
        samples, outputs = self.fit.shape
        if X.shape[0] != samples:
            raise ShapeMismatch(
                f"inputs X {list(X.shape)} and targets {[samples, outputs]} differ in the number of samples; "
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
        assert isinstance(self.X, Tensor)  # noqa: S101 - __post_init__ made it one
        return self.X

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


_EXAMPLES = {"fit": "ReluBall(Y, eps)", "penalty": "L1()"}
