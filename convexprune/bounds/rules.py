"""Lipschitz constants of operations in the Euclidean norm, for the input that they have."""

import math
from collections.abc import Callable

import torch
from torch import fx

from convexprune.bounds.calls import Call, repeats
from convexprune.bounds.names import CLAMPS, DROPOUTS, MAX_POOLS, MEANS, MOVES, SAME
from convexprune.bounds.norms import convolution_norm, spectral_norm
from convexprune.bounds.pools import max_pool, nonnegative
from convexprune.bounds.pruned import is_product
from convexprune.layers.kinds import NORMS

_Rule = Callable[[Call, fx.Node], float | None]


def constant(call: Call, operand: fx.Node) -> float | None:
    """What the operation multiplies an error of the operand by at most; None where nothing is known."""
    rule = _weight_norm if is_product(call.module) else _RULES.get(call.operation)
    found = None if rule is None else rule(call, operand)
    return found if found is not None and math.isfinite(found) else None


def _elementwise(constant: float) -> _Rule:
    return lambda call, operand: constant * repeats(call, operand)


def _sloped(name: str, default: float) -> _Rule:
    """Slope 1 on one side, at most this parameter on the other."""
    return lambda call, _: max(1.0, abs(call.given(name, 1, default)))


def _prelu(call: Call, _: fx.Node) -> float:
    return max(1.0, float(call.given("weight", 1).abs().max()))


def _celu(call: Call, _: fx.Node) -> float | None:
    return 1.0 if call.given("alpha", 1, 1.0) > 0 else None


def _softplus(call: Call, _: fx.Node) -> float | None:
    """1; where it goes over to the identity it steps by log(1 + e^−threshold)/β, 2e-9 for 20."""
    return 1.0 if call.given("threshold", 2, 20.0) >= 20 else None


def _dropout(call: Call, _: fx.Node) -> float | None:
    """1 in evaluation; as a function it may drop there too."""
    return 1.0 if call.module is not None or call.given("training", 2, True) is False else None


def _log_softmax(call: Call, _: fx.Node) -> float | None:
    """√n: the derivative I − 1pᵀ is a projection, as long as 1pᵀ, and ‖p‖ ≤ 1."""
    axis = call.given("dim", 1)
    return math.sqrt(call.value.shape[axis]) if isinstance(axis, int) else None


def _batch_norm(call: Call, _: fx.Node) -> float | None:
    """max |γ/σ|, with running statistics."""
    norm = call.module
    if norm is None or norm.running_var is None:
        return None
    scale = 1.0 if norm.weight is None else norm.weight.detach().double()
    return float((scale / (norm.running_var.double() + norm.eps).sqrt()).abs().max())


def _product(call: Call, operand: fx.Node) -> float | None:
    """The largest |c|, or 1/|c| of divisors."""
    factors, divided = [arg for arg in call.node.args if arg is not operand], "div" in call.operation
    if len(factors) != 1 or call.node.kwargs or (divided and call.node.args[0] is not operand):
        return None
    c = torch.as_tensor(call.run.env[factors[0]] if isinstance(factors[0], fx.Node) else factors[0]).detach().abs()
    return float((1 / c.double() if divided else c.double()).max()) * repeats(call, operand)


def _matrix(call: Call, operand: fx.Node) -> float | None:
    """‖W‖₂ of x W or x Wᵀ."""
    args, _ = call.again()
    return spectral_norm(args[1]) if call.node.args[0] is operand and len(args) > 1 and args[1].dim() == 2 else None


def _weight_norm(call: Call, operand: fx.Node) -> float:
    """The operator norm of a layer."""
    convolution = hasattr(call.module, "kernel_size")
    return convolution_norm(call.module, call.run.env[operand]) if convolution else spectral_norm(call.module.weight)


_SLOPES = {
    **dict.fromkeys(SAME | CLAMPS, 1.0),
    **dict.fromkeys(("abs", "clampmax", "hardtanh", "logsigmoid", "neg", "relu", "relu6"), 1.0),
    **dict.fromkeys(("softshrink", "softsign", "tanh", "tanhshrink"), 1.0),
    **dict.fromkeys(("softmax", "softmax2d", "softmin"), 1 / 2),  # rows of diag p − ppᵀ: 2p(1 − p) (Gershgorin)
    "gelu": 1.12900,  # numerically, like silu and mish; for both approximations
    "hardsigmoid": 0.16666668,  # torch's 1/6 is single
    "hardswish": 3 / 2,
    "mish": 1.08850,
    "selu": 1.0507009873554805 * 1.6732632423543772,
    "sigmoid": 1 / 4,
    "silu": 1.09984,
}  # the largest slopes

_RULES: dict[str, _Rule] = {
    **{name: _elementwise(slope) for name, slope in _SLOPES.items()},
    **dict.fromkeys(DROPOUTS, _dropout),
    **dict.fromkeys(MOVES | MEANS, nonnegative),
    **dict.fromkeys(MAX_POOLS, max_pool),
    **dict.fromkeys((kind.__name__.lower() for kind in NORMS), _batch_norm),
    **dict.fromkeys(("div", "divide", "imul", "itruediv", "mul", "multiply", "truediv"), _product),
    "celu": _celu,
    "elu": _sloped("alpha", 1.0),
    "leakyrelu": _sloped("negative_slope", 0.01),
    "linear": _matrix,
    "logsoftmax": _log_softmax,
    "matmul": _matrix,
    "prelu": _prelu,
    "softplus": _softplus,
}
