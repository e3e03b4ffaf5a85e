"""The adapter layer's exceptions; the solver layer's are in ``convexprune.solvers.errors``."""

from convexprune.solvers.errors import ConvexPruneError, EmptyInput, InvalidInput


class UnsupportedModule(ConvexPruneError, TypeError):
    """The module's computation is not a matrix product that the library can write down."""


class NothingToPrune(InvalidInput):
    """The model has no layer that can be pruned, or none that the name patterns choose."""


class EmptyCalibration(EmptyInput):
    """The calibration data holds no sample."""


class DamagedFile(ConvexPruneError, OSError):
    """A file that cannot be read as what it should be, or that would have to be unpickled."""


class PruningFailed(ConvexPruneError):
    """A solver returned no usable weights for a layer; the model is as it was."""


class OtherRun(InvalidInput):
    """A run directory holds a run of another model, other data or another recipe."""


class WorkerLost(ConvexPruneError):
    """Workers died again and again; what they had solved is kept."""
