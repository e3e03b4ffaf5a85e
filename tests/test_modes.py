"""Which mode a run takes where it is left open, and what the report says of it and of errors that add up."""

import copy
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from calls import preview, prune_
from networks import Net, mlp
from torch import nn

from convexprune import verify
from convexprune.errors import OtherRun
from convexprune.runs.outcome import amplified
from convexprune.solvers.errors import InvalidInput


def chain():
    return mlp(8, 12, 12, 12, 4).eval(), torch.rand(60, 8)


def weights(model):
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def pruned(model, x, **arguments):
    model = copy.deepcopy(model)
    return model, prune_(model, x, **arguments)


@pytest.mark.parametrize("arguments", [{"network_eps": 0.2}, {"sparsity": 0.5}])
def test_left_open_it_is_cascade(arguments):
    model, x = chain()
    (one, report), (same, _), (other, apart) = (
        pruned(model, x, **arguments, mode=mode) for mode in (None, "cascade", "parallel")
    )
    assert report.provenance["mode"] == "cascade"
    assert torch.equal(weights(one), weights(same))
    assert not torch.equal(weights(one), weights(other))
    assert report.output_error < apart.output_error or report.nonzeros < apart.nonzeros
    assert not any("mode" in line for line in report.head)


def test_an_eps_is_kept_as_it_was_asked_for():
    """Cascade would have to raise it here: the trained weights miss by more on what is left of their inputs."""
    model, x = chain()
    _, report = pruned(model, x, eps=0.1)
    _, cascade = pruned(model, x, eps=0.1, mode="cascade")
    assert report.provenance["mode"] == "parallel"
    assert all(row.eps == pytest.approx(0.1) for row in report.layers)
    assert any(row.raised for row in cascade.layers) or cascade.output_error <= 0.1 * (1 + 1e-3)


def test_layers_at_the_same_time_make_it_parallel_and_are_said_to():
    model, x = chain()
    with ThreadPoolExecutor(2) as jobs:
        one, report = pruned(model, x, sparsity=0.5, jobs=jobs)
    assert report.provenance["mode"] == "parallel"
    assert report.head[1].startswith("parallel mode, since of several layers at a time none can wait")
    assert torch.equal(weights(one), weights(pruned(model, x, sparsity=0.5, mode="parallel")[0]))
    assert preview(model, x, sparsity=0.5, jobs=2).recipe["mode"] == "parallel"
    assert preview(model, x, sparsity=0.5).recipe["mode"] == "cascade"
    assert preview(model, x, eps=0.5).recipe["mode"] == "parallel"


def test_a_layer_called_twice_makes_it_parallel_and_is_named():
    torch.manual_seed(0)
    model = Net(lambda m, x: m.head(m.shared(m.shared(x).relu()).relu()), shared=nn.Linear(6, 6), head=nn.Linear(6, 3))
    x = torch.rand(40, 6)
    _, report = pruned(model, x, sparsity=0.5)
    assert {row.name for row in report.layers} == {"shared", "head"}
    assert report.provenance["mode"] == "parallel"
    assert report.head[1] == "parallel mode, since cascade would leave layers that are not called exactly once: shared"
    _, cascade = pruned(model, x, sparsity=0.5, mode="cascade")
    assert [row.name for row in cascade.layers] == ["head"]


def test_a_run_keeps_the_mode_that_it_began_with(tmp_path):
    model, x = chain()
    pruned(model, x, sparsity=0.5, run=tmp_path)
    assert verify(model, x, tmp_path).complete
    pruned(model, x, sparsity=0.5, mode="cascade", run=tmp_path)
    with pytest.raises(InvalidInput, match="expected 1 in cascade"):
        pruned(model, x, sparsity=0.5, jobs=2, run=tmp_path)
    with pytest.raises(OtherRun, match="mode"):
        pruned(model, x, sparsity=0.5, mode="parallel", run=tmp_path)


@pytest.mark.parametrize(
    ("error", "layers", "mode", "expected"),
    [
        (0.7, [0.3, 0.1], "parallel", "0.7, is more than twice that of any of its layers, 0.3 at most"),
        (0.7, [0.3, 0.1], "parallel", "mode='cascade' lets each make up"),
        (0.7, [0.3, 0.1], "cascade", "ask for less"),
        (0.6, [0.3, 0.1], "parallel", None),
        (0.7, [], "parallel", None),
        (0.7, [float("nan"), 0.2], "parallel", "0.2 at most"),
    ],
)
def test_errors_that_add_up_are_said(error, layers, mode, expected):
    found = amplified(error, [SimpleNamespace(output_error=value) for value in layers], mode)
    assert expected in found[0] if expected else not found
