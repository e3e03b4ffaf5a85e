"""An operation in a traced forward, as the rules see it."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from convexprune.bounds.names import CLAMPS, DROPOUTS, MAX_POOLS, MOVES, SAME
from convexprune.network.graph import operation_of


@dataclass(frozen=True, eq=False)
class Call:
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
        if step != "relu" or self.operation not in CLAMPS:
            return step is self.module or self.operation == step
        return self.given("min", 1) == 0 and self.given("max", 2) is None

    def continues(self, awaited: tuple[Any, ...]) -> bool:
        """Whether it is the step that is awaited first, or may be exchanged with it."""
        relu = bool(awaited) and awaited[0] == "relu"
        exchanged = self.operation in SAME | DROPOUTS | MOVES or (relu and self.operation in MAX_POOLS)
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


def repeats(call: Call, operand: fx.Node) -> float:
    """How much broadcasting lengthens the operand."""
    return math.sqrt(call.value.numel() / call.run.env[operand].numel())
