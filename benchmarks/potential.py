"""Prune potential and excess error of ResNet-20 on CIFAR-10, by method, before and after a short fine-tuning.

    python benchmarks/potential.py [--data ../shared/data]

Weights go by magnitude, ``sipp``, ``pfp`` (filters), Net-Trim (an error for each layer), exact budgets and SynFlow, at
several ratios. Three regimes: pruned; pruned and fine-tuned; pruned and fine-tuned on images of which each had one of
nine corruptions of random severity ("mix 1" of Liebenwein et al., 2021), with the others ("mix 2") held out. The parent
of a regime is the dense network, fine-tuned likewise. All are evaluated on the same images: nominal, all corruptions at
one severity, and uniform noise. A series is a file in the folder as soon as it is done, and is not made again; so
``--methods`` may be given to several processes, and all are shown where the last of them has ended.
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from resnet20 import MEAN, STD
from rich.console import Console
from rich.table import Table
from torch import nn
from trained import Images, cifar10, load, train_

from convexprune import Data, Eps, Neurons, Options, Sparsity, keep_masks_, make_permanent_, prune_
from convexprune.evaluation import Noise, Series, compare, corrupted, evaluate_series
from convexprune.pruners import Pruner
from convexprune.pruners.pfp import PFP
from convexprune.pruners.sipp import SiPP
from convexprune.pruners.synflow import SynFlow
from convexprune.targets import Target

__all__ = ["main"]

MIX1 = ("contrast", "elastic", "gaussian_blur", "impulse_noise", "motion_blur")
MIX1 = (*MIX1, "pixelate", "shot_noise", "snow", "zoom_blur")
METHODS = ("magnitude", "sipp", "pfp", "net-trim", "budget", "synflow")
EPS = (0.02, 0.05, 0.08, 0.1, 0.13, 0.16, 0.2, 0.24)
FILTERS = (0.02, 0.05, 0.08, 0.1, 0.2, 0.3, 0.4, 0.5)
RATIOS = (0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
REGIMES = ("pruned", "fine-tuned", "fine-tuned on mix 1")


def targets(method: str, args: argparse.Namespace) -> Sequence[Target]:
    """How far each network of a series is pruned."""
    if method == "net-trim":
        return [Eps(eps) for eps in args.eps]
    if method == "pfp":
        return [Neurons(part, "network") for part in args.filters]
    return [Sparsity(ratio, "layer" if method == "budget" else "network") for ratio in args.ratios]


def prune(dense: nn.Module, method: str, target: Target, images: torch.Tensor, args: argparse.Namespace) -> nn.Module:
    """A copy of the network, pruned; fitted to images if the method looks at data."""
    model = copy.deepcopy(dense)
    count = {"magnitude": 0, "synflow": 0, "sipp": args.few, "pfp": args.few}.get(method, args.samples)
    own = {"synflow": SynFlow(shape=(3, 32, 32)), "sipp": SiPP(variant="deterministic"), "pfp": PFP(sampling="top")}
    pruner: str | Pruner = own.get(method, method)
    options = Options(mode="cascade" if method in ("net-trim", "budget") else None)
    prune_(model, Data(images[:count]) if count else None, target, method=pruner, options=options)
    return model


def mixed(images: Images, seed: int) -> Images:
    """Each image with one of the corruptions of mix 1, of a severity from 0 to 5, at random."""
    x, y = images
    draws = torch.randint(len(MIX1) * 6, (len(x),), generator=torch.Generator().manual_seed(seed))
    x = x.clone()
    std, shift = torch.tensor(STD)[:, None, None], torch.tensor(MEAN)[:, None, None]
    for number, (name, severity) in enumerate(product(MIX1, range(6))):
        chosen = (draws == number).nonzero()[:, 0]
        if severity and len(chosen):
            pixels = (x[chosen] * std + shift).clamp(0, 1)
            x[chosen] = (corrupted(pixels, name, severity, seed=seed) - shift) / std
    return x, y


def tuned(model: nn.Module, train: Images, args: argparse.Namespace) -> nn.Module:
    """A copy, fine-tuned; weights that are 0 stay 0."""
    model = copy.deepcopy(model)
    keep_masks_(model)
    train_(model, train, args.steps, 0.01, args.seed)
    make_permanent_(model)
    return model


def series(args: argparse.Namespace, console: Console) -> dict[tuple[str, str], Series]:
    """All of them, by regime and method."""
    files = {pair: args.out / f"{'-'.join(pair).replace(' ', '-')}.json" for pair in product(REGIMES, args.methods)}
    if all(path.exists() for path in files.values()):
        return {pair: Series.load(path) for pair, path in files.items()}
    train, test = cifar10(args.data, args.images, args.tests)
    sets: Mapping[str, Images | None] = dict(zip(REGIMES, (None, train, mixed(train, args.seed)), strict=True))
    dense = load("resnet-20", args.data)[0]
    parents = {regime: dense if data is None else tuned(dense, data, args) for regime, data in sets.items()}
    few = train[0][torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(args.seed))]
    for method in args.methods:
        if all(files[regime, method].exists() for regime in REGIMES):
            continue
        pruned = [prune(dense, method, target, few, args) for target in targets(method, args)]
        for regime, data in sets.items():
            models = (
                [tuned(model, data, args) for model in pruned[-args.networks :]] if data else pruned[: args.networks]
            )
            own = {"mean": MEAN, "std": STD, "noise": Noise(images=500, draws=1), "severities": (args.severity,)}
            found = evaluate_series(models, test, parent=parents[regime], name=f"{method}, {regime}", **own)
            found.save(files[regime, method])
            console.print(found.table(160))
    return {pair: Series.load(path) for pair, path in files.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is not there yet, and show all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("potential"), help="folder of the series")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--eps", nargs="+", type=float, default=EPS, help="of Net-Trim")
    parser.add_argument("--filters", nargs="+", type=float, default=FILTERS, help="of pfp")
    parser.add_argument(
        "--networks",
        type=int,
        default=6,
        help="so many are evaluated: the least pruned ones as they are, the most pruned ones after fine-tuning",
    )
    parser.add_argument("--images", type=int, default=20000, help="for training")
    parser.add_argument("--tests", type=int, default=2500)
    parser.add_argument("--samples", type=int, default=256, help="for methods that fit layers to data")
    parser.add_argument("--few", type=int, default=100, help="for coresets")
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning, 128 images each")
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument(
        "--deltas", nargs="+", type=float, default=[0.005, 0.02], help="losses of accuracy that count as none"
    )
    parser.add_argument("--seed", type=int, default=0)
    args, console = parser.parse_args(argv), Console(width=160)
    args.out.mkdir(parents=True, exist_ok=True)
    found = series(args, console)
    for delta in args.deltas:
        for regime in REGIMES:
            own = [found[regime, method] for method in args.methods]
            console.print(f"{regime}:", compare(own, delta=delta, width=160))
        console.print(mixes(found, args.methods, delta))


def mixes(found: Mapping[tuple[str, str], Series], methods: Sequence[str], delta: float) -> Table:
    """The mean prune potential over corruptions that one regime trained on, and over the others."""
    shown = Table(title=f"mean prune potential over mix 1 (trained on) and mix 2 (held out), delta {delta:g}")
    for heading in ("method", *(f"{regime}, {mix}" for regime in REGIMES for mix in ("mix 1", "mix 2"))):
        shown.add_column(heading, justify="right")
    for method in methods:
        cells = []
        for regime in REGIMES:
            one = found[regime, method]
            values = [each.value for each in one.prune_potential(delta).distributions.values()]
            pairs = [(row.name, value) for row, value in zip(one.parent.rows, values, strict=True) if row.severity]
            cells += [f"{mean(v for name, v in pairs if (name in MIX1) is trained):.3f}" for trained in (True, False)]
        shown.add_row(method, *cells)
    return shown


if __name__ == "__main__":
    main()
