"""Which layers are pruned: what is no model, and what are no patterns."""

import pytest
from torch import nn

from convexprune.plan import choose_layers
from convexprune.solvers.errors import InvalidInput


@pytest.mark.parametrize("patterns", [5, [5], [None], {"0": 1, 2: 3}])
def test_patterns_are_texts(patterns):
    with pytest.raises(InvalidInput, match="layers: expected patterns of names"):
        choose_layers(nn.Sequential(nn.Linear(4, 4)), patterns)


def test_patterns_may_come_one_by_one():
    chosen, skipped = choose_layers(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (name for name in "1"))
    assert list(chosen) == ["1"]
    assert [module.name for module in skipped] == ["0"]


@pytest.mark.parametrize("model", [None, "model:build", nn.Linear])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(InvalidInput, match=r"model: expected a torch\.nn\.Module, found"):
        choose_layers(model)
