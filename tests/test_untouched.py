"""What a forward does to its model is taken back: attributes, buffers, their values."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from convexprune.network.forwards import left_as_found
from convexprune.network.passes import network_outputs


def odd() -> nn.Module:
    """Buffers that cannot be compared, copied into, or are not there."""
    module = nn.Module()
    for name, buffer in {
        "sparse": torch.eye(3).to_sparse(),
        "expanded": torch.zeros(1).expand(5),
        "not a number": torch.full((2,), torch.nan),
        "meta": torch.zeros(2, device="meta"),
        "none": None,
        "empty": torch.zeros(0),
        "plain": torch.arange(4.0),
    }.items():
        module.register_buffer(name, buffer)
    with torch.inference_mode():
        module.register_buffer("inference", torch.ones(2))
    module.steps, module.cache = 0, {"last": torch.ones(2)}
    module.cache["itself"] = [module.cache]
    return module


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda module: None,
    "in place": lambda module: module.plain.mul_(2),
    "data": lambda module: setattr(module.plain, "data", torch.zeros(7)),
    "numpy": lambda module: module.plain.numpy().fill(3),
    "resized": lambda module: module.plain.resize_(9),
    "assigned": lambda module: setattr(module, "plain", torch.zeros(2)),
    "deleted": lambda module: delattr(module, "plain"),
    "added": lambda module: module.register_buffer("new", torch.zeros(2)),
    "attribute": lambda module: setattr(module, "steps", module.steps + 1),
    "new attribute": lambda module: setattr(module, "other", 1),
    "in a dictionary": lambda module: module.cache["last"].add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fails", [False, True])
def test_every_way_to_change_is_taken_back(change: str, fails: bool) -> None:
    module = odd()
    before, plain, names = dict(module.named_buffers()), module.plain, set(vars(module))
    try:
        with left_as_found(module):
            CHANGES[change](module)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert dict(module.named_buffers()).keys() == before.keys()
    assert all(buffer is before[name] for name, buffer in module.named_buffers())
    assert (module.plain is plain, module.steps, set(vars(module))) == (True, 0, names)
    assert torch.equal(module.plain, torch.arange(4.0))
    assert torch.equal(module.cache["last"], torch.ones(2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_run_and_lazy_ones_stay_complete() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU()).eval(), torch.randn(9, 4)
    expected = network_outputs(model, x)
    for compiled in (torch.jit.script(model), torch.jit.trace(model, x), torch.fx.symbolic_trace(model)):
        assert torch.equal(network_outputs(compiled, x), expected)
    lazy = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d())
    network_outputs(lazy, x)
    assert [type(module) for module in lazy] == [nn.Linear, nn.BatchNorm1d]
    assert (lazy[0].in_features, lazy[1].num_features) == (4, 5)
    assert torch.equal(copy.deepcopy(lazy).eval()(x), network_outputs(lazy, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_that_counts_is_left_as_found() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x * self.calls

    scripted = torch.jit.script(Counts())
    assert torch.equal(network_outputs(scripted, torch.ones(3, 1)), torch.ones(3, 1))
    assert float(scripted.calls) == 0
