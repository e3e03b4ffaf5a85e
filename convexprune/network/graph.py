"""A network's forward as a graph of operations, and who uses which of its modules.

The graph is that of evaluation. Neurons are removed for training too, so modules must have the same way there: where
train mode leads a module's outputs to other modules, tensors or outputs, it can lose no neurons. Only operations
without weights may differ, such as dropout, noise and dropped paths, and are taken to fit any number of neurons.
"""

import inspect
import operator
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from convexprune.errors import UnsupportedModule
from convexprune.layers.support import altered, kind_of, unsupported
from convexprune.network.compiled import eagerly
from convexprune.network.memory import Holders
from convexprune.network.ties import find_ties
from convexprune.network.untouched import left_as_found
from convexprune.network.watch import tensors_in

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv1d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_OUTPUTS = "the network's outputs"
_CARRIERS = (*NORMS, nn.PReLU)  # have weights for each neuron, and are no layers


def operation_of(node: fx.Node, module: nn.Module | None) -> str:
    """The operation's name in small letters without underscores, the same for a module, a function and a method.

    A function that is not torch's keeps a dot in its name.
    """
    name = type(module).__name__ if module else str(node.target)
    if node.target is getattr:
        name = str(node.args[1])
    elif callable(node.target):
        torchs = any(node.target is value for place in (torch, functional, operator) for value in vars(place).values())
        name = f"{'' if torchs else 'your.'}{getattr(node.target, '__name__', 'function')}"
    return name.replace("_", "").lower()


class Network:
    """The model's modules, and who uses which; ``layers`` are the kinds that may lose neurons."""

    def __init__(self, model: nn.Module, layers: tuple[type[nn.Module], ...]) -> None:
        self.layers, self.modules = layers, dict(model.named_modules())
        self.graph, self._constants = traced(model)
        self._tied = find_ties(model, joint=False).refused
        training, _ = traced(model, training=True)
        self._diverted = _diverted(self.modules, self.graph, training)
        self.calls: dict[str, list[fx.Node]] = {}
        self._read = set[str]()  # modules whose tensors are used outside them
        holders = Holders((p, name) for name, module in self.modules.items() for p in module.parameters(recurse=False))
        for node in self.graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(str(node.target), []).append(node)
        for node in (*self.graph.nodes, *training.nodes):
            if node.op == "get_attr" and node.users:
                read = tensors_in(self._tensor(node))
                self._read.update([str(node.target).rpartition(".")[0], *chain(*map(holders.of, read))])
        self.calls |= {name: [] for name in self.modules if name not in self.calls}

    def fault(self, name: str, along: bool = False) -> str | None:
        """Why the module itself cannot lose neurons or inputs; ``along`` if it is to lose both at once."""
        module, times = self.modules[name], len(self.calls[name])
        kind, groups, carries = type(module).__name__, getattr(module, "groups", 1), isinstance(module, _CARRIERS)
        own = dict(module.named_parameters(recurse=False))
        held = {key for key in ("weight", "bias") if getattr(module, key, None) is not None}
        computed, grouped = carries and own.keys() != held, groups != 1 and not along
        kinds = ", ".join(layer.__name__ for layer in self.layers)
        reasons = {
            f"it is a {kind}, and neurons are those of {kinds}": not isinstance(module, (*self.layers, *_CARRIERS)),
            "its weight or bias is computed from other tensors: make it permanent first": computed,
            f"it is a grouped convolution ({groups} groups), whose filters see different inputs": grouped,
            f"it {self._tied.get(name, '')}": name in self._tied,
            "it is the whole model, so its outputs are the network's outputs": name == "",
            "no call of it is seen: forward does not use it, or a module that holds it does so unseen": times == 0,
            f"it is called {times} times in one forward, and its outputs may go different ways": times > 1,
            "its parameters are also used outside its own forward": name in self._read,
            f"it {altered(module)}: take that away first": altered(module) is not None,
            f"its outputs do not go the same way in train mode, to {self._diverted.get(name)}": name in self._diverted,
        }
        fault = None if carries else unsupported(module)
        return fault or next((reason for reason, holds in reasons.items() if holds), None)

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that the node calls."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def is_number(self, node: fx.Node) -> bool:
        """Whether the node is a tensor with one entry, of the model or created in its forward."""
        tensor = self._tensor(node)
        return node.op == "get_attr" and isinstance(tensor, Tensor) and tensor.numel() == 1 and tensor.ndim <= 1

    def _tensor(self, node: fx.Node) -> Any:
        """What a node takes from the model."""
        holder, _, name = str(node.target).rpartition(".")
        return getattr(self.modules.get(holder), name, self._constants.get(str(node.target)))

    def told(self, node: fx.Node) -> str:
        """The node in words."""
        if node.op == "placeholder":
            return f"the network's input {node.target!r}"
        named = node.op in ("call_module", "get_attr")
        return repr(node.target) if named else f"what {operation_of(node, None)} gives"


def inputs_of(module: nn.Module) -> int:
    """How many inputs, or channels, a layer, a BatchNorm or a PReLU takes."""
    if isinstance(module, LAYERS):
        return int(module.get_parameter("weight").shape[1] * getattr(module, "groups", 1))
    return int(getattr(module, "num_features", 0) or getattr(module, "num_parameters", 0))


def outputs_of(module: nn.Module) -> int:
    """How many outputs, or channels, it has."""
    return len(module.get_parameter("weight")) if isinstance(module, LAYERS) else inputs_of(module)


def traced(model: nn.Module, training: bool = False) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of the forward in eval or train mode, with the defaults of its options; the model is left as found.

    The graph takes what the forward creates itself, such as torch.arange(6), from the model, by names that the model
    does not have: these constants come with it.

    Raises:
        UnsupportedModule: The forward cannot be traced.
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
    """What each module with weights and each of the network's outputs is made of: modules, tensors and inputs.

    Operations without weights do not count, so that the modes may differ in these.
    """
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
        return kind_of(m) is not None or super().is_leaf_module(m, module_qualified_name)
