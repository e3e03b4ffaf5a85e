"""SynFlow at initialisation: where layers collapse, and what networks pruned before their training then learn.

    python benchmarks/synflow.py collapse accuracy [--data ../shared/data]

``collapse``: VGG-11, VGG-16 and a ResNet-18 with stems for 32 × 32 images and batch norms, at half their width, by the
compression at which a method first empties a layer; and VGG-16 at full width, beside the published densities at 10³.
``accuracy``: a narrow VGG on CIFAR-10, halved to 16 × 16, pruned at initialisation and then trained in a few epochs. Of
SynFlow's masks there are two variants: "shuffled", where the weights that stay lie anywhere in their layer, and
"re-initialised", where they are drawn anew. A line a run goes to a .jsonl file as soon as it is done, and runs that
are there already are not made again.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from trained import Kept, cifar10, finetune_

from convexprune import Options, Sparsity, prune_
from convexprune.costs import accuracy
from convexprune.pruners import Pruner
from convexprune.pruners.synflow import SynFlow

__all__ = ["main", "resnet18", "vgg"]

POOL = 0
VGG = {
    "vgg-11": (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512),
    "vgg-16": (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512),
    "narrow": (16, 16, POOL, 32, 32, POOL, 64, 64, POOL, 128, 128),
}
SHAPES = {"collapse": (3, 32, 32), "accuracy": (3, 16, 16)}
# Of VGG-16 with batch norms for CIFAR-100 at a compression of 10³, from the authors' own record of a run
# (github ganguli-lab/Synaptic-Flow); 14,762 of 14,761,664 weights.
PUBLISHED = (
    0.435,
    0.0329,
    0.0140,
    0.0076,
    0.0037,
    0.0019,
    0.0018,
    0.00090,
    0.00046,
    0.00046,
    0.00042,
    0.00042,
    0.00042,
    0.0228,
)
# Mean test accuracy in % of three runs on CIFAR-10, VGG-11 with batch norms, at 1, 10, 100 and 1,000, from the same.
CURVES = {
    "random": (92.0, 88.7, 73.7, 12.3),
    "magnitude": (92.0, 90.9, 85.2, 10.0),
    "synflow": (92.1, 91.0, 86.8, 76.9),
}


def vgg(widths: Sequence[int], classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """Convolutions of 3 × 3 with batch norms, in the end a mean over positions and one linear layer."""
    layers, inputs = list[nn.Module](), 3
    for outputs in widths:
        if outputs == POOL:
            layers.append(nn.MaxPool2d(2))
            continue
        outputs = round(width * outputs)
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return _initialised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)))


class Block(nn.Module):
    """Two convolutions, and a shortcut with a convolution of 1 × 1 where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def resnet18(classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """Four stages of two blocks behind a convolution of 3 × 3."""
    channels = [round(width * outputs) for outputs in (64, 128, 256, 512)]
    stem = [nn.Conv2d(3, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()]
    blocks = [
        Block(inputs if first else outputs, outputs, 2 if first and inputs != outputs else 1)
        for inputs, outputs in zip([channels[0], *channels], channels, strict=False)
        for first in (True, False)
    ]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return _initialised(nn.Sequential(*stem, *blocks, *pool, nn.Linear(channels[-1], classes)))


def _initialised(model: nn.Sequential) -> nn.Sequential:
    """Weights as He et al. (2015) draw them, biases 0."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model.eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Of the layers, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    return {name: layer.weight.data for name, layer in layers.items()}


def prune_at_(model: nn.Module, method: str, compression: float, shape: tuple[int, ...], seed: int = 0) -> float:
    """Leave one weight of so many; the seconds that this took."""
    pruners: dict[str, str | Pruner] = {
        "synflow": SynFlow(shape=shape),
        "synflow, one round": SynFlow(rounds=1, shape=shape),
    }
    began, total = time.perf_counter(), sum(W.numel() for W in weights(model).values())
    if compression > 1:
        target = Sparsity(max(1, round(total / compression)), scope="network")
        prune_(model, None, target, method=pruners.get(method, method), options=Options(seed=seed))
    return time.perf_counter() - began


# Layer collapse


@dataclass(frozen=True)
class Collapse:
    """The part of each layer's weights that stays."""

    network: str
    width: float
    method: str
    compression: float
    densities: tuple[float, ...]
    seconds: float

    @property
    def empty(self) -> int:
        """Layers without a weight."""
        return sum(density == 0 for density in self.densities)


COLLAPSE = ("random", "magnitude", "synflow, one round", "synflow")


def collapse(network: str, width: float, method: str, compression: float) -> Collapse:
    """One network pruned at initialisation."""
    torch.manual_seed(0)
    classes = 100 if width == 1 else 10
    model = resnet18(classes, width) if network == "resnet-18" else vgg(VGG[network], classes, width)
    seconds = prune_at_(model, method, compression, SHAPES["collapse"])
    densities = tuple(float((W != 0).double().mean()) for W in weights(model).values())
    return Collapse(network, width, method, compression, densities, seconds)


def collapses(args: argparse.Namespace, console: Console) -> None:
    """All of them, as two tables."""
    kept = Kept(args.out / "collapse.jsonl", Collapse, _collapse_key, console)
    powers = [10.0**alpha for alpha in args.alphas]
    shown = Table(title="layers without a weight, by compression")
    for heading in ("network", "method", *(f"{power:g}" for power in powers)):
        shown.add_column(heading, justify="right")
    for network, method in product(args.networks, COLLAPSE):
        runs = [_collapsed(kept, network, args.width, method, power) for power in powers]
        shown.add_row(network, method, *(str(run.empty or "–") for run in runs))
    console.print(shown)
    for network in args.networks:
        each = Table(title=f"{network}, width × {args.width:g}: densities by layer, in %")
        runs = [_collapsed(kept, network, args.width, m, 10.0**a) for a in args.alphas[1:] for m in COLLAPSE]
        _densities(each, {f"{run.method} {run.compression:g}": run.densities for run in runs}, console)
    if args.published:
        full = _collapsed(kept, "vgg-16", 1.0, "synflow", 1e3)
        beside = {"published": PUBLISHED, "ours": full.densities}
        _densities(Table(title="vgg-16, full width, at 1,000: densities in %"), beside, console)


def _collapse_key(run: Collapse) -> object:
    return run.network, run.width, run.method, run.compression


def _collapsed(kept: Kept[Collapse], network: str, width: float, method: str, compression: float) -> Collapse:
    make = partial(collapse, network, width, method, compression)
    return kept.get((network, width, method, compression), make)


def _densities(table: Table, rows: dict[str, Sequence[float]], console: Console) -> None:
    table.add_column("", no_wrap=True)
    for number in range(max(map(len, rows.values()))):
        table.add_column(str(number + 1), justify="right")
    for name, densities in rows.items():
        table.add_row(name, *(f"{100 * density:.2g}" for density in densities))
    console.print(table)


# Accuracy after training


@dataclass(frozen=True)
class Trained:
    """A network pruned at initialisation, and trained."""

    method: str
    compression: float
    seed: int
    images: int
    epochs: int
    weights: int
    accuracy: float
    seconds: float


ACCURACY = ("random", "magnitude", "synflow", "synflow, shuffled", "synflow, re-initialised")


def trained(method: str, compression: float, seed: int, args: argparse.Namespace) -> Trained:
    """Drawn, pruned, varied and trained."""
    torch.manual_seed(seed)
    model = vgg(VGG["narrow"])
    start = copy.deepcopy(model)
    base, _, variant = method.partition(", ")
    prune_at_(model, base, compression, SHAPES["accuracy"], seed)
    if variant == "re-initialised":
        start = vgg(VGG["narrow"])
    for W, drawn in zip(weights(model).values(), weights(start).values(), strict=True):
        mask = (W != 0).flatten()
        if variant == "shuffled":
            mask = mask[torch.randperm(len(mask))]
        W.copy_(drawn * mask.view_as(W))
    began, (train, test) = time.perf_counter(), images(args.data, args.images, args.tests)
    finetune_(model, train, args.epochs, 3e-3, seed)
    kept = sum(int(W.count_nonzero()) for W in weights(model).values())
    seconds = time.perf_counter() - began
    return Trained(method, compression, seed, args.images, args.epochs, kept, accuracy(model, *test), seconds)


def images(data: Path, count: int, tests: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """So many training and test images and their labels, as many of each class, halved to 16 × 16."""
    return tuple((F.avg_pool2d(x, 2), y) for x, y in cifar10(data, count, tests))  # type: ignore[return-value]


def accuracies(args: argparse.Namespace, console: Console) -> None:
    """All of them, as a table: the median of the seeds, the least and the most."""

    def key(run: Trained) -> object:
        return run.method, run.compression, run.seed, run.images, run.epochs

    kept, found = Kept(args.out / "accuracy.jsonl", Trained, key, console), dict[tuple[str, float], list[float]]()
    for seed, compression in product(range(args.seeds), (1.0, *args.compressions)):
        for method in ACCURACY if compression > 1 else ("dense",):
            make = partial(trained, method, compression, seed, args)
            run = kept.get((method, compression, seed, args.images, args.epochs), make)
            found.setdefault((method, compression), []).append(100 * run.accuracy)
    shown = Table(title=f"test accuracy in %, {args.images:,} images, {args.epochs} epochs: median (least–most)")
    for heading in ("method", *(f"{compression:g}" for compression in args.compressions)):
        shown.add_column(heading, justify="right")
    dense = found["dense", 1.0]
    for method in ACCURACY:
        cells = [found[method, compression] for compression in args.compressions]
        shown.add_row(method, *(f"{median(cell):.1f} ({min(cell):.1f}–{max(cell):.1f})" for cell in cells))
        if method in CURVES:
            shown.add_row(f"published, {method}", *(f"{value:.1f}" for value in CURVES[method][1:]))
    console.print(shown, f"dense: {median(dense):.1f} ({min(dense):.1f}–{max(dense):.1f}); published: 92.0")


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is not there yet, and show all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["collapse", "accuracy"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("synflow"), help="folder of the .jsonl files")
    parser.add_argument("--networks", nargs="+", default=["vgg-11", "vgg-16", "resnet-18"])
    parser.add_argument("--alphas", nargs="+", type=float, default=[0, 1, 2, 3, 4, 5], help="compressions are 10^alpha")
    parser.add_argument("--width", type=float, default=0.5, help="of the networks of `collapse`")
    parser.add_argument("--published", action=argparse.BooleanOptionalAction, default=True, help="VGG-16, full width")
    parser.add_argument("--compressions", nargs="+", type=float, default=[10, 100, 1000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--tests", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=8)
    args, console = parser.parse_args(argv), Console(width=260)
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        (collapses if part == "collapse" else accuracies)(args, console)


if __name__ == "__main__":
    main()
