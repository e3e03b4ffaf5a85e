"""Batch norms as the coreset methods see them: folded into the neurons where that is true, and refused where not."""

import pytest
import torch
from calls import coreset_prune_
from torch import nn

from convexprune.network.links import find_links
from convexprune.pruners.views import incoming_of
from convexprune.solvers.errors import InvalidInput, NonFinite


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, **options), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize(
    ("name", "value"),
    [("running_var", -1.0), ("running_var", torch.nan), ("running_mean", torch.inf), ("bias", torch.nan)],
)
def test_norms_that_make_no_numbers_are_named(name, value):
    model = network()
    getattr(model[1], name).data[2] = value
    [link] = find_links(model)[0].values()
    with pytest.raises(NonFinite, match=r"^1: its statistics, weight or bias make NaN or infinity"):
        incoming_of(model, link)


@pytest.mark.parametrize("method", ["mussay", "lowner"])
def test_methods_that_bound_neurons_refuse_a_norm_by_the_batch(method):
    with pytest.raises(InvalidInput, match="norm by the batch then relu': nothing is known"):
        coreset_prune_(network(track_running_stats=False), torch.rand(20, 5), method, 0.5)


@pytest.mark.parametrize("method", ["uniform", "pfp"])
def test_methods_that_do_not_may_remove_its_neurons(method):
    model = network(track_running_stats=False)
    coreset_prune_(model, torch.rand(20, 5), method, 4)
    assert (model[0].out_features, model[1].num_features, model[3].in_features) == (4, 4, 4)
