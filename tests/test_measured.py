"""An error allowed of the network's outputs as it is measured: on the calibration data, and on what is held out."""

import copy
import json
import math

import pytest
import torch
from calls import prune_
from hypothesis import given
from hypothesis import strategies as st
from networks import Net
from promises import network_error
from torch import nn
from torch.nn import functional

from convexprune import Data, verify
from convexprune.errors import OtherRun
from convexprune.pruners.network_eps import _LEAST_EPS, next_level
from convexprune.runs.outcome import is_vacuous
from convexprune.solvers.errors import InvalidInput


class Residual(nn.Module):
    """Norms and additions: a product of operator norms says nothing of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6, 4)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = functional.gelu(x + norm(conv(x)))
        return self.head(x.mean((2, 3)))


def residual():
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(60, 1, 5, 5)
    model(x)  # in training mode: the norms see data
    return model.eval(), x


def normed():
    """A LayerNorm, of which no bound is known."""
    torch.manual_seed(0)
    own = {"up": nn.Linear(8, 12), "norm": nn.LayerNorm(12), "down": nn.Linear(12, 4)}
    return Net(lambda m, x: m.down(m.norm(m.up(x)).relu()), **own).eval(), torch.randn(80, 8)


@given(
    total=st.floats(1e-3, 2.0),
    factor=st.floats(0.05, 50.0),
    power=st.floats(0.4, 2.5),
    steps=st.sampled_from([0, 40, 400]),
)
def test_the_search_ends_close_below_the_total(total, factor, power, steps):
    """For an error that is a power of the level, in steps or not: within the total, and not far below it."""

    def error(level):
        if steps:
            level = math.ceil(level * steps) / steps
        return factor * level**power

    errors = {}
    while (level := next_level(errors, total, min(1.0, total))) is not None:
        errors[level] = error(level)
        assert len(errors) <= 12
    within = [level for level, e in errors.items() if e <= total]
    if not within:
        assert error(_LEAST_EPS) > total
    else:
        found = max(within)
        e = errors[found]
        assert found == 1.0 or e >= 0.9 * total or error(1.1 * found + 1 / (steps or math.inf)) > total


@pytest.mark.parametrize("make", [residual, normed])
@pytest.mark.parametrize(("mode", "objective"), [("parallel", "l1"), ("cascade", "nonzeros"), ("cascade", "l1")])
def test_the_measured_error_is_within_what_was_asked(make, mode, objective):
    dense, x = make()
    pruned, x, held_out = copy.deepcopy(dense), x[:40], x[40:]
    report = prune_(pruned, x, network_eps=0.3, mode=mode, objective=objective, holdout=held_out)
    assert report.certified
    assert report.nonzeros < 0.9 * report.nonzeros_before
    errors = [network_error(dense, pruned, data) for data in (x, held_out)]
    assert max(errors) <= 0.3 * (1 + 1e-6)  # forwards in float32 are rounded
    assert max(errors) > 0.24  # what is allowed is used
    assert errors == pytest.approx([report.network.error, report.network.holdout_error], rel=1e-3)
    assert report.network.guarantee == report.provenance["target"]["guarantee"] == "measured"
    text = " ".join(str(report).split())
    assert "as measured" in text
    assert "on held-out data (0.3 allowed)" in text
    data = json.loads(report.to_json())["network"]
    assert data["vacuous"] is report.network.vacuous
    assert ("vacuous" in text) is (report.network.vacuous and math.isfinite(report.network.bound))


def test_the_bound_prunes_nothing_where_it_is_vacuous():
    """The same total, guaranteed by the bound, leaves nearly all; measured, which is the default, it does not."""
    model, x = residual()
    measured = prune_(copy.deepcopy(model), x, network_eps=0.2, mode="parallel")
    bounded = prune_(copy.deepcopy(model), x, network_eps=0.2, guarantee="bound", mode="parallel")
    assert measured.network.vacuous
    assert measured.nonzeros < 0.9 * measured.nonzeros_before
    assert bounded.nonzeros > 0.95 * bounded.nonzeros_before


@pytest.mark.parametrize(
    ("bound", "error", "vacuous"),
    [(3924, 0.27, True), (0.9, 0.001, False), (1.5, 0.2, False), (1.5, 0.1, True), (1.5, 0.0, True), (0.0, 0.0, False)],
)
def test_a_bound_is_vacuous_above_one_and_ten_times_what_is_measured(bound, error, vacuous):
    assert is_vacuous(bound, error) is vacuous


def test_a_total_below_every_trial_leaves_all_as_trained_with_the_reason():
    model, x = residual()
    before = copy.deepcopy(model.state_dict())
    report = prune_(model, x, network_eps=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not report.layers
    assert {module.name for module in report.skipped if "asks for smaller eps" in module.reason} >= {"stem", "head"}
    assert report.head[0].startswith("nothing was pruned: 5 × left as trained: an error of 1e-06 of the network's")
    assert " ".join(str(report).split()).startswith(report.head[0][:60])
    assert not report.to_dict()["pruned"]


def test_a_run_that_was_stopped_goes_on_and_is_verified(tmp_path):
    model, x = residual()
    x, held_out = x[:40], x[40:]
    arguments = {"network_eps": 0.3, "mode": "cascade", "holdout": held_out}
    whole = copy.deepcopy(model)
    report = prune_(whole, x, **arguments)
    seen = []

    def late():
        return len(seen) >= 7

    def note(stage, done, total):
        if stage != "capture":
            seen.append(stage)

    cut = copy.deepcopy(model)
    stopped = prune_(cut, x, **arguments, run=tmp_path, stop=late, progress=note)
    assert stopped.provenance["stopped"]
    assert not stopped.certified
    assert not verify(model, Data(x, holdout=held_out), tmp_path).complete
    resumed = copy.deepcopy(model)
    again = prune_(resumed, x, **arguments, run=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert again.network.error == report.network.error
    found = verify(model, Data(x, holdout=held_out), tmp_path)
    assert found.ok
    assert found.complete
    with pytest.raises(OtherRun, match="other held-out data"):
        verify(model, x, tmp_path)


def test_words_that_contradict_each_other_are_refused():
    model, x = normed()
    with pytest.raises(InvalidInput, match="guarantee: expected 'measured' or 'bound', found 'sure'"):
        prune_(model, x, network_eps=0.1, guarantee="sure")
