"""The demo's data and network: scikit-learn's 8 x 8 digits, and an MLP that learns them in seconds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convexprune.solvers.errors import MissingExtra

_TRAIN = 1300  # of 1,797 images
_EPOCHS = 30
_BATCH = 50


@dataclass(frozen=True, eq=False)
class Digits:
    """The split data: images as float32 pixels in [0, 1], [n, 64], and int64 labels, [n]."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_digits() -> Digits:
    """Return scikit-learn's embedded digits in a fixed split, 1,300 to train and 497 to test; nothing is downloaded.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingExtra('The digits come with scikit-learn: pip install "convexprune[demo]".') from error
    images, labels = load(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(images).float()[order] / 16
    y = torch.from_numpy(labels).long()[order]
    return Digits(x[:_TRAIN], y[:_TRAIN], x[_TRAIN:], y[_TRAIN:])


@torch.enable_grad()
def train_digits_network(
    data: Digits, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> nn.Sequential:
    """Train the MLP 64-128-64-10 with Adam; the seed decides everything and the global random state is left alone.

    Args:
        data: What ``load_digits`` returns.
        seed: Of the first weights and the order of the samples.
        progress: Called after each epoch with the epochs done and their total.

    Returns:
        The trained network, in eval mode.
    """
    model = _network(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _EPOCHS)
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(_EPOCHS):
        for batch in torch.split(torch.randperm(len(data.x_train), generator=shuffle), _BATCH):
            loss = nn.functional.cross_entropy(model(data.x_train[batch]), data.y_train[batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        schedule.step()
        if progress is not None:
            progress(epoch + 1, _EPOCHS)
    return model.eval()


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
