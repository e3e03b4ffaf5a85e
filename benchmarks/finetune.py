"""A short fine-tuning in which zeros stay zeros."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from convexprune.masks import keep_masks_, make_permanent_

__all__ = ["finetune_"]


def finetune_(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, rate: float, seed: int) -> None:
    """Adam with a cosine, batches of 128; weights that are 0 stay 0."""
    x, y = data
    shuffle = torch.Generator().manual_seed(seed)
    keep_masks_(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    steps = len(x) // 128
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, epochs * steps))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=shuffle)[: steps * 128].view(steps, 128):
            optimiser.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
            schedule.step()
    model.eval()
    make_permanent_(model)
