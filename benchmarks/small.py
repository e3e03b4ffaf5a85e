"""Small networks on scikit-learn's 8 × 8 digits, each trained in seconds: no files, no network access."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from convexprune.cli.demo import Digits, load_digits, train_digits_network

__all__ = ["SMALL", "train"]


class Block(nn.Module):
    """Two convolutions with norms, and what they are added to."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Attention(nn.Module):
    """A pre-norm transformer's block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Each row of pixels is a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, 32), nn.Parameter(0.1 * torch.randn(8, 32))
        self.blocks = nn.Sequential(Attention(32), Attention(32))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x[:, 0]) + self.place)).mean(1))


def cnn() -> nn.Module:
    """Three convolutions with norms and a max pool."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )


def resnet() -> nn.Module:
    """A stem and three residual blocks at two sizes."""
    stem = (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    down = (nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(
        *stem, Block(16), *down, Block(32), Block(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


SMALL: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "resnet": resnet, "transformer": Transformer}


def train(name: str) -> tuple[nn.Module, Digits]:
    """One of ``SMALL``, or "mlp", trained on 1,300 digits, and these, images [n, 1, 8, 8] or [n, 64] for the MLP."""
    data = load_digits()
    if name == "mlp":
        return train_digits_network(data), data
    data = Digits(data.x_train.view(-1, 1, 8, 8), data.y_train, data.x_test.view(-1, 1, 8, 8), data.y_test)
    torch.manual_seed(0)
    model, epochs = SMALL[name](), 25
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.x_train)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(data.x_train[batch]), data.y_train[batch]).backward()
            optimiser.step()
        schedule.step()
    return model.eval(), data
