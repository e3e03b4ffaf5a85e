"""A bound on the error of a network's outputs that is linear in the radii of its pruned layers.

Errors travel through the traced forward node by node; the model's own call on the batch says whether the trace is true.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor, fx, nn

from convexprune.bounds import rules
from convexprune.errors import UnsupportedModule
from convexprune.files.texts import Json
from convexprune.layers.kinds import NORMS, Raw
from convexprune.layers.memory import Holders, place_of, tensors_in
from convexprune.layers.support import altered, kind_of
from convexprune.network.forwards import Forward, check_module, evaluating, left_as_found, run_model
from convexprune.network.graph import traced
from convexprune.solvers.arrays import checked_radius, norm
from convexprune.solvers.errors import InvalidInput


@dataclass(frozen=True)
class PrunedLayer:
    """A pruned layer, and what lies between it and the place where its radius holds.

    Attributes:
        name: Of a module that can be pruned, and of those that share its weights. For one that is only used inside
            another, and for a MultiheadAttention, no bound is known.
        relu: Whether the radius holds behind the ReLU that follows (fits "relu-ball" and "net-trim").
        norm: Name of the BatchNorm that comes first and is part of the program; its shift may have changed as well.
    """

    name: str
    relu: bool = False
    norm: str | None = None


_Steps = tuple[nn.Module | str, ...]
"""What is still to come before the place where a layer's radius holds: a norm, then "relu"."""


@dataclass(frozen=True)
class _TensorError:
    """A bound Σ c_l r_l on a tensor's error: c_l by layer l and the steps behind which its radius r_l counts c_l times.

    ``reason`` says why the first of the infinite coefficients is so.
    """

    terms: Mapping[tuple[str, _Steps], float] = field(default_factory=dict)
    reason: str | None = None

    def behind(self, call: rules.Call, constant: float = 1.0, reason: str | None = None) -> "_TensorError":
        """Behind an operation with this Lipschitz constant, which is infinite for the reason given, if there is one."""
        terms: dict[tuple[str, _Steps], float] = {}
        early: str | None = None
        for (layer, steps), c in self.terms.items():
            key, value = (layer, steps), c * constant if constant else 0.0
            if steps and not reason and _is_step(steps[0], call):  # it does not multiply a radius that holds behind it
                key, value = (layer, steps[1:]), c
            elif steps and (reason or not _is_exchanged(steps[0], call)):  # they cannot come any more
                step = "ReLU" if steps[0] == "relu" else "norm"
                where = "the outputs" if call.node.op == "output" else str(call)
                early = f"the radius of {layer!r} holds behind its {step}, and its outputs reach {where} first"
                key, value = (layer, ()), math.inf
            if value:
                terms[key] = terms.get(key, 0.0) + value
        return _TensorError(terms, self.reason or early or (reason if self.terms else None))


def _unbounded(names: Iterable[str], reason: str) -> _TensorError:
    return _TensorError({(name, ()): math.inf for name in names}, reason)


def _combined(
    errors: Iterable[_TensorError], norm: Callable[..., float] = lambda *values: math.fsum(values)
) -> _TensorError:
    """Σ (norm of c_l) r_l: by Minkowski's inequality it bounds the norm of Σ c_l r_l."""
    listed = list(errors)
    keys = dict.fromkeys(key for error in listed for key in error.terms)
    totals = {key: norm(*(error.terms.get(key, 0.0) for error in listed)) for key in keys}
    return _TensorError(totals, next((error.reason for error in listed if error.reason), None))


class _PrunedWeights:
    """The pruned layers by module, and the tensors that changed with them."""

    def __init__(self, model: nn.Module, layers: list[PrunedLayer]) -> None:
        self.names = [layer.name for layer in layers]
        self.layers: dict[Hashable, tuple[str, _Steps]] = {}  # those whose radii are known to hold somewhere
        changed: list[tuple[Tensor, str]] = []
        for layer in layers:
            module = _module(model, layer.name, "a module that can be pruned", lambda m: kind_of(m) is not None)
            named = [] if layer.norm is None else [layer.norm]
            norms = [_module(model, name, "a BatchNorm", lambda m: isinstance(m, NORMS)) for name in named]
            if rules.is_product(module):
                self.layers.setdefault(
                    _identity(module), (layer.name, (*norms, "relu") if layer.relu else tuple(norms))
                )
            changed += [(tensor, layer.name) for part in (module, *norms) for tensor in part.parameters()]
        self.holders = Holders(changed)
        tensors = (tensor for module in model.modules() for tensor in tensors_in(vars(module)))
        # What a forward computes of these is not in its graph.
        self.aliased = self.owners(tensor for tensor in tensors if not isinstance(tensor, nn.Parameter))

    def owners(self, tensors: Iterable[Tensor]) -> list[str]:
        """The pruned layers with weights in these tensors, or parts of them."""
        return list(dict.fromkeys(name for tensor in tensors for name in self.holders.of(tensor)))


def _module(model: nn.Module, name: str, expected: str, fits: Callable[[nn.Module], bool]) -> nn.Module:
    module: nn.Module | None = dict(model.named_modules(remove_duplicate=False)).get(name)
    if module is None or not fits(module):
        found = "no such module" if module is None else type(module).__name__
        raise InvalidInput(f"{name}: expected the name of {expected} in the model, found {found}")
    return module


def _identity(module: nn.Module) -> Hashable:
    """The same for two layers of a kind that share all their parameters."""
    return type(module), *((name, place_of(own)) for name, own in module.named_parameters(recurse=False))


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
        """Σ c_l r_l for a radius r_l ≥ 0 of every layer; one of radius 0 is taken as unchanged, and adds nothing.

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
    batch: object,
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
    large as those of the batch (docs/networks.md).

    Args:
        model: A network that torch.fx can trace, in evaluation; it is left as found.
        layers: The layers with radii; others are taken as unchanged.
        batch: A mapping of keyword arguments, a tuple or list of positional ones, else one; one sample is enough.
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
    pruned = _PrunedWeights(check_module(model), listed)
    with evaluating(model), left_as_found(model):
        call = _model_call(model, batch, forward)
        try:
            propagation = _Propagation(model, pruned, mode == "cascade", norms or {})
        except UnsupportedModule as error:
            return OutputBound(dict.fromkeys(names, math.inf), {}, str(error))
        found = propagation.error_of_outputs(call)
    coefficients = {name: found.terms.get((name, ()), 0.0) for name in names}
    reason = found.reason if math.inf in coefficients.values() else None
    return OutputBound(coefficients, propagation.norms, reason)


def _model_call(model: nn.Module, batch: object, forward: Forward | None) -> tuple[Raw, Json, object] | None:
    """The arguments and outputs of the model's one call; None if the network is more than this call."""
    calls: list[Raw] = []
    returned: list[object] = []

    def before(_: nn.Module, *arguments: Raw) -> None:
        # Copies: the forward may work in place.
        calls.append(fx.node.map_aggregate(arguments, lambda v: v.clone() if isinstance(v, Tensor) else v))

    with (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(lambda _module, _args, output: returned.append(output)),
    ):
        outputs = run_model(model, batch, forward)
    return (*calls[0], outputs) if len(calls) == len(returned) == 1 and returned[0] is outputs else None


def _agree(one: object, other: object) -> bool:
    """Whether the floating-point tensors are the same, up to rounding."""
    found, expected = ([t for t in tensors_in(tree) if t.is_floating_point()] for tree in (one, other))
    same = [t.shape for t in found] == [t.shape for t in expected]
    return same and all(float(norm(a - b)) <= 1e-3 * float(norm(b)) for a, b in zip(found, expected, strict=True))


class _Propagation(fx.Interpreter):
    """Runs the graph on a batch, for shapes, and finds the error of each node."""

    def __init__(self, model: nn.Module, pruned: _PrunedWeights, cascade: bool, norms: Mapping[str, float]) -> None:
        root = nn.Sequential(model) if rules.is_product(model) else model  # a layer has no graph of its own
        graph, self.constants = traced(root)
        super().__init__(root, graph=graph)
        self.extra_traceback = False
        self.pruned, self.cascade, self.norms, self.seen = pruned, cascade, dict(norms), set[str]()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.errors: dict[fx.Node, _TensorError] = {}
        self.fixed: set[fx.Node] = set()  # not computed from the data
        self.versions: dict[fx.Node, list[int]] = {}
        self.began = {node: _versions(self._held(node)) for node in graph.nodes}

    def error_of_outputs(self, call: tuple[Raw, Json, object] | None) -> _TensorError:
        """The error of everything that the network returns."""
        names = self.pruned.names
        if call is None:
            return _unbounded(names, "forward= does not return what one call of the model returns")
        args, kwargs, expected = call
        signature = inspect.signature(self.module.forward)
        several = {name for name, p in signature.parameters.items() if p.kind is p.VAR_POSITIONAL}
        try:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            inputs = [v for name, value in bound.arguments.items() for v in (value if name in several else [value])]
            outputs = self.run(*inputs)
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            return _unbounded(names, f"the traced forward cannot be run on the batch ({error})")
        if not _agree(outputs, expected):
            return _unbounded(names, "the traced forward computes something else on the batch")
        errors = [next(self.errors[node] for node in self.graph.nodes if node.op == "output")]
        if unseen := [name for name in names if name not in self.seen]:
            errors.append(_unbounded(unseen, f"no call of {', '.join(unseen)} is seen"))
        if aliased := self.pruned.aliased:
            why = f"weights of {', '.join(aliased)} are also in a tensor that is no parameter"
            errors.append(_unbounded(aliased, why))
        return _combined(errors)

    def fetch_attr(self, target: str) -> Raw:
        """The module or tensor of this name; tensors that the forward creates are kept beside the model."""
        return self.constants[target] if target in self.constants else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> object:
        """The node's value, once its error is known."""
        stale = self.began[n] != _versions(self._held(n))
        stale |= any(self.versions[node] != _versions(self.env[node]) for node in n.all_input_nodes)
        value = super().run_node(n)
        module: nn.Module | None = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        call = rules.Call(self, n, module, self.names.get(id(module), ""), value)
        self.versions[n] = _versions(value)
        changed = f"{call} uses a tensor that was changed in place"  # whatever was written into it may be here
        self.errors[n] = _unbounded(self.pruned.names, changed) if stale else self._error(call)
        data = n.op == "placeholder" and any(True for _ in tensors_in(value))
        if call.operation in rules.LENGTHS or (not data and self.fixed.issuperset(n.all_input_nodes)):
            self.fixed.add(n)
        return value

    def _held(self, node: fx.Node) -> list[object]:
        """The model's own tensors that a node uses."""
        held = self.fetch_attr(str(node.target)) if node.op in ("call_module", "get_attr") else None
        return [*held.parameters(), *held.buffers()] if isinstance(held, nn.Module) else [held]

    def _error(self, call: rules.Call) -> _TensorError:
        inputs: list[fx.Node] = []  # each as often as it is one
        fx.node.map_arg((call.node.args, call.node.kwargs), inputs.append)
        operands = [] if call.operation in rules.LENGTHS else [n for n in inputs if self.errors[n].terms]
        if call.node.op == "output":
            operands = [n for n in operands if any(t.is_floating_point() for t in tensors_in(self.env[n]))]
            return _combined([self.errors[n].behind(call) for n in operands], math.hypot)
        module = call.module
        layer = None if module is None else self.pruned.layers.get(_identity(module))
        if module is not None and layer is not None:  # its radius holds here, or behind the steps
            self.seen.add(layer[0])
            fault = altered(module)
            own = _unbounded([layer[0]], f"{call} {fault}") if fault else _TensorError({layer: 1.0})
            return own if self.cascade and not fault else _combined([own, self._behind(call, operands)])
        behind = self._behind(call, operands)
        if any(_is_step(steps[0], call) for n in operands for _, steps in self.errors[n].terms if steps):
            return behind  # a norm whose parameters belong to the layer before it
        parameters = [] if module is None else chain(module.parameters(), module.buffers())
        held = self.pruned.owners(tensors_in(call.value) if call.node.op == "get_attr" else parameters)
        self.seen.update(held)
        why = f"{call} uses parameters of pruned layers elsewhere than where their radii hold"
        if isinstance(module, nn.MultiheadAttention):
            why = f"{call} has pruned weights, and attention is not Lipschitz"
        return _combined([_unbounded(held, why), behind]) if held else behind

    def _behind(self, call: rules.Call, operands: list[fx.Node]) -> _TensorError:
        """Behind an operation that adds no error of its own."""
        errors = [self.errors[n] for n in operands]
        if call.operation in rules.SUMS and isinstance(call.value, Tensor):
            alpha = max(1.0, abs(call.argument("alpha", 3, 1)))
            constants = [alpha * call.repeats(n) for n in operands]
            return _combined([e.behind(call, c) for e, c in zip(errors, constants, strict=True)])
        if len(operands) != 1 or call.operation in rules.CONCATENATIONS:
            apart = None if call.operation in rules.CONCATENATIONS else f"{call} combines computed tensors"
            return _combined(errors, math.hypot).behind(call, math.inf if apart else 1.0, apart)
        return errors[0].behind(call, *self._lipschitz(call, operands[0]))

    def _lipschitz(self, call: rules.Call, operand: fx.Node) -> tuple[float, str | None]:
        """The operation's constant for this input; infinity and the reason where none is known."""
        if call.module is not None and (fault := altered(call.module)):
            return math.inf, f"{call} {fault}"
        if not self.fixed.issuperset(n for n in call.node.all_input_nodes if n is not operand):
            return math.inf, f"{call} combines computed tensors"
        layer = rules.is_product(call.module)
        known = self.norms.get(call.name) if layer else None
        factor = rules.constant(call, operand) if known is None else known
        if factor is None:
            return math.inf, f"{call} is not Lipschitz, or not known to be"
        if layer:
            self.norms[call.name] = factor
        return factor, None


def _versions(value: object) -> list[int]:
    """How often each tensor, or what it is a view of, was written to."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors_in(value)]


def _is_step(step: nn.Module | str, call: rules.Call) -> bool:
    """Whether the call is the norm, or the ReLU."""
    if step != "relu" or call.operation not in rules.CLAMPS:
        return step is call.module or call.operation == step
    return bool(call.argument("min", 1) == 0) and call.argument("max", 2) is None


def _is_exchanged(step: nn.Module | str, call: rules.Call) -> bool:
    """Whether the call may as well come behind the step."""
    return call.operation in rules.SAME | rules.DROPOUTS | rules.MOVES | (rules.MAX_POOLS if step == "relu" else set())
