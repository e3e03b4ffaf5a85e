"""A network's forward as a graph of operations, and who uses which of its modules.

The graph is that of evaluation. Neurons are removed for training too, so modules must have the same way there: where
train mode leads a module's outputs to other modules, tensors or outputs, it can lose no neurons. Only operations
without weights may differ, such as dropout, noise and dropped paths, and are taken to fit any number of neurons.
"""

import inspect
import operator
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from types import FunctionType

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from convexprune.errors import UnsupportedModule
from convexprune.layers.emptied import Emptied
from convexprune.layers.kinds import LAYERS, NORMS
from convexprune.layers.memory import Holders, tensors_in
from convexprune.layers.support import altered, kind_of, unsupported
from convexprune.network.choosing import find_ties, untied
from convexprune.network.forwards import eagerly, left_as_found

_OUTPUTS = "the network's outputs"
_CARRIERS = (*NORMS, nn.PReLU)  # have weights for each neuron, and are no layers


def operation_of(node: fx.Node, module: nn.Module | None) -> str:
    """Its name, as of modules, functions and methods alike: "batchnorm1d"; with a dot if it is not torch's."""
    name = type(module).__name__ if module else str(node.target)
    if node.target is getattr:
        name = str(node.args[1])
    elif callable(node.target):
        torchs = any(node.target is value for place in (torch, functional, operator) for value in vars(place).values())
        name = f"{'' if torchs else 'your.'}{getattr(node.target, '__name__', 'function')}"
    return name.replace("_", "").lower()


class Network:
    """The model's modules, and who uses which."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.graph, self._constants = traced(model)
        self._tied = find_ties(model).shared
        training, _ = traced(model, training=True)
        self._diverted = _diverted(self.modules, self.graph, training)
        times = Counter(str(node.target) for node in self.graph.nodes if node.op == "call_module")
        self.calls = {name: times[name] for name in (*times, *self.modules)}  # how often, in the order of first calls
        self._read = set[str]()  # modules whose tensors are used outside them
        holders = Holders((p, name) for name, module in self.modules.items() for p in module.parameters(recurse=False))
        for node in (*self.graph.nodes, *training.nodes):
            if node.op == "get_attr" and node.users:
                read = tensors_in(self._tensor(node))
                self._read.update([str(node.target).rpartition(".")[0], *chain(*map(holders.of, read))])

    def fault(self, name: str, along: bool = False) -> str | None:
        """Why the module itself cannot lose neurons or inputs; ``along`` if it is to lose both at once."""
        module, times = self.modules[name], self.calls[name]
        kind, groups, carries = type(module).__name__, getattr(module, "groups", 1), isinstance(module, _CARRIERS)
        own = dict(module.named_parameters(recurse=False))
        held = {key for key in ("weight", "bias") if getattr(module, key, None) is not None}
        computed, grouped = carries and own.keys() != held, groups != 1 and not along
        kinds = ", ".join(layer.__name__ for layer in LAYERS)
        reasons = {
            f"it is a {kind}, and neurons are those of {kinds}": not isinstance(module, (*LAYERS, *_CARRIERS)),
            "its weight or bias is computed from other tensors: make it permanent first": computed,
            f"it is a grouped convolution ({groups} groups), whose filters see different inputs": grouped,
            f"it {untied(self._tied.get(name, ''))}": name in self._tied,
            "it is the whole model, so its outputs are the network's outputs": name == "",
            "no call of it is seen: forward does not use it, or a module that holds it does so unseen": times == 0,
            f"it is called {times} times in one forward, and its outputs may go different ways": times > 1,
            "its parameters are also used outside its own forward": name in self._read,
            f"it {altered(module)}: take that away first": altered(module) is not None,
            f"its outputs do not go the same way in train mode, to {self._diverted.get(name)}": name in self._diverted,
        }
        fault = None if carries else unsupported(module, empty=True)
        return fault or next((reason for reason, holds in reasons.items() if holds), None)

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that the node calls."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def is_number(self, node: fx.Node) -> bool:
        """Whether the node is a tensor with one entry, of the model or created in its forward."""
        tensor = self._tensor(node)
        return node.op == "get_attr" and isinstance(tensor, Tensor) and tensor.numel() == 1 and tensor.ndim <= 1

    def _tensor(self, node: fx.Node) -> object:
        """What a node takes from the model."""
        holder, _, name = str(node.target).rpartition(".")
        return getattr(self.modules.get(holder), name, self._constants.get(str(node.target)))

    def described(self, node: fx.Node) -> str:
        """The node in words, for messages."""
        if node.op == "placeholder":
            return f"the network's input {node.target!r}"
        return repr(node.target) if node.op in ("call_module", "get_attr") else f"what {operation_of(node, None)} gives"


_ACTIVATIONS = (
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6 rrelu selu "
    "sigmoid silu softplus softshrink softsign tanh tanhshrink"
)
ACTIVATION = {name.replace("_", ""): name for name in _ACTIVATIONS.split()}
"""Names of elementwise nonlinearities, by those of their operations."""


def has_own_settings(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an activation has parameters, or others than its default settings (but for ``inplace``)."""
    if module is not None:
        return any(True for _ in module.parameters()) or _settings(module) != _settings(type(module)())
    given: list[tuple[object, object]] = [*enumerate(node.args[1:]), *node.kwargs.items()]
    defaults: dict[object, object] = {}
    if isinstance(node.target, FunctionType):  # what is built in has no signature
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        given = [*bound.arguments.items()]
        defaults = {name: parameter.default for name, parameter in bound.signature.parameters.items()}
    return any(name not in ("input", "inplace") and value != defaults.get(name) for name, value in given)


def _settings(module: nn.Module) -> dict[str, object]:
    found = vars(module).items()
    return {name: value for name, value in found if not name.startswith("_") and name not in ("inplace", "training")}


def changes_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an activation, or arithmetic, writes to its first tensor."""
    if node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
        return True
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    flags = (getattr(module, "inplace", False), node.kwargs.get("inplace"), *node.args[1:])
    return str(name).endswith("_") or any(flag is True for flag in flags)


def reads_other_lengths(node: fx.Node, axes: int) -> bool:
    """Whether it reads lengths, none of them the channels' of a tensor [samples, channels, one of ``axes``, ...]."""
    lengths = [_length(reader) for reader in node.users if reader.users] if _is_shape(node) else [_length(node)]
    return all(axis in (0, *range(2, axes + 2), *range(-axes, 0)) for axis in lengths)


def flattens(node: fx.Node, operation: str, module: nn.Module | None, axes: int) -> bool:
    """Whether all axes but the samples' become one, whatever their lengths."""
    if operation == "flatten":
        given = dict(zip(("input", "start_dim", "end_dim"), node.args, strict=False)) | node.kwargs
        given = vars(module) if module else {"start_dim": 0, "end_dim": -1} | given
        return bool(given["start_dim"] == 1 and given["end_dim"] in (-1, (axes or 2) + 1))
    lengths = node.args[1:]
    if len(lengths) == 1 and isinstance(lengths[0], tuple | list):
        lengths = tuple(lengths[0])
    flat = len(lengths) == 2 and _length(lengths[0]) == 0 and bool(lengths[1] == -1)
    return operation in ("reshape", "view") and flat


def reduced_axes(node: fx.Node, operation: str, axes: int) -> int | None:
    """How many of the ``axes`` behind the channels a mean, sum, amax or amin takes away; None if it does otherwise."""
    given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    dims, keeps = given.get("dim"), given.pop("keepdim", False)
    listed = dims if isinstance(dims, tuple | list) else [dims]
    behind = {axis if axis >= 0 else axis + axes + 2 for axis in listed if isinstance(axis, int)}
    known = operation in ("amax", "amin", "mean", "sum") and given.keys() <= {"input", "dim", "dtype"}
    if not known or not behind <= set(range(2, axes + 2)) or len(behind) != len(listed) or not listed:
        return None
    return 0 if keeps else len(behind)


def _is_shape(node: fx.Node) -> bool:
    reads = node.op == "call_method" and node.target == "size" and len(node.args) == 1
    return reads or (node.target is getattr and node.args[1] == "shape")


def _length(node: object) -> object:
    """The axis whose length the node is (x.size(0), x.size()[0], x.shape[0]); None if it is something else."""
    if not isinstance(node, fx.Node) or len(node.args) != 2 or not isinstance(node.args[0], fx.Node):
        return None
    reads = node.op == "call_method" and node.target == "size"
    return node.args[1] if reads or (node.target is operator.getitem and _is_shape(node.args[0])) else None


def inputs_of(module: nn.Module) -> int:
    """How many inputs, or channels, a layer, a BatchNorm or a PReLU takes."""
    if isinstance(module, LAYERS):
        return int(module.get_parameter("weight").shape[1] * getattr(module, "groups", 1))
    return int(getattr(module, "num_features", 0) or getattr(module, "num_parameters", 0))


def outputs_of(module: nn.Module) -> int:
    """How many outputs, or channels, it has."""
    return len(module.get_parameter("weight")) if isinstance(module, LAYERS) else inputs_of(module)


def traced(model: nn.Module, training: bool = False) -> tuple[fx.Graph, dict[str, object]]:
    """The graph of the forward in eval or train mode, with the defaults of its options; the model is left as found.

    The graph takes what the forward creates itself, such as torch.arange(6), from the model, by names that the model
    does not have: these constants come with it. UnsupportedModule is raised where the forward cannot be traced.
    """
    attributes = set(vars(model))
    # The forward runs where no input is involved: ``self.steps += 1``, or a draw of random numbers.
    with left_as_found(model), torch.random.fork_rng(devices=[]), eagerly():
        try:
            options = inspect.signature(model.forward).parameters.values()
            model.train(training)
            graph = _Tracer().trace(model, {p.name: p.default for p in options if p.default is not p.empty} or None)
            return graph, {name: value for name, value in vars(model).items() if name not in attributes}
        except Exception as error:
            mode = " in train mode" if training else ""
            what = f"{type(model).__name__} cannot be traced by torch.fx{mode} ({error})"
            advice = "unwrap it, and let no condition in forward depend on the data"
            raise UnsupportedModule(f"{what}, so what follows its layers is unknown: {advice}") from error


def _diverted(modules: Mapping[str, nn.Module], evaluation: fx.Graph, training: fx.Graph) -> dict[str, str]:
    """Modules and tensors whose values do not go the same way in both modes, and where that is."""
    weighted = {name for name, module in modules.items() if [*module.parameters(), *module.buffers()]}
    one, other = (_routes(graph, weighted) for graph in (evaluation, training))
    stray = {target for target, _ in one ^ other} - {_OUTPUTS}  # all that such a module takes must fit it in both modes
    differing = [route for route in one | other if route[0] in stray or route in one ^ other]
    ordered = sorted(differing, key=lambda route: route[0], reverse=True)
    return {origin: target for target, origins in ordered for origin in origins}


def _routes(graph: fx.Graph, weighted: set[str]) -> set[tuple[str, frozenset[str]]]:
    """What each module with weights and each output is made of; operations without weights do not count."""
    origins: dict[fx.Node, frozenset[str]] = {}
    routes = set[tuple[str, frozenset[str]]]()
    for node in graph.nodes:
        before = [origins[source] for source in node.all_input_nodes]
        origins[node] = frozenset[str]().union(*before)
        if node.op == "output":
            routes.update((_OUTPUTS, each) for each in before)
        elif node.op in ("placeholder", "get_attr") or (node.op == "call_module" and node.target in weighted):
            routes.add((repr(str(node.target)), origins[node]))
            origins[node] = frozenset({str(node.target)})
    return routes


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = kind_of(m) is not None or isinstance(m, Emptied)
        return known or super().is_leaf_module(m, module_qualified_name)
