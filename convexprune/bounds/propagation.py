"""Errors on their way through the traced forward, node by node."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from convexprune.bounds.calls import Call, repeats
from convexprune.bounds.names import CONCATENATIONS, LENGTHS, SUMS
from convexprune.bounds.observed import Observed, agree, arguments
from convexprune.bounds.pruned import Pruned, is_product
from convexprune.bounds.rules import constant
from convexprune.bounds.tensor_error import TensorError, combined, lost, summed
from convexprune.layers.support import altered
from convexprune.network.graph import traced
from convexprune.network.memory import tensors_in


class Propagation(fx.Interpreter):
    """Runs the graph on a batch, for shapes, and finds the error of each node."""

    def __init__(self, model: nn.Module, pruned: Pruned, norms: Mapping[str, float]) -> None:
        root = nn.Sequential(model) if is_product(model) else model  # a layer has no graph of its own
        graph, self.constants = traced(root)
        super().__init__(root, graph=graph)
        self.extra_traceback = False
        self.pruned, self.norms, self.seen = pruned, dict(norms), set[str]()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.errors: dict[fx.Node, TensorError] = {}
        self.fixed: set[fx.Node] = set()  # not computed from the data
        self.versions: dict[fx.Node, list[int]] = {}
        self.began = {node: _versions(self._held(node)) for node in graph.nodes}

    def error_of_outputs(self, call: Observed | None) -> TensorError:
        """The error of everything that the network returns."""
        if call is None:
            return lost(self.pruned.names, "forward= does not return what one call of the model returns")
        args, kwargs, expected = call
        try:
            outputs = self.run(*arguments(self.module, args, kwargs))
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            return lost(self.pruned.names, f"the traced forward cannot be run on the batch ({error})")
        if not agree(outputs, expected):
            return lost(self.pruned.names, "the traced forward computes something else on the batch")
        found = next(self.errors[node] for node in self.graph.nodes if node.op == "output")
        unseen = [name for name in self.pruned.names if name not in self.seen]
        errors = [found, lost(unseen, f"no call of {', '.join(unseen)} is seen")] if unseen else [found]
        if aliased := self.pruned.aliased:
            errors.append(lost(aliased, f"weights of {', '.join(aliased)} are also in a tensor that is no parameter"))
        return summed(errors)

    def fetch_attr(self, target: str) -> Any:
        """The module or tensor of this name; tensors that the forward creates are kept beside the model."""
        return self.constants[target] if target in self.constants else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, once its error is known."""
        stale = self.began[n] != _versions(self._held(n))
        stale |= any(self.versions[node] != _versions(self.env[node]) for node in n.all_input_nodes)
        value = super().run_node(n)
        module: Any = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        call = Call(self, n, module, self.names.get(id(module), ""), value)
        self.versions[n] = _versions(value)
        if stale:  # whatever was written into it may be here
            self.errors[n] = lost(self.pruned.names, f"{call} uses a tensor that was changed in place")
        else:
            self.errors[n] = self._error(call)
        data = n.op == "placeholder" and any(True for _ in tensors_in(value))
        if call.operation in LENGTHS or (not data and self.fixed.issuperset(n.all_input_nodes)):
            self.fixed.add(n)
        return value

    def _held(self, node: fx.Node) -> list[Any]:
        """The model's own tensors that a node uses."""
        held = self.fetch_attr(str(node.target)) if node.op in ("call_module", "get_attr") else None
        return [*held.parameters(), *held.buffers()] if isinstance(held, nn.Module) else [held]

    def _error(self, call: Call) -> TensorError:
        operands = [] if call.operation in LENGTHS else [n for n in _nodes(call.node) if self.errors[n]]
        if call.node.op == "output":
            operands = [n for n in operands if any(t.is_floating_point() for t in tensors_in(self.env[n]))]
            return combined([self.errors[n].stranded("the outputs") for n in operands], math.hypot)
        own = self.pruned.error(call.module)
        if own is not None:
            return self._behind_layer(call, own, operands)
        if len(operands) == 1 and call.continues(self.errors[operands[0]].awaited):
            return self._on_the_way(call, operands[0])
        behind = self._behind(call, operands)
        held = self.pruned.held_by(call.value if call.node.op == "get_attr" else call.module)
        self.seen.update(held)
        return summed([lost(held, _use_of_pruned(call)), behind]) if held else behind

    def _behind_layer(self, call: Call, own: TensorError, operands: list[fx.Node]) -> TensorError:
        """The layer's own radius is still to come, or comes here; errors before it come in, or were made good."""
        self.seen.add(own.own)
        if fault := altered(call.module):
            return summed([lost([own.own], f"{call} {fault}"), self._behind(call, operands)])
        before = TensorError() if self.pruned.cascade else self._behind(call, operands)
        error = replace(own, coefficients=before.coefficients, reason=before.reason)
        return error if error.awaited else error.arrived()

    def _on_the_way(self, call: Call, operand: fx.Node) -> TensorError:
        """Between a layer and the place where its radius holds."""
        error = self.errors[operand]
        factor, reason = self._lipschitz(call, operand)
        if reason:
            return error.stranded(str(call)).times(factor, reason)
        return error.past(factor) if call.reaches(error.awaited[0]) else error.times(factor)

    def _behind(self, call: Call, operands: list[fx.Node]) -> TensorError:
        """Behind an operation that adds no error of its own."""
        errors = [self.errors[n].stranded(str(call)) for n in operands]
        if call.operation in SUMS and isinstance(call.value, Tensor):
            alpha = max(1.0, abs(call.given("alpha", 3, 1)))
            return summed(e.times(alpha * repeats(call, n)) for e, n in zip(errors, operands, strict=True))
        total = combined(errors, math.hypot)
        if not total or call.operation in CONCATENATIONS:
            return total
        if len(operands) > 1:
            return total.times(math.inf, f"{call} combines computed tensors")
        return total.times(*self._lipschitz(call, operands[0]))

    def _lipschitz(self, call: Call, operand: fx.Node) -> tuple[float, str | None]:
        """The operation's constant for this input; infinity and the reason where none is known."""
        if call.module is not None and (fault := altered(call.module)):
            return math.inf, f"{call} {fault}"
        if not self.fixed.issuperset(n for n in call.node.all_input_nodes if n is not operand):
            return math.inf, f"{call} combines computed tensors"
        layer = is_product(call.module)
        known = self.norms.get(call.name) if layer else None
        factor = constant(call, operand) if known is None else known
        if factor is None:
            return math.inf, f"{call} is not Lipschitz, or not known to be"
        if layer:
            self.norms[call.name] = factor
        return factor, None


def _versions(value: Any) -> list[int]:
    """How often each tensor, or what it is a view of, was written to."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors_in(value)]


def _nodes(node: fx.Node) -> list[fx.Node]:
    """The node's inputs, each as often as it is one."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _use_of_pruned(call: Call) -> str:
    if isinstance(call.module, nn.MultiheadAttention):
        return f"{call} has pruned weights, and attention is not Lipschitz"
    return f"{call} uses parameters of pruned layers elsewhere than where their radii hold"
