"""Magnitude pruning keeps exactly the largest entries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convexprune.baselines import magnitude_prune_
from convexprune.solvers.errors import InvalidInput


@given(keep=st.integers(0, 20), ties=st.booleans())
def test_the_kept_entries_are_the_largest_and_exactly_as_many(keep: int, ties: bool) -> None:
    layer = nn.Linear(5, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.ones(4, 5) if ties else torch.randperm(20).view(4, 5) + 1.0)
    bias, before = layer.bias.clone(), layer.weight.clone()
    magnitude_prune_(layer, {"": keep})
    kept = layer.weight != 0
    assert int(kept.sum()) == keep
    assert torch.equal(layer.weight[kept], before[kept])
    assert torch.equal(layer.bias, bias)
    if 0 < keep < 20:
        assert before[kept].min() >= before[~kept].max()


@pytest.mark.parametrize("keep", [{"0": 21}, {"0": -1}, {"7": 3}, {"1": 3}])
def test_impossible_requests_change_nothing(keep: dict[str, int]) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
    before = model[0].weight.clone()
    with pytest.raises(InvalidInput):
        magnitude_prune_(model, {"0": 3} | keep if "0" not in keep else keep)
    assert torch.equal(model[0].weight, before)
