"""Small networks and their data that tests of scores share, and which of their weights are not zero."""

from collections.abc import Callable, Mapping

import pytest
import torch
from networks import JOINT
from torch import Tensor, nn


class Attending(nn.Module):
    """Attention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend, self.head = (
            nn.Linear(8, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).relu()
        return self.head(self.attend(x, x, x, need_weights=False)[0]).mean(1)


class Tied(nn.Module):
    """Two layers with one weight, and one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).relu()).relu())


def cnn(bias: bool = True) -> nn.Sequential:
    """Batch norms with statistics, and a grouped convolution."""
    model = nn.Sequential(
        *(nn.Conv2d(4, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(
            nn.Conv2d(8, 8, 3, groups=2, bias=bias),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8, 4, bias=bias),
        ),
    )
    model.train()(torch.rand(64, 4, 8, 8))
    return model.eval()


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12, bias), nn.ReLU(), nn.Linear(12, 12, bias), nn.ReLU(), nn.Linear(12, 4, bias))


def conv1d() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(40, 4)
    )


def transposed() -> nn.Sequential:
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    return nn.Sequential(kind(12, 8), nn.ReLU(), kind(4, 12))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (8,)),
    "cnn": (cnn, (4, 8, 8)),
    "conv1d": (conv1d, (4, 8)),
    "attention": (Attending, (5, 8)),
    "tied": (Tied, (8,)),
    "transposed": (transposed, (8,)),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """In eval mode, with 96 samples."""
    torch.manual_seed(seed)
    make, shape = NETWORKS[name]
    return make().eval(), torch.randn(96, *shape)


def nonzeros(model: nn.Module) -> dict[str, Tensor]:
    """Masks of weights with two axes or more, by name, each tensor once."""
    return {name: p != 0 for name, p in model.named_parameters() if p.dim() > 1}


def kept(model: nn.Module) -> int:
    return sum(int(mask.sum()) for mask in nonzeros(model).values())


def images() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with a norm, a flattened map and dropout; 48 images that are not square, and a label of each."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(5 * 4 * 3, 8), nn.ReLU(), nn.Linear(8, 3)),
    )
    x = torch.randn(48, 2, 6, 5)
    with torch.no_grad():
        model.train()(x)
    return model.eval(), x, torch.randint(0, 3, (48,))


def joint(name: str, samples: int = 30) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of ``networks.JOINT``, most of them residual, with batch norms that have seen something."""
    torch.manual_seed(0)
    make, shape = JOINT[name]
    model, x = make(), torch.randn(samples, *shape)
    with torch.no_grad():
        model.train()(x)
    return model.eval(), x, torch.randint(0, 2, (samples,))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
