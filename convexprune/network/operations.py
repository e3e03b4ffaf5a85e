"""What can be read off the arguments of a traced network's operations."""

import inspect
import operator
from types import FunctionType
from typing import Any

from torch import fx, nn

_ACTIVATIONS = (
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6 rrelu selu "
    "sigmoid silu softplus softshrink softsign tanh tanhshrink"
)
ACTIVATION = {name.replace("_", ""): name for name in _ACTIVATIONS.split()}
"""Names of elementwise nonlinearities, by those of their operations."""


def has_own_settings(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an activation has parameters, or is called with others than its default ones, which the tracer fills in.

    Whether it works in place does not count.
    """
    if module is not None:
        return any(True for _ in module.parameters()) or _settings(module) != _settings(type(module)())
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


def changes_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an activation, or arithmetic, writes to its first tensor."""
    if node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
        return True
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    flags = (getattr(module, "inplace", False), node.kwargs.get("inplace"), *node.args[1:])
    return str(name).endswith("_") or any(flag is True for flag in flags)


def asks_other_lengths(node: fx.Node, axes: int) -> bool:
    """Whether it asks for lengths, none of them the channels' of a tensor [samples, channels, one of ``axes``, ...].

    Without axes behind the channels these may lie anywhere but first.
    """
    asked = [_length(reader) for reader in node.users if reader.users] if _is_shape(node) else [_length(node)]
    return all(axis in (0, *range(2, axes + 2), *range(-axes, 0)) for axis in asked)


def flattens(node: fx.Node, operation: str, module: nn.Module | None, axes: int) -> bool:
    """Whether all axes but the samples' become one, whatever their lengths."""
    if operation == "flatten":
        given = dict(zip(("input", "start_dim", "end_dim"), node.args, strict=False)) | node.kwargs
        given = vars(module) if module else {"start_dim": 0, "end_dim": -1} | given
        return bool(given["start_dim"] == 1 and given["end_dim"] in (-1, (axes or 2) + 1))
    shape: Any = node.args[1:]
    shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    return operation in ("reshape", "view") and len(shape) == 2 and _length(shape[0]) == 0 and bool(shape[1] == -1)


def reduced_axes(node: fx.Node, operation: str, axes: int) -> int | None:
    """How many of the ``axes`` behind the channels a mean, sum, amax or amin takes away; None if it does otherwise."""
    given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    dims, keeps = given.get("dim"), given.pop("keepdim", False)
    dims = (dims,) if isinstance(dims, int) else dims
    known = operation in ("amax", "amin", "mean", "sum") and given.keys() <= {"input", "dim", "dtype"}
    if not known or not isinstance(dims, tuple | list) or not all(isinstance(axis, int) for axis in dims):
        return None
    behind = {axis if axis >= 0 else axis + axes + 2 for axis in dims if isinstance(axis, int)}
    if not behind or not behind <= set(range(2, axes + 2)):
        return None
    return 0 if keeps else len(behind)


def _is_shape(node: fx.Node) -> bool:
    asks = node.op == "call_method" and node.target == "size" and len(node.args) == 1
    return asks or (node.target is getattr and node.args[1] == "shape")


def _length(node: Any) -> Any:
    """The axis whose length the node is (x.size(0), x.size()[0], x.shape[0]); None if it is something else."""
    if not isinstance(node, fx.Node) or len(node.args) != 2 or not isinstance(node.args[0], fx.Node):
        return None
    asks = node.op == "call_method" and node.target == "size"
    return node.args[1] if asks or (node.target is operator.getitem and _is_shape(node.args[0])) else None
