"""Lipschitz constants of operations in the Euclidean norm, for the inputs that they have in a traced forward.

Operations go by the names that ``convexprune.network.graph.operation_of`` gives them; operator norms of convolutions
are taken in the Fourier basis (docs/networks.md).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from convexprune.layers.kinds import ATTENTION, NORMS, Raw
from convexprune.layers.memory import tensors_in
from convexprune.layers.support import kind_of
from convexprune.network.graph import operation_of

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_DENSE = 4096  # the smaller dimension of the largest matrix to decompose
_OVERSAMPLING = 16  # frequencies for each degree of a convolution's symbol
_EFFORT = 3e10  # frequencies times size³: half a minute


def spectral_norm(A: Tensor) -> float:
    """The largest ‖A‖₂ of matrices [..., m, n]; ‖A‖_F if they are too large to decompose."""
    A = A.detach().to(torch.complex128 if A.is_complex() else torch.float64)
    if min(A.shape[-2:]) > _DENSE:
        return float(torch.linalg.matrix_norm(A).max())
    gram = A @ A.mH if A.shape[-2] <= A.shape[-1] else A.mH @ A
    return float(torch.linalg.eigvalsh(gram)[..., -1].max().clamp(min=0).sqrt())


def convolution_norm(conv: Convolution, x: Tensor) -> float:
    """A bound on the operator norm: that of the periodic convolution of which it is a part.

    A stride makes channels of the phases. Of an axis with period n and taps 0 to d, N < n frequencies miss at most
    √(1/cos(πd/N)) of the maximum. Too large ones are bounded by √overlap·‖U‖₂ (docs/networks.md).
    """
    weight = conv.weight.detach().double()
    W = weight.reshape(conv.groups, -1, *weight.shape[1:])  # [groups, outputs, inputs, *kernel]
    grid: list[int] = []
    missed = 1.0
    for axis, (stride, dilation) in enumerate(zip(conv.stride, conv.dilation, strict=True)):
        W = W if stride == 1 else _phases(W, 3 + axis, stride, dilation)
        padded = x.shape[axis - len(conv.kernel_size)] + _padding(conv, axis)
        period, degree = -(-padded // stride), W.shape[3 + axis] - 1
        grid.append(min(period, max(1, _OVERSAMPLING * degree)))
        if degree and grid[-1] < period:
            missed /= math.cos(math.pi * degree / grid[-1])
    if math.prod(grid) * conv.groups * min(W.shape[1:3]) ** 3 > _EFFORT:
        uses = math.prod(map(overlap, conv.kernel_size, conv.stride, conv.dilation))
        return math.sqrt(uses * _copies(conv, x)) * spectral_norm(W.flatten(2))
    return math.sqrt(missed * _copies(conv, x)) * _symbol_norm(W, grid)


def _symbol_norm(W: Tensor, grid: list[int]) -> float:
    """max ‖Σ_j W_j e^{−iωj}‖₂ over a grid of frequencies, for W [groups, outputs, inputs, *taps]."""
    halved = (n // 2 + 1 if axis == 0 else n for axis, n in enumerate(grid))  # −ω gives the conjugate
    scaled = [2 * math.pi / n * torch.arange(count) for n, count in zip(grid, halved, strict=True)]
    frequencies = torch.cartesian_prod(*(angles.double() for angles in scaled)).reshape(-1, len(grid))
    taps = torch.cartesian_prod(*(torch.arange(size).double() for size in W.shape[3:])).reshape(-1, len(grid))
    waves = torch.exp(-1j * (frequencies @ taps.T)).to(W.device)
    flat = W.flatten(3).to(waves.dtype)
    step = max(1, 2**22 // math.prod(W.shape[:3]))
    parts = (waves[first : first + step] for first in range(0, len(waves), step))
    return max(spectral_norm((flat @ part.T).movedim(-1, 0)) for part in parts)


def _phases(W: Tensor, axis: int, stride: int, dilation: int) -> Tensor:
    """Taps by their remainder modulo the stride, as channels."""
    shape, taps = list(W.shape), W.shape[axis]
    length = -(-((taps - 1) * dilation + 1) // stride)
    shape[axis] = length * stride
    places = torch.arange(taps, device=W.device) * dilation
    spread = W.new_zeros(shape).index_copy(axis, places, W)
    return spread.reshape(*shape[:axis], length, stride, *shape[axis + 1 :]).movedim(axis + 1, 3).flatten(2, 3)


def _padding(conv: Convolution, axis: int) -> int:
    """Entries that zeros, or others, add along an axis."""
    if isinstance(conv.padding, str):
        return conv.dilation[axis] * (conv.kernel_size[axis] - 1) if conv.padding == "same" else 0
    return 2 * conv.padding[axis]


def _copies(conv: Convolution, x: Tensor) -> int:
    """How often padding that is not zero repeats an entry, at most."""
    if conv.padding_mode == "zeros":
        return 1
    shape = x.shape[-len(conv.kernel_size) :]
    entries = torch.arange(shape.numel(), dtype=torch.float64).reshape(1, 1, *shape)
    padded = functional.pad(entries, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
    return int(padded.long().flatten().bincount().max())


def overlap(size: int, stride: int, dilation: int) -> int:
    """The most windows that an entry can lie in: its places in them differ by multiples of stride/gcd."""
    return -(-size * math.gcd(stride, dilation) // stride)


def is_product(module: nn.Module | None) -> bool:
    """Whether its output is one matrix product of its input, so that their norms say all."""
    kind = None if module is None else kind_of(module)
    return kind is not None and kind is not ATTENTION


def _names(text: str, each_rank: str = "") -> frozenset[str]:
    """The names, and others for one to three axes."""
    return frozenset(text.split()) | {f"{kind}{axes}d" for kind in each_rank.split() for axes in (1, 2, 3)}


SAME = _names("clone contiguous detach double float identity")
DROPOUTS = _names("alphadropout dropout featurealphadropout", "dropout")
MOVES = _names(
    "channelshuffle chunk expand flatten flip getitem moveaxis movedim narrow pad permute pixelshuffle pixelunshuffle "
    "ravel repeat reshape roll select split squeeze swapaxes swapdims t tile transpose unbind unflatten unsqueeze view",
    "circularpad constantpad reflectionpad replicationpad zeropad",
)
MEANS = _names("mean sum", "avgpool adaptiveavgpool")
MAX_POOLS = _names("", "maxpool adaptivemaxpool")
CLAMPS = _names("clamp clampmin clip")
SUMS = _names("add iadd isub sub subtract")
CONCATENATIONS = _names("cat concat concatenate dstack hstack stack vstack")
LENGTHS = _names("device dim dtype ndim numel shape size")


@dataclass(frozen=True, eq=False)
class Call:
    """An operation in a traced forward, and its value on the batch; ``name`` is its module's."""

    run: fx.Interpreter
    node: fx.Node
    module: nn.Module | None
    name: str
    value: Raw

    @cached_property
    def operation(self) -> str:
        """The operation's name."""
        return operation_of(self.node, self.module)

    def __str__(self) -> str:
        return self.operation if self.module is None else f"{self.name!r} ({type(self.module).__name__})"

    def argument(self, name: str, position: int, default: object = None) -> Raw:
        """An argument, from the module or the call."""
        if self.module is not None:
            return getattr(self.module, name, default)
        args, kwargs = self.arguments()
        return args[position] if len(args) > position else kwargs.get(name, default)

    def arguments(self, operand: fx.Node | None = None, value: Raw = None) -> Raw:
        """Positional and keyword arguments, with this value in the operand's place."""
        given = (self.node.args, self.node.kwargs)
        return fx.node.map_arg(given, lambda n: value if n is operand else self.run.env[n])

    def recomputed(self, operand: fx.Node, value: Tensor) -> list[Tensor]:
        """The tensors that the operation gives for another operand."""
        return list(tensors_in(getattr(self.run, self.node.op)(self.node.target, *self.arguments(operand, value))))

    def repeats(self, operand: fx.Node) -> float:
        """How much broadcasting lengthens the operand."""
        return math.sqrt(self.value.numel() / self.run.env[operand].numel())


_Rule = Callable[[Call, fx.Node], float | None]


def constant(call: Call, operand: fx.Node) -> float | None:
    """What the operation multiplies an error of the operand by at most; None where nothing is known."""
    if any(isinstance(tensor, Tensor) and not tensor.numel() for tensor in (call.value, call.run.env[operand])):
        return 0.0  # what has no entries has no error
    rule = _weight_norm if is_product(call.module) else _RULES.get(call.operation)
    found = rule * call.repeats(operand) if isinstance(rule, float) else None if rule is None else rule(call, operand)
    return found if found is not None and math.isfinite(found) else None


def _log_softmax(call: Call, _: fx.Node) -> float | None:
    """√n: the derivative I − 1pᵀ is a projection, as long as 1pᵀ, and ‖p‖ ≤ 1."""
    axis = call.argument("dim", 1)
    return math.sqrt(call.value.shape[axis]) if isinstance(axis, int) else None


def _batch_norm(call: Call, _: fx.Node) -> float | None:
    """max |γ/σ|, with running statistics."""
    norm = call.module
    if not isinstance(norm, NORMS) or norm.running_var is None:
        return None
    scale = 1.0 if norm.weight is None else norm.weight.detach().double()
    return float((scale / (norm.running_var.double() + norm.eps).sqrt()).abs().max())


def _product(call: Call, operand: fx.Node) -> float | None:
    """The largest |c|, or 1/|c| of divisors."""
    factors, divided = [arg for arg in call.node.args if arg is not operand], "div" in call.operation
    if len(factors) != 1 or call.node.kwargs or (divided and call.node.args[0] is not operand):
        return None
    c = torch.as_tensor(call.run.env[factors[0]] if isinstance(factors[0], fx.Node) else factors[0]).detach().abs()
    return float((1 / c.double() if divided else c.double()).max()) * call.repeats(operand)


def _matrix(call: Call, operand: fx.Node) -> float | None:
    """‖W‖₂ of x W or x Wᵀ."""
    args, _ = call.arguments()
    return spectral_norm(args[1]) if call.node.args[0] is operand and len(args) > 1 and args[1].dim() == 2 else None


def _weight_norm(call: Call, operand: fx.Node) -> float:
    if isinstance(call.module, Convolution):
        return convolution_norm(call.module, call.run.env[operand])
    return spectral_norm(call.argument("weight", 1))


def _nonnegative(call: Call, operand: fx.Node) -> float | None:
    """√(largest row sum · largest column sum) of an affine map with entries ≥ 0 (Schur's test): moves and means."""
    x = call.run.env[operand]
    if not isinstance(x, Tensor):
        return 1.0  # a part of several tensors
    with torch.enable_grad():
        ones = torch.ones(x.shape, dtype=torch.float64, device=x.device, requires_grad=True)
        images, shifts = call.recomputed(operand, ones * 1), call.recomputed(operand, torch.zeros_like(ones))
        if any(image.dtype != torch.float64 for image in images):
            return None
        (columns,) = torch.autograd.grad(torch.stack([image.sum() for image in images]).sum(), ones)
    rows = max(float((image - shift).max()) for image, shift in zip(images, shifts, strict=True))
    return math.sqrt(rows * float(columns.max()))


def _max_pool(call: Call, operand: fx.Node) -> float | None:
    """√ of how many windows an entry lies in: a maximum moves no more than the entry that moves most."""
    axes = int(call.operation[-2])
    if not isinstance(call.value, Tensor):
        return None  # with indices, which jump
    if call.operation.startswith("adaptive"):
        shapes = (tensor.shape[-axes:] for tensor in (call.run.env[operand], call.value))
        return math.sqrt(math.prod(map(_adaptive_overlap, *shapes)))

    size = call.argument("kernel_size", 1)
    values = (size, call.argument("stride", 2) or size, call.argument("dilation", 4, 1))
    listed = [(value,) if isinstance(value, int) else tuple(value) for value in values]
    return math.sqrt(math.prod(map(overlap, *(value * (axes // len(value)) for value in listed))))


def _adaptive_overlap(inputs: int, outputs: int) -> int:
    """The most windows from ⌊i·n/o⌋ to ⌈(i + 1)·n/o⌉ that an entry can lie in."""
    windows = [range(i * inputs // outputs, -(-(i + 1) * inputs // outputs)) for i in range(outputs)]
    return max(sum(entry in window for window in windows) for entry in range(inputs))


_UNIT_SLOPES = "abs clampmax hardtanh logsigmoid neg relu relu6 softshrink softsign tanh tanhshrink"
_RULES: Mapping[str, _Rule | float] = {  # the largest slope, or a rule
    **dict.fromkeys(SAME | CLAMPS | _names(_UNIT_SLOPES), 1.0),
    **dict.fromkeys(("softmax", "softmax2d", "softmin"), 1 / 2),  # diag p − ppᵀ: 2p(1 − p) (Gershgorin)
    "gelu": 1.12900,  # numerically, like silu and mish; for both approximations
    "hardsigmoid": 0.16666668,  # torch's 1/6 is single
    "hardswish": 3 / 2,
    "mish": 1.08850,
    "selu": 1.0507009873554805 * 1.6732632423543772,
    "sigmoid": 1 / 4,
    "silu": 1.09984,
    # In evaluation; as a function it may drop there too.
    **dict.fromkeys(
        DROPOUTS, lambda c, _: 1.0 if c.module is not None or c.argument("training", 2, True) is False else None
    ),
    **dict.fromkeys(MOVES | MEANS, _nonnegative),
    **dict.fromkeys(MAX_POOLS, _max_pool),
    **dict.fromkeys((kind.__name__.lower() for kind in NORMS), _batch_norm),
    **dict.fromkeys(("div", "divide", "imul", "itruediv", "mul", "multiply", "truediv"), _product),
    **dict.fromkeys(("linear", "matmul"), _matrix),
    "celu": lambda c, _: 1.0 if c.argument("alpha", 1, 1.0) > 0 else None,
    "elu": lambda c, _: max(1.0, abs(c.argument("alpha", 1, 1.0))),
    "leakyrelu": lambda c, _: max(1.0, abs(c.argument("negative_slope", 1, 0.01))),
    "logsoftmax": _log_softmax,
    "prelu": lambda c, _: max(1.0, float(c.argument("weight", 1).abs().max())),
    # Where it goes over to the identity it steps by log(1 + e^−threshold)/β, 2e-9 for 20.
    "softplus": lambda c, _: 1.0 if c.argument("threshold", 2, 20.0) >= 20 else None,
}
