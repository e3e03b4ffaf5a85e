"""What the errors of pruned layers can do to a network's outputs: a bound that is linear in the layers' radii.

An error travels through the traced forward node by node, multiplied by each operation's Lipschitz constant: the
network's promise, ‖f̂(x) − f(x)‖_F ≤ Σ c_l r_l over the calibration data. The mathematics is in docs/networks.md.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from convexprune.capture import Forward, evaluating, run_model
from convexprune.errors import UnsupportedModule
from convexprune.graph import LAYERS, NORMS, operation_of, traced
from convexprune.plan import check_module
from convexprune.solvers.arrays import checked_radius, norm
from convexprune.solvers.errors import InvalidInput
from convexprune.watch import tensors_in

__all__ = ["OutputBound", "PrunedLayer", "output_bound"]


@dataclass(frozen=True)
class PrunedLayer:
    """A pruned layer, and what lies between it and the place where its radius holds.

    Attributes:
        name: Of the module, a Linear, Conv1d, Conv2d or Conv3d; others that share its weights are meant too.
        relu: Whether the radius holds behind the ReLU that follows (fits "relu-ball" and "net-trim").
        norm: Name of the BatchNorm that comes first and is part of the program; its shift may have changed as well.
    """

    name: str
    relu: bool = False
    norm: str | None = None


@dataclass(frozen=True)
class OutputBound:
    """‖f̂(x) − f(x)‖_F ≤ Σ c_l r_l, over all outputs and samples.

    Attributes:
        coefficients: c_l by layer; infinity where nothing is known of what follows the layer.
        norms: The operator norms that were needed, by module.
        reason: Why the first of the infinite coefficients is so.
    """

    coefficients: Mapping[str, float]
    norms: Mapping[str, float]
    reason: str | None

    def at(self, radii: Mapping[str, float]) -> float:
        """Σ c_l r_l for a radius r_l ≥ 0 of every layer; a layer of radius 0 adds nothing.

        Raises:
            InvalidInput: Radii of other layers than the coefficients'.
            InvalidTolerance: A radius that is no number ≥ 0.
        """
        if set(radii) != set(self.coefficients):
            raise InvalidInput(f"radii: expected those of {list(self.coefficients)}, found {list(radii)}")
        checked = {name: checked_radius(f"radius of {name}", radius) for name, radius in radii.items()}
        return math.fsum(c * checked[name] for name, c in self.coefficients.items() if c and checked[name])


def output_bound(
    model: nn.Module,
    layers: Iterable[PrunedLayer],
    batch: Any,
    *,
    mode: str = "parallel",
    forward: Forward | None = None,
    norms: Mapping[str, float] | None = None,
) -> OutputBound:
    """How much each layer's radius counts in the error of the network's outputs, with the weights as they are now.

    With inputs X of the original network, X̂ of the pruned one, and s the norm and ReLU that belong to the layer:

    - "parallel": ‖s(XU) − s(XW)‖_F ≤ r, so behind s the error is at most r + Lip(s)‖U‖₂·‖X̂ − X‖_F;
    - "cascade": ‖s(X̂U) − s(XW)‖_F ≤ r, so behind s the error is at most r, whatever came before.

    In parallel mode a coefficient depends on the weights behind the layer only. The radii are those of all calls and
    samples together. The bound is for exact arithmetic, for samples that do not see each other, and for inputs as
    large as those of the batch. Operator norms are exact for dense matrices up to 4096 in their smaller dimension, and
    Frobenius norms beyond; for convolutions see docs/networks.md.

    Args:
        model: Any network that torch.fx can trace, in evaluation; it is left as found.
        layers: The layers with radii; others are taken as unchanged.
        batch: As ``model`` takes it: a mapping of keyword arguments, a tuple or list of positional ones, else one. One
            sample is enough.
        mode: What the radii mean.
        forward: Called as ``forward(model, batch)``; it must return what the model returns.
        norms: Operator norms of modules unchanged since, from an earlier bound: they are not computed again.

    Raises:
        InvalidInput: No such layer, norm or mode, a layer named twice, or the model cannot be called on the batch.
    """
    listed = list(layers)
    names = [layer.name for layer in listed]
    if mode not in ("parallel", "cascade"):
        raise InvalidInput(f"mode: expected 'parallel' or 'cascade', found {mode!r}")
    if len(set(names)) < len(names):
        raise InvalidInput(f"layers: expected each name once, found {names}")
    pruned = _Pruned(check_module(model), listed, mode == "cascade")
    with evaluating(model):
        call = _observed(model, batch, forward)
        try:
            propagation = _Propagation(model, pruned, norms or {})
        except UnsupportedModule as error:
            return OutputBound(dict.fromkeys(names, math.inf), {}, str(error))
        found = propagation.error_of_outputs(call)
    coefficients = {name: found.coefficients.get(name, 0.0) for name in names}
    reason = found.reason if math.inf in coefficients.values() else None
    return OutputBound(coefficients, propagation.norms, reason)


# --- Errors ---


@dataclass(frozen=True)
class _Error:
    """A bound Σ c_l r_l on a tensor's error.

    Between a layer and the place where its radius holds, ``share`` times this radius is to come, behind ``awaited``.
    """

    coefficients: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    own: str = ""
    share: float = 1.0
    awaited: tuple[Any, ...] = ()  # a norm, then "relu"

    def __bool__(self) -> bool:
        return bool(self.coefficients or self.awaited)

    def times(self, factor: float, reason: str | None = None) -> "_Error":
        """Behind an operation with this Lipschitz constant."""
        scaled = {name: value * factor for name, value in self.coefficients.items()} if factor else {}
        return replace(self, coefficients=scaled, reason=self.reason or reason, share=self.share * factor)

    def past(self, factor: float) -> "_Error":
        """Behind the step that it awaits first: the radius, which holds behind it, is not multiplied."""
        left = replace(self.times(factor), share=self.share, awaited=self.awaited[1:])
        return left if left.awaited else left.arrived()

    def arrived(self) -> "_Error":
        """Where the radius holds."""
        return _summed([_Error(self.coefficients, self.reason), _Error({self.own: self.share})])

    def stranded(self, where: str) -> "_Error":
        """Where what it awaits cannot come any more."""
        if not self.awaited:
            return self
        step = "ReLU" if self.awaited[0] == "relu" else "norm"
        why = f"the radius of {self.own!r} holds behind its {step}, and its outputs reach {where} first"
        return _summed([_Error(self.coefficients, self.reason), _lost([self.own], why)])


def _lost(names: Iterable[str], reason: str) -> _Error:
    return _Error(dict.fromkeys(names, math.inf), reason)


def _combined(errors: Iterable[_Error], norm: Callable[..., float]) -> _Error:
    """Σ (norm of c_l) r_l: by Minkowski's inequality it bounds the norm of Σ c_l r_l."""
    listed = list(errors)
    names = dict.fromkeys(name for error in listed for name in error.coefficients)
    totals = {name: norm(*(error.coefficients.get(name, 0.0) for error in listed)) for name in names}
    return _Error(totals, next((error.reason for error in listed if error.reason), None))


def _summed(errors: Iterable[_Error]) -> _Error:
    return _combined(errors, lambda *values: math.fsum(values))


# --- Through the graph ---


class _Pruned:
    """The pruned layers by module, and the tensors that changed with them."""

    def __init__(self, model: nn.Module, layers: list[PrunedLayer], cascade: bool) -> None:
        self.cascade, self.names = cascade, [layer.name for layer in layers]
        self.errors: list[tuple[nn.Module, _Error]] = []
        self.tensors: dict[int, str] = {}  # the layer's name by address
        for layer in layers:
            changed = [_module(model, layer.name, LAYERS)]
            changed += [] if layer.norm is None else [_module(model, layer.norm, NORMS)]
            awaited = (*changed[1:], *(["relu"] if layer.relu else []))
            self.errors.append((changed[0], _Error(own=layer.name, awaited=awaited)))
            tensors = (tensor for module in changed for tensor in module.parameters() if tensor.numel())
            self.tensors |= {tensor.data_ptr(): layer.name for tensor in tensors}

    def held_by(self, holder: nn.Module | Tensor | None) -> list[str]:
        """The pruned layers with tensors in it."""
        tensors = holder.parameters() if isinstance(holder, nn.Module) else tensors_in(holder)
        return list(dict.fromkeys(self.tensors[t.data_ptr()] for t in tensors if t.data_ptr() in self.tensors))

    def error(self, module: nn.Module | None) -> _Error | None:
        """The error that a pruned layer itself makes; None for other modules."""
        return next((error for layer, error in self.errors if module is layer or _same(module, layer)), None)


def _module(model: nn.Module, name: str, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    module: Any = None
    with suppress(AttributeError):
        module = model.get_submodule(name)
    if not isinstance(module, kinds):
        found = "no such module" if module is None else type(module).__name__
        expected = ", ".join(kind.__name__ for kind in kinds)
        raise InvalidInput(f"{name}: expected the name of one of {expected} in the model, found {found}")
    return module


def _same(one: nn.Module | None, other: nn.Module) -> bool:
    """Whether two layers of a kind share all their parameters."""
    if one is None or type(one) is not type(other):
        return False
    own = [dict(module.named_parameters(recurse=False)) for module in (one, other)]
    places = [{name: (t.data_ptr(), t.shape, t.stride()) for name, t in tensors.items()} for tensors in own]
    return places[0] == places[1] and "weight" in own[0] and own[0]["weight"].numel() > 0


def _observed(model: nn.Module, batch: Any, forward: Forward | None) -> tuple[Any, Any, Any] | None:
    """The arguments and what is returned, of the model's one call; None if the network is more than this call."""
    calls: list[Any] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        # Copies: the forward may work in place.
        calls.append(fx.node.map_aggregate((args, dict(kwargs)), lambda v: v.clone() if isinstance(v, Tensor) else v))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        calls.append(output)

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        outputs = run_model(model, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()
    return (*calls[0], outputs) if len(calls) == 2 and calls[1] is outputs else None


class _Propagation(fx.Interpreter):
    """Runs the graph on a batch, for shapes, and finds the error of each node."""

    def __init__(self, model: nn.Module, pruned: _Pruned, norms: Mapping[str, float]) -> None:
        root = nn.Sequential(model) if isinstance(model, LAYERS) else model  # a leaf has no graph of its own
        super().__init__(root, graph=traced(root))
        self.extra_traceback = False
        self.pruned, self.norms, self.seen = pruned, dict(norms), set[str]()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.errors: dict[fx.Node, _Error] = {}
        self.fixed: set[fx.Node] = set()  # not computed from the data
        self.versions: dict[fx.Node, list[int]] = {}

    def error_of_outputs(self, call: tuple[Any, Any, Any] | None) -> _Error:
        """The error of everything that the network returns."""
        if call is None:
            return _lost(self.pruned.names, "forward= does not return what one call of the model returns")
        args, kwargs, expected = call
        try:
            outputs = self.run(*_arguments(self.module, args, kwargs))
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            return _lost(self.pruned.names, f"the traced forward cannot be run on the batch ({error})")
        if not _agree(outputs, expected):
            return _lost(self.pruned.names, "the traced forward computes something else on the batch")
        found = next(self.errors[node] for node in self.graph.nodes if node.op == "output")
        unseen = [name for name in self.pruned.names if name not in self.seen]
        return _summed([found, _lost(unseen, f"no call of {', '.join(unseen)} is seen")]) if unseen else found

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, once its error is known."""
        stale = any(self.versions[node] != _versions(self.env[node]) for node in n.all_input_nodes)
        value = super().run_node(n)
        module: Any = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        call = _Call(self, n, module, self.names.get(id(module), ""), value)
        self.versions[n] = _versions(value)
        if stale:  # whatever was written into it may be here
            self.errors[n] = _lost(self.pruned.names, f"{call} uses a tensor that was changed in place")
        else:
            self.errors[n] = self._error(call)
        data = n.op == "placeholder" and any(True for _ in tensors_in(value))
        if call.operation in _LENGTHS or (not data and self.fixed.issuperset(n.all_input_nodes)):
            self.fixed.add(n)
        return value

    def _error(self, call: "_Call") -> _Error:
        operands = [] if call.operation in _LENGTHS else [n for n in _nodes(call.node) if self.errors[n]]
        if call.node.op == "output":
            operands = [n for n in operands if any(t.is_floating_point() for t in tensors_in(self.env[n]))]
            return _combined([self.errors[n].stranded("the outputs") for n in operands], math.hypot)
        own = self.pruned.error(call.module)
        if own is not None:
            return self._behind_layer(call, own, operands)
        if len(operands) == 1 and call.continues(self.errors[operands[0]].awaited):
            return self._on_the_way(call, operands[0])
        held = self.pruned.held_by(call.value if call.node.op == "get_attr" else call.module)
        if held:
            why = f"{call} uses parameters of pruned layers elsewhere than where their radii hold"
            return _summed([_lost(held, why), self._behind(call, operands)])
        return self._behind(call, operands)

    def _behind_layer(self, call: "_Call", own: _Error, operands: list[fx.Node]) -> _Error:
        """The layer's own radius is still to come, or comes here; errors before it come in, or were made good."""
        self.seen.add(own.own)
        if fault := _altered(call.module):
            return _summed([_lost([own.own], f"{call} {fault}"), self._behind(call, operands)])
        before = _Error() if self.pruned.cascade else self._behind(call, operands)
        error = replace(own, coefficients=before.coefficients, reason=before.reason)
        return error if error.awaited else error.arrived()

    def _on_the_way(self, call: "_Call", operand: fx.Node) -> _Error:
        """Between a layer and the place where its radius holds."""
        error = self.errors[operand]
        factor, reason = self._lipschitz(call, operand)
        if reason:
            return error.stranded(str(call)).times(factor, reason)
        return error.past(factor) if call.reaches(error.awaited[0]) else error.times(factor)

    def _behind(self, call: "_Call", operands: list[fx.Node]) -> _Error:
        """Behind an operation that adds no error of its own."""
        errors = [self.errors[n].stranded(str(call)) for n in operands]
        if call.operation in _SUMS and isinstance(call.value, Tensor):
            alpha = max(1.0, abs(call.given("alpha", 3, 1)))
            return _summed(e.times(alpha * _repeats(call, n)) for e, n in zip(errors, operands, strict=True))
        total = _combined(errors, math.hypot)
        if not total or call.operation in _CONCATENATIONS:
            return total
        if len(operands) > 1:
            return total.times(math.inf, f"{call} combines computed tensors")
        return total.times(*self._lipschitz(call, operands[0]))

    def _lipschitz(self, call: "_Call", operand: fx.Node) -> tuple[float, str | None]:
        """The operation's constant for this input; infinity and the reason where none is known."""
        if fault := _altered(call.module):
            return math.inf, f"{call} {fault}"
        if not self.fixed.issuperset(n for n in call.node.all_input_nodes if n is not operand):
            return math.inf, f"{call} combines computed tensors"
        layer = isinstance(call.module, LAYERS)
        factor = self.norms.get(call.name) if layer else None
        if factor is None:
            rule = _layer if layer else _RULES.get(call.operation)
            factor = None if rule is None else rule(call, operand)
        if factor is None or not math.isfinite(factor):
            return math.inf, f"{call} is not Lipschitz, or not known to be"
        if layer:
            self.norms[call.name] = factor
        return factor, None


def _arguments(module: nn.Module, args: Any, kwargs: Any) -> list[Any]:
    """The inputs in the order of the graph's, with those that are left to their defaults."""
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    several = {name for name, p in signature.parameters.items() if p.kind is p.VAR_POSITIONAL}
    return [v for name, value in bound.arguments.items() for v in (value if name in several else [value])]


def _agree(one: Any, other: Any) -> bool:
    """Whether the floating-point tensors are the same, up to rounding."""
    listed = [[t for t in tensors_in(tree) if t.is_floating_point()] for tree in (one, other)]
    shapes = [[t.shape for t in tensors] for tensors in listed]
    return shapes[0] == shapes[1] and all(
        float(norm(a - b)) <= 1e-3 * float(norm(b)) for a, b in zip(*listed, strict=True)
    )


def _versions(value: Any) -> list[int]:
    """How often each tensor, or what it is a view of, was written to."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors_in(value)]


def _nodes(node: fx.Node) -> list[fx.Node]:
    """The node's inputs, each as often as it is one."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _altered(module: nn.Module | None) -> str | None:
    """Why a module may compute something else than its kind says."""
    if module is None:
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks, which may change what it takes or returns"
    base: Any = next((kind for kind in LAYERS if isinstance(module, kind)), type(module))
    names = ("forward", "_conv_forward")
    own = any(getattr(type(module), name, None) is not getattr(base, name, None) for name in names)
    return "has a forward of its own" if own or "forward" in vars(module) else None


# --- Lipschitz constants of operations, in the Euclidean norm ---


@dataclass(frozen=True, eq=False)
class _Call:
    """An operation, and its value on the batch."""

    run: fx.Interpreter
    node: fx.Node
    module: Any
    name: str  # of the module
    value: Any

    @cached_property
    def operation(self) -> str:
        """Its name."""
        return operation_of(self.node, self.module)

    def __str__(self) -> str:
        return self.operation if self.module is None else f"{self.name!r} ({type(self.module).__name__})"

    def reaches(self, step: Any) -> bool:
        """Whether it is the norm, or the ReLU."""
        if step != "relu" or self.operation not in _CLAMPS:
            return step is self.module or self.operation == step
        return self.given("min", 1) == 0 and self.given("max", 2) is None

    def continues(self, awaited: tuple[Any, ...]) -> bool:
        """Whether it is the step that is awaited first, or may be exchanged with it."""
        relu = bool(awaited) and awaited[0] == "relu"
        exchanged = self.operation in _SAME | _DROPOUTS | _MOVES or (relu and self.operation in _MAX_POOLS)
        return bool(awaited) and (exchanged or self.reaches(awaited[0]))

    def given(self, name: str, position: int, default: Any = None) -> Any:
        """An argument, from the module or the call."""
        if self.module is not None:
            return getattr(self.module, name, default)
        args, kwargs = self.again()
        return args[position] if len(args) > position else kwargs.get(name, default)

    def again(self, operand: fx.Node | None = None, instead: Any = None) -> tuple[Any, Any]:
        """Arguments, with another value in the operand's place."""
        found: Any = fx.node.map_arg(
            (self.node.args, self.node.kwargs), lambda n: instead if n is operand else self.run.env[n]
        )
        return found[0], found[1]

    def recomputed(self, operand: fx.Node, instead: Tensor) -> Any:
        """The operation's value with another operand."""
        args, kwargs = self.again(operand, instead)
        return getattr(self.run, self.node.op)(self.node.target, args, kwargs)


_Rule = Callable[[_Call, fx.Node], float | None]


def _repeats(call: _Call, operand: fx.Node) -> float:
    """How much broadcasting lengthens the operand."""
    return math.sqrt(call.value.numel() / call.run.env[operand].numel())


def _elementwise(constant: float) -> _Rule:
    return lambda call, operand: constant * _repeats(call, operand)


def _sloped(name: str, default: float) -> _Rule:
    """Slope 1 on one side, at most this parameter on the other."""
    return lambda call, _: max(1.0, abs(call.given(name, 1, default)))


def _prelu(call: _Call, _: fx.Node) -> float:
    return max(1.0, float(call.given("weight", 1).abs().max()))


def _celu(call: _Call, _: fx.Node) -> float | None:
    return 1.0 if call.given("alpha", 1, 1.0) > 0 else None


def _softplus(call: _Call, _: fx.Node) -> float | None:
    """1; where it goes over to the identity it steps by log(1 + e^−threshold)/β, 2e-9 for 20."""
    return 1.0 if call.given("threshold", 2, 20.0) >= 20 else None


def _dropout(call: _Call, _: fx.Node) -> float | None:
    """1 in evaluation; as a function it may drop there too."""
    return 1.0 if call.module is not None or call.given("training", 2, True) is False else None


def _log_softmax(call: _Call, _: fx.Node) -> float | None:
    """√n: the derivative I − 1pᵀ is a projection, as long as 1pᵀ, and ‖p‖ ≤ 1."""
    axis = call.given("dim", 1)
    return math.sqrt(call.value.shape[axis]) if isinstance(axis, int) else None


def _batch_norm(call: _Call, _: fx.Node) -> float | None:
    """max |γ/σ|, with running statistics."""
    norm = call.module
    if norm is None or norm.running_var is None:
        return None
    scale = 1.0 if norm.weight is None else norm.weight.detach().double()
    return float((scale / (norm.running_var.double() + norm.eps).sqrt()).abs().max())


def _product(call: _Call, operand: fx.Node) -> float | None:
    """The largest |c|, or 1/|c| of divisors."""
    factors, divided = [arg for arg in call.node.args if arg is not operand], "div" in call.operation
    if len(factors) != 1 or call.node.kwargs or (divided and call.node.args[0] is not operand):
        return None
    c = torch.as_tensor(call.run.env[factors[0]] if isinstance(factors[0], fx.Node) else factors[0]).detach().abs()
    return float((1 / c.double() if divided else c.double()).max()) * _repeats(call, operand)


def _matrix(call: _Call, operand: fx.Node) -> float | None:
    """‖W‖₂ of x W or x Wᵀ."""
    args, _ = call.again()
    return _spectral_norm(args[1]) if call.node.args[0] is operand and len(args) > 1 and args[1].dim() == 2 else None


def _layer(call: _Call, operand: fx.Node) -> float:
    """The operator norm."""
    linear = isinstance(call.module, nn.Linear)
    return _spectral_norm(call.module.weight) if linear else _convolution_norm(call.module, call.run.env[operand])


def _nonnegative(call: _Call, operand: fx.Node) -> float | None:
    """√(largest row sum · largest column sum) of an affine map with entries ≥ 0 (Schur's test)."""
    x = call.run.env[operand]
    if not isinstance(x, Tensor):
        return 1.0  # a part of several tensors
    with torch.enable_grad():
        ones = torch.ones(x.shape, dtype=torch.float64, device=x.device, requires_grad=True)
        images = list(tensors_in(call.recomputed(operand, ones * 1)))
        shifts = list(tensors_in(call.recomputed(operand, torch.zeros_like(ones))))
        if any(image.dtype != torch.float64 for image in images):
            return None
        (columns,) = torch.autograd.grad(torch.stack([image.sum() for image in images]).sum(), ones)
    rows = max(float((image - shift).max()) for image, shift in zip(images, shifts, strict=True))
    return math.sqrt(rows * float(columns.max()))


def _max_pool(call: _Call, operand: fx.Node) -> float | None:
    """√ of how many windows an entry lies in: a maximum moves no more than the entry that moves most."""
    axes = int(call.operation[-2])
    if not isinstance(call.value, Tensor):
        return None  # with indices, which jump
    x = call.run.env[operand]
    if call.operation.startswith("adaptive"):
        return math.sqrt(math.prod(map(_adaptive_uses, x.shape[-axes:], call.value.shape[-axes:])))
    size = _each(call.given("kernel_size", 1), axes)
    stride = _each(call.given("stride", 2) or size, axes)
    return math.sqrt(math.prod(map(_uses, size, stride, _each(call.given("dilation", 4, 1), axes))))


def _each(value: Any, axes: int) -> tuple[int, ...]:
    listed = (value,) if isinstance(value, int) else tuple(value)
    return listed * (axes // len(listed))


def _uses(size: int, stride: int, dilation: int) -> int:
    """The most windows that an entry can lie in: its places in them differ by multiples of stride/gcd."""
    return -(-size * math.gcd(stride, dilation) // stride)


def _adaptive_uses(inputs: int, outputs: int) -> int:
    """Likewise, of windows from ⌊i·n/o⌋ to ⌈(i + 1)·n/o⌉."""
    windows = [range(i * inputs // outputs, -(-(i + 1) * inputs // outputs)) for i in range(outputs)]
    return max(sum(entry in window for window in windows) for entry in range(inputs))


def _names(text: str) -> set[str]:
    return set(text.split())


_SAME = _names("clone contiguous detach double float identity")
_DROPOUTS = _names("alphadropout dropout dropout1d dropout2d dropout3d featurealphadropout")
_PADS = {f"{kind}pad{axes}d" for kind in _names("circular constant reflection replication zero") for axes in (1, 2, 3)}
_MOVES = _PADS | _names(
    "channelshuffle chunk expand flatten flip getitem moveaxis movedim narrow pad permute pixelshuffle pixelunshuffle "
    "ravel repeat reshape roll select split squeeze swapaxes swapdims t tile transpose unbind unflatten unsqueeze view"
)
_MEANS = {"mean", "sum", *(f"{kind}avgpool{axes}d" for kind in ("", "adaptive") for axes in (1, 2, 3))}
_MAX_POOLS = {f"{kind}maxpool{axes}d" for kind in ("", "adaptive") for axes in (1, 2, 3)}
_CLAMPS = {"clamp", "clampmin", "clip"}
_SUMS = {"add", "iadd", "isub", "sub", "subtract"}
_CONCATENATIONS = {"cat", "concat", "concatenate", "dstack", "hstack", "stack", "vstack"}
_LENGTHS = {"device", "dim", "dtype", "ndim", "numel", "shape", "size"}

_SLOPES = {
    **dict.fromkeys(_SAME | _CLAMPS | {"abs", "clampmax", "neg"}, 1.0),
    **dict.fromkeys(_names("hardtanh logsigmoid relu relu6 softshrink softsign tanh tanhshrink"), 1.0),
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
    **dict.fromkeys(_DROPOUTS, _dropout),
    **dict.fromkeys(_MOVES | _MEANS, _nonnegative),
    **dict.fromkeys(_MAX_POOLS, _max_pool),
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

# --- Operator norms ---

_DENSE = 4096  # the smaller dimension of the largest matrix to decompose
_OVERSAMPLING = 16  # frequencies for each degree of a convolution's symbol
_EFFORT = 3e10  # frequencies times size³: half a minute


def _spectral_norm(A: Tensor) -> float:
    """The largest ‖A‖₂ of matrices [..., m, n]; ‖A‖_F if they are too large to decompose."""
    A = A.detach().to(torch.complex128 if A.is_complex() else torch.float64)
    if min(A.shape[-2:]) > _DENSE:
        return float(torch.linalg.matrix_norm(A).max())
    gram = A @ A.mH if A.shape[-2] <= A.shape[-1] else A.mH @ A
    return float(torch.linalg.eigvalsh(gram)[..., -1].max().clamp(min=0).sqrt())


def _convolution_norm(conv: Any, x: Tensor) -> float:
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
        period, degree = -(-_padded(conv, axis, x) // stride), W.shape[3 + axis] - 1
        grid.append(min(period, max(1, _OVERSAMPLING * degree)))
        if degree and grid[-1] < period:
            missed /= math.cos(math.pi * degree / grid[-1])
    if math.prod(grid) * conv.groups * min(W.shape[1:3]) ** 3 > _EFFORT:
        overlap = math.prod(map(_uses, conv.kernel_size, conv.stride, conv.dilation))
        return math.sqrt(overlap * _copies(conv, x)) * _spectral_norm(W.flatten(2))
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
    return max(_spectral_norm((flat @ part.T).movedim(-1, 0)) for part in parts)


def _phases(W: Tensor, axis: int, stride: int, dilation: int) -> Tensor:
    """Taps by their remainder modulo the stride, as channels."""
    shape, taps = list(W.shape), W.shape[axis]
    length = -(-((taps - 1) * dilation + 1) // stride)
    shape[axis] = length * stride
    places = torch.arange(taps, device=W.device) * dilation
    spread = W.new_zeros(shape).index_copy(axis, places, W)
    return spread.reshape(*shape[:axis], length, stride, *shape[axis + 1 :]).movedim(axis + 1, 3).flatten(2, 3)


def _padding(conv: Any, axis: int) -> tuple[int, int]:
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        return total // 2, total - total // 2
    return conv.padding[axis], conv.padding[axis]


def _padded(conv: Any, axis: int, x: Tensor) -> int:
    return int(x.shape[axis - len(conv.kernel_size)]) + sum(_padding(conv, axis))


def _copies(conv: Any, x: Tensor) -> int:
    """How often padding that is not zero repeats an entry, at most."""
    if conv.padding_mode == "zeros":
        return 1
    copies = 1
    for axis, size in enumerate(x.shape[-len(conv.kernel_size) :]):
        entries = torch.arange(size, dtype=torch.float64)[None, None]
        padded = functional.pad(entries, _padding(conv, axis), mode=conv.padding_mode)
        copies *= int(padded.long().flatten().bincount().max())
    return copies
