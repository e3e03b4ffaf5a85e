"""The time of a whole evaluation of ResNet-20, against that of the forward passes that it takes.

    python benchmarks/evaluation.py [--data ../shared/data]

One network, pruned by magnitude, beside its parent: CIFAR-10's test images as they are and under all corruptions at one
severity, and uniform noise of 15 radii. Bare forwards are timed before and after, in batches of 256 and torch's usual
layout; the mean counts.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from resnet20 import MEAN, STD
from rich.console import Console
from torch import Tensor, nn
from trained import load

from convexprune import Sparsity, prune_
from convexprune.evaluation import Noise, evaluate

__all__ = ["main"]


def bare(model: nn.Module, images: Tensor) -> float:
    """Seconds of a forward for an image."""
    began = time.perf_counter()
    with torch.inference_mode():
        for batch in torch.split(images, 256):
            model(batch)
    return (time.perf_counter() - began) / len(images)


def main(argv: Sequence[str] | None = None) -> None:
    """Time all, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tests", type=int, default=10000)
    parser.add_argument("--sparsity", type=float, default=0.7)
    args, console = parser.parse_args(argv), Console(width=140)
    parent, _, (x, y) = load("resnet-20", args.data)
    x, y = x[: args.tests], y[: args.tests]
    model = copy.deepcopy(parent)
    prune_(model, None, Sparsity(args.sparsity, "network"), method="magnitude")
    each, noise = [bare(parent, x[:2000])], Noise()
    found = evaluate(model, (x, y), parent=parent, mean=MEAN, std=STD, noise=noise)
    each.append(bare(parent, x[:2000]))
    forwards = 2 * (len(found.rows) * len(x) + len(noise.radii) * min(noise.images, len(x)) * noise.draws)
    console.print(found.table(140))
    own = mean(each) * forwards
    console.print(
        f"{forwards:,} forwards of two networks: {found.seconds:.0f} s for everything, {own:.0f} s for bare forwards, "
        f"ratio {found.seconds / own:.2f}; {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
