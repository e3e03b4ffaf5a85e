"""Random small networks, dead, doubled and silent ones among them, through every coreset method, in any unit."""

import copy
import math
from typing import Any

import pytest
import torch
from calls import coreset_prune_
from torch import Tensor, nn

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lowner", {}),
    ("lowner", {"construction": "peeling"}),
    ("lowner", {"points": "incoming"}),
    ("mussay", {}),
    ("pfp", {}),
    ("pfp", {"share": "sum"}),
    ("uniform", {}),
    ("corenet", {}),
    ("sipp", {}),
    ("sipp", {"variant": "hybrid"}),
    ("sipp", {"variant": "deterministic"}),
    ("uniform", {"items": "weights"}),
]
BY_WEIGHTS = ("lowner", "mussay")  # they judge (w, b), whose parts have other units where there is a b
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
KINDS = ("plain", "convolution", "one neuron", "dead", "doubled", "one sample", "zero weights", "constant", "zeros")


def network(kind: str, seed: int, biased: bool) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    if kind == "convolution":
        layers = [nn.Conv2d(2, 6, 3, bias=biased), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=biased), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(20, 3, bias=biased)).eval(), torch.randn(6, 2, 6, 6)
    width = 1 if kind == "one neuron" else 9
    first, second = nn.Linear(6, width, bias=biased), nn.Linear(width, 7, bias=biased)
    x = torch.randn(1 if kind == "one sample" else 20, 6)
    with torch.no_grad():
        if kind == "dead":
            first.weight[:4], second.weight[:, 5:7] = 0, 0
        if kind == "doubled":
            first.weight[3], second.weight[:, 3] = first.weight[2], second.weight[:, 2]
        if kind == "zero weights":
            second.weight.zero_()
    if kind in ("constant", "zeros"):
        x = torch.full_like(x, 0.3 if kind == "constant" else 0.0)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(7, 3, bias=biased)).eval(), x


def weights(model: nn.Sequential) -> list[Tensor]:
    return [module.get_parameter("weight").detach() for module in model if hasattr(module, "weight")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "options"), METHODS, ids=str)
def test_what_is_chosen_does_not_depend_on_units_and_is_what_was_asked_for(
    method: str, options: dict[str, Any], kind: str
) -> None:
    """Inputs and first neurons in other units, powers of two, are the same network: bit by bit, so is the answer."""
    neurons = options.get("items", "neurons") == "neurons" and method not in ("corenet", "sipp")
    rest = {"remove": False} if neurons else {}
    seed = METHODS.index((method, options)) + 20 * KINDS.index(kind)
    dtype, biased, size = DTYPES[seed % 3], method not in BY_WEIGHTS, (0.5, 2)[seed % 2]
    found = []
    for power, hidden in ((0, 0), (30, -20) if seed % 4 < 2 else (-30, 20)):
        model, x = network(kind, seed, biased)
        model, x = model.to(dtype), x.to(dtype) * 2.0**power
        with torch.no_grad():
            for module, scale in zip((m for m in model if hasattr(m, "weight")), (hidden, -hidden, 0), strict=False):
                module.weight.mul_(2.0**scale)
                if module.bias is not None:
                    module.bias.mul_(2.0 ** (power + scale if module is model[0] else power))
        dense = copy.deepcopy(model)
        report = coreset_prune_(model, x, method, size, **rest, **options)
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        assert 0 <= report.output_error < math.inf
        assert report.nonzeros == sum(row.nonzeros for row in report.layers)
        for row in report.layers:
            assert row.nonzeros == int(model.get_submodule(row.name).get_parameter("weight").count_nonzero())
            assert row.nonzeros <= row.nonzeros_before
        with torch.no_grad():
            now, before = model(x).double(), dense(x).double()
        moved = float((now - before).norm()) / (float(before.norm()) or 1.0)
        assert report.output_error == pytest.approx(moved, rel=1e-2, abs=1e-6)
        units = (hidden, -hidden, 0)
        own = [weight * 2.0**-scale for weight, scale in zip(weights(model), units, strict=False)]
        found.append((own, report.output_error))
    (one, error), (other, again) = found
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert error == pytest.approx(again, rel=1e-5, abs=1e-9)
