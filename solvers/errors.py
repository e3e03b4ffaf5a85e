"""Every exception the library raises on purpose; each message says what was found, what was expected, what to do."""


class ConvexPruneError(Exception):
    """Base of every exception raised on purpose by convexprune."""


class InvalidInput(ConvexPruneError, ValueError):
    """An argument is not what the call can use."""


class ShapeMismatch(InvalidInput):
    """Arrays whose shapes do not fit together."""


class NonFinite(InvalidInput):
    """NaN or infinity where numbers were expected."""


class EmptyInput(InvalidInput):
    """No samples, no features or no outputs."""


class InvalidTolerance(InvalidInput):
    """An eps, tolerance or limit outside its range."""


class UnknownSolver(ConvexPruneError, LookupError):
    """No solver is registered under the name."""


class UnknownOption(ConvexPruneError, TypeError):
    """The solver has no option of that name."""


class SolverRefused(ConvexPruneError):
    """The solver cannot take this program; nothing was run."""


class MissingExtra(ConvexPruneError, ImportError):
    """An optional package is needed and not installed."""


class Infeasible(ConvexPruneError):
    """No weights satisfy the fit."""
