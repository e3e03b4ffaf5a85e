"""What layers compute, by plain torch hooks in float64: promises without the library's own helpers."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.report.report import LayerReport


def behind(
    model: nn.Module, module: str, batches: Sequence[Any], relu: bool = False, group: tuple[int, int] = (0, 1)
) -> Tensor:
    """All that a module gives over the batches, in one float64 vector; behind a ReLU if asked.

    With ``group`` (g, of) the channels of the g-th group alone.
    """
    double, found = copy.deepcopy(model).double().eval(), []
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    handle = double.get_submodule(module).register_forward_hook(lambda _m, _a, y: found.append(y.detach().clone()))
    with torch.no_grad():
        for batch in batches:
            double(batch.double() if batch.is_floating_point() else batch)
    handle.remove()
    torch.backends.mha.set_fastpath_enabled(fast)
    values = torch.cat([(y if group[1] == 1 else y.chunk(group[1], 1)[group[0]]).reshape(-1) for y in found])
    return values.clamp(min=0) if relu else values


def network_error(dense: nn.Module, pruned: nn.Module, x: Tensor) -> float:
    """‖f̂(x) − f(x)‖_F/‖f(x)‖_F."""
    Y, Z = behind(dense, "", [x]), behind(pruned, "", [x])
    return float((Z - Y).norm() / Y.norm())


def with_modules_of(model: nn.Module, other: nn.Module, names: Sequence[str | None]) -> nn.Module:
    """A copy of a model, with the weights of some modules of another."""
    mixed = copy.deepcopy(model)
    for name in filter(None, names):
        mixed.get_submodule(name).load_state_dict(other.get_submodule(name).state_dict())
    return mixed


def promised(
    row: LayerReport,
    dense: nn.Module,
    pruned: nn.Module,
    batches: Sequence[Any],
    cascade: bool,
    feas_tol: float = 1e-4,
) -> None:
    """The row's figures are those of the modules, and within its promise.

    In cascade the layer has the pruned network's own inputs, else the original's; its target is always the original's.
    """
    at, relu = row.norm or row.name, row.fit != "ball"
    now = pruned if cascade else with_modules_of(dense, pruned, [row.name, row.norm])
    Y = behind(dense, at, batches, relu)
    size = float(Y.norm())
    error = float((behind(now, at, batches, relu) - Y).norm()) / size
    assert abs(error - row.output_error) <= 1e-3 * row.output_error + 1e-6
    assert error <= row.promised * (1 + 1e-6) + 1e-6
    if row.status == "solved":
        assert row.promised <= row.eps * (1 + 1.1 * feas_tol) or row.fit == "net-trim"


def unchanged(model: nn.Module) -> Callable[[], bool]:
    """Whether a model is still, bit by bit, as it was: values, objects, flags, and no hooks."""
    values, objects = copy.deepcopy(model.state_dict()), list(model.parameters())
    flags = [module.training for module in model.modules()]

    def same() -> bool:
        now = model.state_dict()
        return (
            all(torch.equal(now[name], value) for name, value in values.items())
            and all(a is b for a, b in zip(model.parameters(), objects, strict=True))
            and [module.training for module in model.modules()] == flags
            and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        )

    return same
