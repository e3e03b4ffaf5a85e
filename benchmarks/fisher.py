"""Fisher pruning of ResNet-20's channels beside other methods, and the two findings of its paper.

    python benchmarks/fisher.py channels findings [--data ../shared/data]

``channels``: from one start, ResNet-20 fine-tuned on JPEG-coded CIFAR-10 training images, channels inside the blocks go
by Fisher information, magnitude, coresets (``mussay``), group Net-Trim and at random, level after level; every method
takes as many steps of the same stochastic gradient descent between two levels as Fisher pruning takes while it removes,
and then a short fine-tuning at each level, on a copy.
``findings``: a ResNet-20 trained on halved images is pruned by Fisher information, and beside it at as many weights are
trained from scratch: a network with all layers narrower by one factor, and one with the channels that pruning left,
once for the time that pruning took, and once for the time of the large network's training, too.
A line a run goes to a .jsonl file as soon as it is done, and runs that are there already are not made again.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from resnet20 import build
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from trained import Images, Kept, cifar10, load, train_

from convexprune import Data, Neurons, Options, prune_
from convexprune.costs import accuracy, flops
from convexprune.profiles import Profile, build_from_profile
from convexprune.pruners import Pruner
from convexprune.pruners.fisher import Fisher

__all__ = ["main"]

DENSE = "dense"
METHODS = ("fisher", "magnitude", "mussay", "net-trim", "random")
RATE = 8e-4  # of the published fine-tuning while channels go
BATCH = 128


@dataclass(frozen=True)
class Run:
    """A network at one level."""

    method: str
    level: float  # the part of the channels inside blocks that stays
    seed: int
    steps: int  # of fine-tuning before the level was reached
    weights: int
    flops: int  # of one image
    before: float  # accuracy before the short fine-tuning
    after: float
    seconds: float


def size(model: nn.Module) -> tuple[int, int]:
    """Weights of layers, and operations for one image."""
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    return weights, flops(model, torch.zeros(1, 3, 32, 32)).dense


def channels(model: nn.Module) -> int:
    """Those inside the blocks."""
    return sum(Profile.of(model).widths.values())


def level_(model: nn.Module, method: str, left: int, train: Images, args: argparse.Namespace, seed: int) -> int:
    """Leave so many channels, and train for as many steps as Fisher pruning takes; how many these are."""
    gone = channels(model) - left
    steps, target = gone * args.every, Neurons(gone / (gone + left), scope="network")
    if method == "fisher":
        data = Data(train[0], BATCH, labels=train[1])
        pruner: str | Pruner = Fisher(steps=args.every, learning_rate=RATE, augment="crop and flip")
        prune_(model, data, target, method=pruner, options=Options(seed=seed))
        return steps
    chosen = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[: args.samples]
    data = None if method in ("magnitude", "random") else Data(train[0][chosen])
    prune_(model, data, target, method=method, options=Options(seed=seed))
    train_(model, train, steps, RATE, seed, constant=True)
    return steps


def started(seed: int, train: Images, args: argparse.Namespace) -> nn.Module:
    """ResNet-20, fine-tuned on JPEG-coded images."""
    model = load("resnet-20", args.data)[0].to(memory_format=torch.channels_last)
    train_(model, train, args.start, 0.01, seed)
    return model


def path(
    model: nn.Module, method: str, seed: int, train: Images, test: Images, args: argparse.Namespace
) -> Iterator[Run]:
    """One method from level to level; nothing but the short fine-tuning for "dense"."""
    every, steps = channels(model), 0
    for level in (1.0,) if method == DENSE else args.levels:
        began = time.perf_counter()
        if method != DENSE:
            steps += level_(model, method, round(level * every), train, args, seed)
        before, tuned = accuracy(model, *test), copy.deepcopy(model)
        train_(tuned, train, args.tune, 0.01, seed + 1)
        after, seconds = accuracy(tuned, *test), time.perf_counter() - began
        yield Run(method, level, seed, steps, *size(model), before, after, seconds)


def paths(args: argparse.Namespace, console: Console) -> None:
    """All of them, as a table and a plot."""
    kept = Kept(args.out / "channels.jsonl", Run, lambda run: (run.method, run.level, run.seed), console)
    train, test = cifar10(args.data, args.images, args.tests)
    for seed in range(args.seeds):
        levels = {DENSE: [1.0], **dict.fromkeys(args.methods, args.levels)}
        open_ = [m for m, each in levels.items() if any((m, level, seed) not in kept.runs for level in each)]
        start = started(seed, train, args) if open_ else None
        for method in open_:  # of a path that was not finished all is made again
            for run in path(copy.deepcopy(start), method, seed, train, test, args):  # type: ignore[arg-type]
                kept.add(run)
    runs = [run for run in kept.runs.values() if run.method in (DENSE, *args.methods)]
    shown = Table(title=f"ResNet-20, {args.images:,} training images, accuracy in % on {args.tests:,}: median (range)")
    for heading in ("method", "channels", "weights", "FLOPs", "before", "after"):
        shown.add_column(heading, justify="right")
    dense = max((run.flops for run in runs), default=1)
    for method, level in product((DENSE, *args.methods), (1.0, *args.levels)):
        own = [run for run in runs if (run.method, run.level) == (method, level)]
        if own:
            part = f"{median(run.flops for run in own) / dense:.0%}"
            figures = [_spread(100 * getattr(run, when) for run in own) for when in ("before", "after")]
            shown.add_row(method, f"{level:.0%}", f"{median(run.weights for run in own):,.0f}", part, *figures)
    console.print(shown, plot(runs, args.out / "channels.png"))


def _spread(values: Iterator[float]) -> str:
    found = sorted(values)
    return f"{median(found):.1f} ({found[0]:.1f}–{found[-1]:.1f})"


def plot(runs: Sequence[Run], path: Path) -> Path:
    """Accuracy against FLOPs and against weights, medians with the range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axes, cost, name in zip(
        figure.subplots(1, 2, sharey=True), ("flops", "weights"), ("FLOPs", "weights"), strict=True
    ):
        most = max(getattr(run, cost) for run in runs)
        for method, marker in zip(dict.fromkeys(run.method for run in runs), "os^vD", strict=False):
            own = [run for run in runs if run.method == method]
            levels = [[run for run in own if run.level == level] for level in sorted({run.level for run in own})]
            x = [100 * median(getattr(run, cost) for run in each) / most for each in levels]
            y = [median(100 * run.after for run in each) for each in levels]
            lows = [middle - min(100 * run.after for run in each) for middle, each in zip(y, levels, strict=True)]
            highs = [max(100 * run.after for run in each) - middle for middle, each in zip(y, levels, strict=True)]
            axes.errorbar(x, y, [lows, highs], marker=marker, capsize=2, label=method)
        axes.set(xlabel=f"{name} left, %", title=f"ResNet-20, by {name}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy, %")
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)
    return path


# The two findings


@dataclass(frozen=True)
class Finding:
    """A network of one size."""

    network: str
    level: float
    seed: int
    weights: int
    steps: int
    accuracy: float
    seconds: float


PRUNED, LARGE = "pruned, fine-tuned", "large"
SCRATCH = (
    "narrower, for the time of pruning",
    "narrower, for all of the time",
    "pruned shape, as long as the large one",
)
SCRATCH = (*SCRATCH, "pruned shape, for the time of pruning", "pruned shape, for all of the time")


def findings(args: argparse.Namespace, console: Console) -> None:
    """All of them, as a table."""
    kept = Kept(args.out / "findings.jsonl", Finding, lambda run: (run.network, run.level, run.seed), console)
    train, test = ((F.avg_pool2d(x, 2), y) for x, y in cifar10(args.data, args.images, args.tests))
    for seed in range(args.seeds):
        names = [PRUNED, *SCRATCH]
        if all((name, level, seed) in kept.runs for name, level in product(names, args.levels)):
            continue
        for run in trained(seed, train, test, args):
            kept.add(run)
    shown = Table(title=f"ResNet-20 on halved images, accuracy in % on {args.tests:,}: median (range)")
    for heading in ("network", "channels", "weights", "steps", "seconds", "accuracy"):
        shown.add_column(heading, justify="right")
    for level, name in product((1.0, *args.levels), (LARGE, PRUNED, *SCRATCH)):
        own = [run for run in kept.runs.values() if (run.network, run.level) == (name, level)]
        if own:
            figures = [f"{median(getattr(run, key) for run in own):,.0f}" for key in ("weights", "steps", "seconds")]
            shown.add_row(name, f"{level:.0%}", *figures, _spread(100 * run.accuracy for run in own))
    console.print(shown)


def trained(seed: int, train: Images, test: Images, args: argparse.Namespace) -> Iterator[Finding]:
    """All networks of one seed."""
    torch.manual_seed(seed)

    def finding(name: str, level: float, model: nn.Module, steps: int, seconds: float) -> Finding:
        return Finding(name, level, seed, size(model)[0], steps, accuracy(model, *test), seconds)

    model = build().to(memory_format=torch.channels_last)
    large = timed(partial(train_, model, train, args.large, 0.1, seed))
    yield finding(LARGE, 1.0, model, args.large, large)
    every, gone_so_far, spent, dense = channels(model), 0, 0.0, copy.deepcopy(model)
    for level in args.levels:
        left = round(level * every)
        gone_so_far += channels(model) - left
        spent += timed(partial(level_, model, "fisher", left, train, args, seed))
        tuned = copy.deepcopy(model)
        tuning = timed(partial(train_, tuned, train, args.tune, 0.02, seed))
        yield finding(PRUNED, level, tuned, gone_so_far * args.every + args.tune, spent + tuning)
        shape, weights = Profile.of(model), size(model)[0]
        narrow = Profile.of(dense).scaled(dense, weights=weights)
        times = {"for the time of pruning": spent + tuning, "for all of the time": large + spent + tuning}
        for kind, profile in (("narrower", narrow), ("pruned shape", shape)):
            for which, seconds in times.items():
                fresh = build_from_profile(build, profile, seed=seed).to(memory_format=torch.channels_last)
                steps = round(seconds / pace(fresh, train, args.large))
                took = timed(partial(train_, fresh, train, steps, 0.1, seed))
                yield finding(f"{kind}, {which}", level, fresh, steps, took)
        fresh = build_from_profile(build, shape, seed=seed).to(memory_format=torch.channels_last)
        took = timed(partial(train_, fresh, train, args.large, 0.1, seed))
        yield finding(SCRATCH[2], level, fresh, args.large, took)


def timed(work: Callable[[], object]) -> float:
    """The seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def pace(model: nn.Module, train: Images, steps: int) -> float:
    """Seconds of a step of training, on a copy."""
    own, few = copy.deepcopy(model), min(30, steps)
    train_(own, train, 3, 0.01, 0)
    return timed(partial(train_, own, train, few, 0.01, 0)) / few


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is not there yet, and show all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["channels", "findings"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("fisher"), help="folder of the .jsonl files and the plot")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--levels", nargs="+", type=float, default=[0.5, 0.3, 0.15], help="parts of channels that stay")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=10000, help="for training")
    parser.add_argument("--tests", type=int, default=5000)
    parser.add_argument("--samples", type=int, default=256, help="for methods that look at what layers compute")
    parser.add_argument(
        "--every", type=int, default=2, help="steps between two removals by Fisher pruning; published: 100"
    )
    parser.add_argument("--start", type=int, default=300, help="steps before the first removal, of `channels`")
    parser.add_argument("--tune", type=int, default=60, help="steps of the short fine-tuning at each level")
    parser.add_argument("--large", type=int, default=2000, help="steps of the large network's training, of `findings`")
    args, console = parser.parse_args(argv), Console(width=140)
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        (paths if part == "channels" else findings)(args, console)


if __name__ == "__main__":
    main()
