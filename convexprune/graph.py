"""A network's forward as a graph of operations, and who uses which of its modules."""

import inspect
import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from convexprune.errors import UnsupportedModule
from convexprune.matrices.support import kind_of, unsupported

__all__ = ["LAYERS", "NORMS", "Network", "inputs_of", "operation_of", "outputs_of", "traced"]

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv1d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
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
        self.calls: dict[str, list[fx.Node]] = {}
        self._read = set()  # modules whose tensors are used outside them
        for node in self.graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(str(node.target), []).append(node)
            elif node.op == "get_attr" and node.users:
                self._read.add(str(node.target).rpartition(".")[0])
        self.calls |= {name: [] for name in self.modules if name not in self.calls}
        self._owners = Counter(id(p) for module in self.modules.values() for p in module.parameters(recurse=False))

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
            "it shares a parameter with another module: untie them": any(self._owners[id(p)] > 1 for p in own.values()),
            "it is the whole model, so its outputs are the network's outputs": name == "",
            "no call of it is seen: forward does not use it, or a module that holds it does so unseen": times == 0,
            f"it is called {times} times in one forward, and its outputs may go different ways": times > 1,
            "its parameters are also used outside its own forward": name in self._read,
        }
        fault = None if carries else unsupported(module)
        return fault or next((reason for reason, holds in reasons.items() if holds), None)

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that the node calls."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def is_number(self, node: fx.Node) -> bool:
        """Whether the node is a tensor with one entry, of the model or created in its forward."""
        holder, _, name = str(node.target).rpartition(".")
        tensor = getattr(self.modules.get(holder), name, self._constants.get(str(node.target)))
        return node.op == "get_attr" and isinstance(tensor, Tensor) and tensor.numel() == 1 and tensor.ndim <= 1

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


def traced(model: nn.Module) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of the forward in eval mode, with the defaults of its options; the model is left as found.

    The graph takes what the forward creates itself, such as torch.arange(6), from the model, by names that the model
    does not have: these constants come with it.

    Raises:
        UnsupportedModule: The forward cannot be traced.
    """
    found = [(module, dict(vars(module))) for module in model.modules()]
    try:
        options = inspect.signature(model.forward).parameters.values()
        model.eval()
        graph = _Tracer().trace(model, {p.name: p.default for p in options if p.default is not p.empty} or None)
        return graph, {name: value for name, value in vars(model).items() if name not in found[0][1]}
    except Exception as error:
        what = f"{type(model).__name__} cannot be traced by torch.fx ({error}), so what follows its layers is unknown"
        raise UnsupportedModule(f"{what}: unwrap it, and let no condition in forward depend on the data") from error
    finally:
        for module, attributes in found:
            vars(module).clear()
            vars(module).update(attributes)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kind_of(m) is not None or super().is_leaf_module(m, module_qualified_name)
