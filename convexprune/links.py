"""Which layers take a layer's outputs, and what happens to these on the way: all that changes with a removed neuron.

A neuron is an output of a Linear, or a filter of a Conv2d. It can be removed where every operation keeps it apart from
the others until the next layers, which then lose its columns. The network's inputs have their samples first.
"""

import inspect
import operator
from collections import Counter
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from convexprune.errors import UnsupportedModule
from convexprune.matrices import unsupported
from convexprune.plan import check_module
from convexprune.report import SkippedModule

__all__ = ["Link", "find_links"]

# Operations by name: small letters without underscores, the same for a module, a function and a method.
_ACTIVATIONS = (
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6 rrelu selu "
    "sigmoid silu softplus softshrink softsign tanh tanhshrink"
)
_ACTIVATION = {name.replace("_", ""): name for name in _ACTIVATIONS.split()}
_SAME = {"alphadropout", "clone", "contiguous", "detach", "dropout", "dropout1d", "dropout2d", "dropout3d", "identity"}
_POOLS = {"adaptiveavgpool2d", "adaptivemaxpool2d", "avgpool2d", "maxpool2d"}
_FATES = {
    "are the network's outputs": "output",
    "are added to others (residual connection)": "add iadd isub rsub sub",
    "are multiplied with others or scaled": "div imul itruediv mul truediv",
    "are concatenated with others": "cat concat concatenate hstack stack vstack",
    "are mixed with each other by a softmax": "logsoftmax softmax softmax2d softmin",
    "are normalised with each other": "groupnorm layernorm localresponsenorm normalize rmsnorm",
    "are taken apart, or reshaped otherwise than by flatten(x, 1)": "chunk flatten getitem reshape split unbind view",
    "are counted (by size or shape)": "shape size",
}
_FATE = {name: fate for fate, names in _FATES.items() for name in names.split()}


@dataclass(frozen=True)
class Link:
    """A layer whose neurons can be removed, and the layers that take its outputs; modules by qualified name.

    Attributes:
        producer: The Linear or Conv2d.
        norms: BatchNorm modules on the way.
        activation: The elementwise nonlinearity on the way ("relu"), behind all norms; None if there is none; "own
            softplus" if it has other parameters than the default ones; "several: relu, identity" if ways differ, and
            "several: tanh then relu" or "several: relu then norm" if one has more to it, such as a norm without running
            statistics: "several: norm by the batch then relu".
        consumers: The Linear and Conv2d modules that take the outputs.
        repeat: For each consumer, how many of its inputs belong to one neuron: 1, or the positions of a flattened map.
            Neuron c owns inputs c·repeat to (c + 1)·repeat − 1.
    """

    producer: str
    norms: tuple[str, ...]
    activation: str | None
    consumers: tuple[str, ...]
    repeat: tuple[int, ...]


def find_links(model: nn.Module) -> tuple[dict[str, Link], list[SkippedModule]]:
    """The layers whose neurons can be removed, by name, and every other module that holds weights, with the reason.

    Both are in the order in which forward calls them; modules that it does not call come last. The model is traced in
    eval mode, with the defaults of forward's options; it is not run, and left as found.

    Raises:
        InvalidInput: The model is no module.
        UnsupportedModule: The model's forward cannot be traced.
    """
    network = _Network(check_module(model))
    links: dict[str, Link] = {}
    skipped = []
    for name in network.calls:
        module = network.modules[name]
        matrices = any(nn.parameter.is_lazy(p) or p.ndim >= 2 for p in module.parameters(recurse=False))
        if not matrices and not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        try:
            links[name] = _Walk(network, name).link()
        except _NotRemovable as reason:
            skipped.append(SkippedModule(name, type(module).__name__, str(reason)))
    return links, skipped


class _NotRemovable(Exception):
    """Why a layer's neurons cannot be removed."""


class _Network:
    """The model's modules, and who uses which."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.calls: dict[str, list[fx.Node]] = {}
        self._read = set()  # modules whose tensors are used outside them
        for node in _traced(model).nodes:
            if node.op == "call_module":
                self.calls.setdefault(str(node.target), []).append(node)
            elif node.op == "get_attr" and node.users:
                self._read.add(str(node.target).rpartition(".")[0])
        self.calls |= {name: [] for name in self.modules if name not in self.calls}
        self._owners = Counter(id(p) for module in self.modules.values() for p in module.parameters(recurse=False))

    def fault(self, name: str) -> str | None:
        """Why the layer or norm itself cannot lose neurons or inputs."""
        module, times, groups = self.modules[name], len(self.calls[name]), getattr(self.modules[name], "groups", 1)
        own, norm = dict(module.named_parameters(recurse=False)), isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        computed = norm and own.keys() != {key for key in ("weight", "bias") if getattr(module, key) is not None}
        reasons = {
            "its weight or bias is computed from other tensors: make it permanent first": computed,
            f"it is a grouped convolution ({groups} groups), whose filters see different inputs": groups != 1,
            "it shares a parameter with another module: untie them": any(self._owners[id(p)] > 1 for p in own.values()),
            "it is the whole model, so its outputs are the network's outputs": name == "",
            "no call of it is seen: forward does not use it, or a module that holds it does so unseen": times == 0,
            f"it is called {times} times in one forward, and its outputs may go different ways": times > 1,
            "its parameters are also used outside its own forward": name in self._read,
        }
        fault = None if norm else unsupported(module)
        return fault or next((reason for reason, holds in reasons.items() if holds), None)


class _Walk:
    """Follows one layer's outputs to the layers that take them.

    Their layout is "maps" [samples, neurons, height, width], "flat" [samples, neurons·positions] or "last"
    [samples, ..., neurons].
    """

    def __init__(self, network: _Network, producer: str) -> None:
        if fault := network.fault(producer):
            raise _NotRemovable(fault)
        layer, maps = network.modules[producer], isinstance(network.modules[producer], nn.Conv2d)
        self.network, self.producer, self.neurons = network, producer, len(layer.get_parameter("weight"))
        self.end = f", so its {'filters' if maps else 'neurons'} cannot be removed alone"
        self.norms: list[str] = []
        self.repeat: dict[str, int] = {}  # by consumer
        self.ways: dict[tuple[str, ...], None] = {}  # the activations and norms on the way to each consumer
        self._follow(network.calls[producer][0], "maps" if maps else "last")
        if not self.repeat:
            raise _NotRemovable("nothing uses its outputs")

    def link(self) -> Link:
        return Link(
            self.producer, tuple(self.norms), self._activation(), tuple(self.repeat), tuple(self.repeat.values())
        )

    def _activation(self) -> str | None:
        """What all ways have in common: norms, and then one activation at most; or that there is no such thing."""
        norms = [tuple(step for step in way if step.startswith(_NORM)) for way in self.ways]
        first = all(way[: len(norms[0])] == before == norms[0] for way, before in zip(self.ways, norms, strict=True))
        ways = [way[len(norms[0]) :] if first else way for way in self.ways]
        if first and len(set(ways)) == 1 and len(ways[0]) <= 1:
            return ways[0][0] if ways[0] else None
        told = [" then ".join(step.split(":")[0] for step in way) or "identity" for way in ways]
        return f"several: {', '.join(dict.fromkeys(told))}"

    def _follow(self, node: fx.Node, layout: str, way: tuple[str, ...] = (), alone: bool = True) -> None:
        """From here to the consumers; ``alone`` says that nothing else has used the outputs before."""
        users = [user for user in node.users if not _asks_other_lengths(user, layout)]
        alone = alone and len(users) == 1
        for user in users:
            module = self.network.modules[str(user.target)] if user.op == "call_module" else None
            if isinstance(module, nn.Linear | nn.Conv2d):
                self.repeat[str(user.target)] = self._reach(str(user.target), module, layout)
                self.ways[way] = None
                continue
            operation = _operation(user, module)
            behind = self._behind(user, operation, module, layout)
            if operation in _ACTIVATION and not alone and _in_place(user, module):
                changed = f"changed in place by {_ACTIVATION[operation]} while others use them"
                raise _NotRemovable(f"its outputs are {changed}{self.end}")
            self._follow(user, behind, (*way, *_step(user, operation, module)), alone)

    def _behind(self, user: fx.Node, operation: str, module: nn.Module | None, layout: str) -> str:
        """The layout behind an operation that keeps neurons apart."""
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            self._reach(str(user.target), module, layout)
            self.norms.append(str(user.target))
            return layout
        # Another tensor may decide what becomes of a neuron; so may a PReLU, if it has a slope for each.
        plain = len(user.all_input_nodes) == 1 and getattr(module, "num_parameters", 1) == 1
        if (layout == "maps" and operation in _POOLS) or (plain and operation in {*_ACTIVATION, *_SAME}):
            return layout
        if _flattens(user, operation, module):
            return "flat" if layout == "maps" else layout
        what = f"{user.target!r} ({type(module).__name__})" if module else operation
        raise _NotRemovable(f"its outputs {_FATE.get(operation, f'reach {what}, which may mix them')}{self.end}")

    def _reach(self, name: str, module: nn.Linear | nn.Conv2d | nn.BatchNorm1d | nn.BatchNorm2d, layout: str) -> int:
        """How many of the module's inputs belong to one neuron."""
        repeat, fault = 1, self.network.fault(name)
        if not fault:
            inputs = module.weight.shape[1] if isinstance(module, nn.Linear | nn.Conv2d) else module.num_features
            repeat = inputs // self.neurons if layout == "flat" and isinstance(module, nn.Linear) else 1
            if inputs != repeat * self.neurons or isinstance(module, nn.Linear | nn.BatchNorm1d) == (layout == "maps"):
                fault = f"it takes {inputs} inputs along another axis: flatten(x, 1) may be missing"
        if fault:
            raise _NotRemovable(f"its outputs reach {name!r}, which cannot lose inputs ({fault}){self.end}")
        return repeat


def _operation(node: fx.Node, module: nn.Module | None) -> str:
    """The operation's name; a function that is not torch's keeps a dot in it."""
    name = type(module).__name__ if module else str(node.target)
    if node.target is getattr:
        name = str(node.args[1])
    elif callable(node.target):
        torchs = any(node.target is value for place in (torch, functional, operator) for value in vars(place).values())
        name = f"{'' if torchs else 'your.'}{getattr(node.target, '__name__', 'function')}"
    return name.replace("_", "").lower()


_NORM = "norm:"


def _step(node: fx.Node, operation: str, module: nn.Module | None) -> tuple[str, ...]:
    """The operation's part in the function that a neuron computes: a norm, an activation, or none."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        # What a norm without running statistics makes of a neuron depends on the other samples.
        return ("norm by the batch" if module.running_var is None else f"{_NORM}{node.target}",)
    if operation not in _ACTIVATION:
        return ()
    own = _called_with_own(node)
    if module is not None:
        own = any(True for _ in module.parameters()) or _settings(module) != _settings(type(module)())
    return (f"own {_ACTIVATION[operation]}" if own else _ACTIVATION[operation],)


def _called_with_own(node: fx.Node) -> bool:
    """Whether an activation is called with other parameters than its default ones, which the tracer fills in."""
    given: dict[Any, Any] = dict(enumerate(node.args[1:])) | node.kwargs
    defaults: dict[Any, Any] = {}
    if isinstance(node.target, FunctionType):  # what is built in does not tell its defaults
        signature = inspect.signature(node.target)
        given = signature.bind(*node.args, **node.kwargs).arguments
        defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    return any(name not in ("input", "inplace") and value != defaults.get(name) for name, value in given.items())


def _settings(module: nn.Module) -> dict[str, Any]:
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: value for name, value in public.items() if name not in ("inplace", "training")}


def _in_place(node: fx.Node, module: nn.Module | None) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    flags = (getattr(module, "inplace", False), node.kwargs.get("inplace"), *node.args[1:])
    return str(name).endswith("_") or any(flag is True for flag in flags)


def _is_shape(node: fx.Node) -> bool:
    asks = node.op == "call_method" and node.target == "size" and len(node.args) == 1
    return asks or (node.target is getattr and node.args[1] == "shape")


def _length(node: Any) -> Any:
    """The axis whose length the node is (x.size(0), x.size()[0], x.shape[0]); None if it is something else."""
    if not isinstance(node, fx.Node) or len(node.args) != 2 or not isinstance(node.args[0], fx.Node):
        return None
    asks = node.op == "call_method" and node.target == "size"
    return node.args[1] if asks or (node.target is operator.getitem and _is_shape(node.args[0])) else None


def _asks_other_lengths(user: fx.Node, layout: str) -> bool:
    """Whether it asks for lengths, none of which changes with the number of neurons."""
    asked = [_length(reader) for reader in user.users if reader.users] if _is_shape(user) else [_length(user)]
    return all(axis in ((0, 2, 3, -1, -2) if layout == "maps" else (0,)) for axis in asked)


def _flattens(node: fx.Node, operation: str, module: nn.Module | None) -> bool:
    """Whether all axes but the samples' become one, whatever their lengths."""
    if operation == "flatten":
        given = dict(zip(("input", "start_dim", "end_dim"), node.args, strict=False)) | node.kwargs
        given = vars(module) if module else {"start_dim": 0, "end_dim": -1} | given
        return bool(given["start_dim"] == 1 and given["end_dim"] in (-1, 3))
    shape: Any = node.args[1:]
    shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    return operation in ("reshape", "view") and len(shape) == 2 and _length(shape[0]) == 0 and bool(shape[1] == -1)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear | nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> fx.Graph:
    """The graph of the forward; what tracing leaves on the modules is taken back."""
    found = [(module, dict(vars(module))) for module in model.modules()]
    try:
        options = inspect.signature(model.forward).parameters.values()
        model.eval()
        return _Tracer().trace(model, {p.name: p.default for p in options if p.default is not p.empty} or None)
    except Exception as error:
        what = f"{type(model).__name__} cannot be traced by torch.fx ({error}), so what follows its layers is unknown"
        raise UnsupportedModule(f"{what}: unwrap it, and let no condition in forward depend on the data") from error
    finally:
        for module, attributes in found:
            vars(module).clear()
            vars(module).update(attributes)
