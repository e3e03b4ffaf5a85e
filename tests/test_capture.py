import copy
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from convexprune.capture import as_batches, capture, network_outputs
from convexprune.errors import EmptyCalibration
from convexprune.matrices import input_matrices, weight_matrices
from convexprune.solvers.errors import InvalidInput, NonFinite


class Net(nn.Module):
    """Linear layers ``fc`` (4 to 4) and ``out`` (4 to 2) around a given function."""

    def __init__(self, between, **modules):
        super().__init__()
        self.fc, self.out, self.between = nn.Linear(4, 4), nn.Linear(4, 2), between
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.out(self.between(self, x, self.fc(x)))


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def activation(between, batch=None, **modules):
    batch = torch.randn(3, 4) if batch is None else batch
    return capture(Net(between, **modules), [batch], ["fc"]).layers["fc"].activation


def relu_in_place(net, x, y):
    y.relu_()
    return y


def relu_of_a_view_then_the_whole(net, x, y):
    y.view(-1).relu_()
    return y + x


def added_before_relu_in_place(net, x, y):
    total = y + x
    return total + y.relu_()


def relu_in_a_custom_function(net, x, y):
    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clamp(min=0)

    return Clip.apply(y)


RELU = {
    "functional": lambda net, x, y: F.relu(y),
    "functional in place": lambda net, x, y: F.relu(y, inplace=True),
    "torch": lambda net, x, y: torch.relu(y),
    "method": lambda net, x, y: y.relu(),
    "in place": relu_in_place,
    "in place, used later": lambda net, x, y: y.relu_() + y,
    "in place through a view, used later": relu_of_a_view_then_the_whole,
    "clamp": lambda net, x, y: y.clamp(min=0),
    "clamp by position": lambda net, x, y: torch.clamp(y, 0.0),
    "clamp_min": lambda net, x, y: y.clamp_min_(0),
    "twice": lambda net, x, y: F.relu(y) + torch.relu(y),
    "flattened": lambda net, x, y: F.relu(y.flatten(0)).reshape(3, 4),
    "transposed": lambda net, x, y: F.relu(y.T.contiguous().permute(1, 0)),
    "viewed": lambda net, x, y: y.view(3, 2, 2).relu().reshape(3, 4),
    "cloned": lambda net, x, y: y.clone().to(torch.float64).relu().float(),
    "shape read": lambda net, x, y: F.relu(y) * y.size(0) * y.shape[1] * y.dim() * len(y),
    "custom function": relu_in_a_custom_function,
}


@pytest.mark.parametrize("case", RELU)
def test_only_relu_follows(case):
    assert activation(RELU[case]) == "relu"


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.ReLU()),
        nn.Sequential(nn.Dropout1d(0.9), nn.AlphaDropout(0.9), nn.Flatten(), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Unflatten(1, (2, 2)), nn.ReLU(), nn.Flatten()),
    ],
)
def test_only_a_relu_module_follows(module):
    assert activation(lambda net, x, y: net.act(y), act=module) == "relu"


OTHER = {
    "gelu": lambda net, x, y: F.gelu(y),
    "sigmoid": lambda net, x, y: y.sigmoid(),
    "tanh": lambda net, x, y: y.tanh_(),
    "softmax": lambda net, x, y: F.softmax(y, dim=-1),
    "leaky_relu": lambda net, x, y: F.leaky_relu(y),
    "linear": lambda net, x, y: y,
    "add": lambda net, x, y: F.relu(y + x),
    "clamp": lambda net, x, y: y.clamp(0, 6),
    "clamp_min": lambda net, x, y: y.clamp_min(0.1),
    "layer_norm": lambda net, x, y: F.layer_norm(y, (4,)),
    "dropout": lambda net, x, y: F.relu(F.dropout(y, 0.5, training=True)),
    "getitem": lambda net, x, y: F.relu(y[:, [0, 1, 2, 3]]),
    "cat": lambda net, x, y: torch.cat([y[:, :0].relu(), y], 1) if False else torch.cat((y,)).relu(),
    "several: relu, add": lambda net, x, y: F.relu(y) + y,
    "several: add, relu": added_before_relu_in_place,
    "several: relu, mul": lambda net, x, y: (F.relu(y.view(-1)).view(3, 4), x * y)[0],
    "several: relu, item": lambda net, x, y: F.relu(y) * y.view(-1)[:1].sum() if False else scaled_by_an_entry(y),
}


def scaled_by_an_entry(y):
    z = F.relu(y)
    return z * float(np.sum(y.tolist())) if False else z * y.reshape(-1)[0].item()
