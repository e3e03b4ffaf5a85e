"""Programs built to be awkward, one function each, for any fit of the zoo unless its type says otherwise."""

import torch

from convexprune.solvers.programs.fits import NetTrimSet
from convexprune.solvers.programs.penalties import L1
from convexprune.solvers.programs.program import LayerProgram
from convexprune.solvers.testing.layers import fit_of, gaussian, layer, pose, targets_of, uniform


def free_bias(fit: str) -> LayerProgram:
    """The last input is not penalised."""
    return pose(*layer(11, 120, 16, 12), fit, penalty=L1.free_bias(16))


def dead_inputs(fit: str) -> LayerProgram:
    """Inputs 0, 3 and 7 are always 0."""
    X, W = layer(12, 100, 20, 10)
    X[:, [0, 3, 7]] = 0
    return pose(X, W, fit)


def duplicate_columns(fit: str) -> LayerProgram:
    """One input is there twice, another as its double."""
    X, W = layer(13, 100, 16, 10)
    X[:, 5], X[:, 6] = X[:, 4], 2 * X[:, 3]
    return pose(X, W, fit)


def badly_scaled(fit: str) -> LayerProgram:
    """Inputs in units that differ by 10¹²."""
    X, W = layer(14, 100, 13, 10)
    d = torch.logspace(-6, 6, 13, dtype=torch.float64)
    return pose(X * d, W / d[:, None], fit)


def some_inactive(fit: str) -> LayerProgram:
    """Neurons that are never active, and some that always are, with a free bias."""
    X, W = layer(15, 80, 12, 9)
    W[:, :3] = -W[:, :3].abs()
    W[:, 3:6] = W[:, 3:6].abs()
    return pose(X, W, fit, penalty=L1.free_bias(12))


def all_active(fit: str) -> LayerProgram:
    """Every output is positive."""
    X, W = layer(17, 60, 10, 8)
    return pose(X, W.abs(), fit)


def weighted(fit: str) -> LayerProgram:
    """Weights of all sizes, some of them 0."""
    X, W = layer(18, 90, 14, 9)
    weights = 3 * uniform(0, 14, 9)
    weights[weights < 0.5] = 0
    return pose(X, W, fit, penalty=L1(weights))


def wide(fit: str) -> LayerProgram:
    """Fewer samples than inputs."""
    return pose(*layer(19, 20, 40, 15), fit)


def tall(fit: str) -> LayerProgram:
    """Many samples for few inputs."""
    return pose(*layer(25, 3000, 5, 4), fit)


def one_sample(fit: str) -> LayerProgram:
    """A single sample, all of it active."""
    X, W = layer(26, 1, 6, 4)
    return pose(X, W.abs(), fit)


def nearly_collinear(fit: str) -> LayerProgram:
    """Every input has a twin that differs by a thousandth."""
    X, W = layer(27, 100, 8, 6)
    return pose(torch.cat([X, X + 1e-3 * gaussian(28, 100, 8)], 1), W.repeat(2, 1) / 2, fit)


def large_units(fit: str) -> LayerProgram:
    """Inputs and weights in thousands."""
    X, W = layer(20, 90, 12, 8)
    return pose(1e4 * X, 1e3 * W, fit)


def small_units(fit: str) -> LayerProgram:
    """Inputs and weights in thousandths and less."""
    X, W = layer(20, 90, 12, 8)
    return pose(1e-3 * X, 1e-4 * W, fit)


def low_rank(fit: str) -> LayerProgram:
    """18 inputs that are mixtures of 5."""
    X, W = layer(21, 90, 18, 8)
    return pose(X[:, :5] @ uniform(1, 5, 18), W, fit)


def rounded(fit: str, dtype: torch.dtype) -> LayerProgram:
    """Inputs and targets kept in half precision."""
    X, W = layer(29, 100, 14, 10)
    X = X.to(dtype).double()
    Y = targets_of(fit, X @ W)
    return LayerProgram(X.to(dtype), fit_of(fit, X, Y, 0.1, L1()).map(lambda array: array.to(dtype)))


def no_slack(fit: str) -> LayerProgram:
    """eps = 0 and neurons with fewer active samples than inputs: a linear program with many vertices."""
    return pose(*layer(24, 60, 8, 5), fit, 0.0)


def raised_ceiling() -> LayerProgram:
    """The Net-Trim set of a cascade: inputs have changed, the ceiling is what the trained weights reach with them."""
    X, W = layer(22, 90, 14, 9)
    Y = (X @ W).clamp(min=0)
    noisy = X + 0.05 * gaussian(2, 90, 14)
    Z, active = noisy @ W, Y > 0
    eps = 1.1 * float((Z - Y)[active].norm())
    return LayerProgram(noisy, NetTrimSet(Y, eps, torch.where(active, 0.0, Z)))
