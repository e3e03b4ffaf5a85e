"""Whole networks: accuracy against nonzeros for Net-Trim, exact budgets and magnitude, before and after fine-tuning.

    python benchmarks/networks.py lenet-300-100 lenet-5 resnet-20 [--data ../shared/data]

For each eps Net-Trim prunes in parallel and in cascade. The others prune to as many nonzeros as Net-Trim in parallel
leaves: "budget" and "magnitude" to the same number in each layer, "network" to the same total. For each sparsity the
number in each layer is that part instead, and Net-Trim looks for the eps that leave so many, and fits again.
Fine-tuning is short, with Adam, and zeros stay zeros. A line a run goes to a .jsonl file as soon as it is done, and
runs that are there already are not made again; a table and a picture follow at the end.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from trained import Kept, finetune_, load

from convexprune import Options, Sparsity, prune_
from convexprune.costs import accuracy

Counts = Mapping[str, int]  # nonzeros by layer


@dataclass(frozen=True, eq=False)
class Task:
    """A trained network and its data; ``rate`` is Adam's."""

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    calibration: Tensor
    rate: float


@dataclass(frozen=True)
class Run:
    """One network pruned by one method; ``size`` is the eps or the sparsity that it belongs to."""

    task: str
    size: str
    method: str
    epochs: int
    samples: int
    weights: int
    dense: int
    before: float
    after: float
    error: float
    seconds: float


def task_of(name: str, data: Path, samples: int) -> Task:
    """Calibrated on its first training images; where these come one class after the other, on a tenth of each."""
    model, train, test = load(name, data)
    images = train[0] if name != "resnet-20" else train[0][torch.arange(len(train[0])).view(10, -1).T.flatten()]
    return Task(name, model, train, test, images[:samples], 1e-3)


_LENET = {"eps": [0.05, 0.1, 0.2, 0.3], "sparsity": [0.95, 0.98], "epochs": 2}
DEFAULTS: dict[str, dict[str, Any]] = {  # of a convolution each position is a sample
    "lenet-300-100": _LENET | {"samples": 10_000},
    "lenet-5": _LENET | {"samples": 1_000},
    "resnet-20": {"eps": [], "sparsity": [0.5, 0.7, 0.9], "epochs": 0, "samples": 256},
}


def nonzeros(model: nn.Module) -> dict[str, int]:
    """Of each layer's weight."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    return {name: int(layer.weight.count_nonzero()) for name, layer in layers.items()}


def sparsities(model: nn.Module, counts: Counts) -> dict[str, float]:
    """The part of zeros in each layer, by name."""
    return {
        name: 1 - count / model.get_submodule(name).get_parameter("weight").numel() for name, count in counts.items()
    }


def net_trim(task: Task, mode: str, eps: float) -> Callable[[nn.Module], float]:
    return lambda model: prune_(model, task.calibration, eps=eps, options=Options(mode=mode)).output_error


def matched(task: Task, counts: Counts) -> dict[str, Callable[[nn.Module], float]]:
    """The methods that take a number of nonzeros."""
    each = Sparsity(sparsities(task.model, counts))
    whole = Sparsity(1 - sum(counts.values()) / sum(nonzeros(task.model).values()), "network")

    def prune(target: Sparsity, method: str, mode: str, model: nn.Module) -> float:
        return prune_(model, task.calibration, target, method=method, options=Options(mode=mode)).output_error

    return {
        "budget": partial(prune, each, "budget", "parallel"),
        "budget, cascade": partial(prune, each, "budget", "cascade"),
        "network": partial(prune, whole, "budget", "parallel"),
        "network, cascade": partial(prune, whole, "budget", "cascade"),
        "magnitude": partial(prune, each, "magnitude", "parallel"),
        "magnitude, network": partial(prune, whole, "magnitude", "parallel"),
    }


def supports(task: Task, counts: Counts) -> dict[str, Callable[[nn.Module], float]]:
    """Net-Trim's supports: those of the least eps that leave so many nonzeros in each layer, fitted again."""
    each = Sparsity(sparsities(task.model, counts))

    def prune(mode: str, model: nn.Module) -> float:
        return prune_(model, task.calibration, each, method="net-trim", options=Options(mode=mode)).output_error

    return {f"net-trim, {mode}, refit": partial(prune, mode) for mode in ("parallel", "cascade")}


def plans(task: Task, args: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[nn.Module], float]]]:
    """(size, method, how to prune)."""
    for eps in args.eps:
        yield f"eps {eps:g}", "net-trim, parallel", net_trim(task, "parallel", eps)
        yield f"eps {eps:g}", "net-trim, cascade", net_trim(task, "cascade", eps)
        path = args.out / f"counts-{task.name}-{eps:g}-{args.samples}.json"
        if not path.exists():
            model = copy.deepcopy(task.model)
            prune_(model, task.calibration, eps=eps, options=Options(mode="parallel"))
            path.write_text(json.dumps(nonzeros(model)))
        for name, method in matched(task, json.loads(path.read_text())).items():
            yield f"eps {eps:g}", name, method
    for part in args.sparsity:
        counts = {name: round((1 - part) * count) for name, count in nonzeros(task.model).items()}
        for name, method in (supports(task, counts) | matched(task, counts)).items():
            yield f"{part:.0%} zeros", name, method


def made(task: Task, size: str, method: str, prune: Callable[[nn.Module], float], args: argparse.Namespace) -> Run:
    """Prune, measure, fine-tune, measure."""
    model, dense = copy.deepcopy(task.model), sum(nonzeros(task.model).values())
    began = time.perf_counter()
    error = prune(model)
    seconds = time.perf_counter() - began
    before, kept = accuracy(model, *task.test), sum(nonzeros(model).values())
    if args.epochs:
        finetune_(model, task.train, args.epochs, task.rate, seed=0)
    after = accuracy(model, *task.test)
    return Run(task.name, size, method, args.epochs, args.samples, kept, dense, before, after, error, seconds)


def runs(task: Task, args: argparse.Namespace, log: Path, console: Console) -> Iterator[Run]:
    """All of them, those in the log first made earlier."""
    kept = Kept(log, Run, lambda run: (run.size, run.method, run.epochs, run.samples), console)
    for size, method, prune in [("", "dense", lambda _: 0.0), *plans(task, args)]:
        if not args.methods or method in (*args.methods, "dense"):
            yield kept.get((size, method, args.epochs, args.samples), partial(made, task, size, method, prune, args))


def table(found: Sequence[Run]) -> Table:
    """A row a run."""
    shown = Table(title=f"{found[0].task}: test accuracy in %, {found[0].samples:,} calibration samples")
    for heading in ("size", "method", "weights", "kept", "fewer", "before", "after fine-tuning", "seconds"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for run in found:
        kept = (f"{run.weights:,}", f"{run.weights / run.dense:.1%}", f"{run.dense / max(run.weights, 1):.1f}×")
        after = f"{100 * run.after:.2f}" if run.epochs else "–"
        shown.add_row(run.size, run.method, *kept, f"{100 * run.before:.2f}", after, f"{run.seconds:.1f}")
    return shown


def plot(found: Sequence[Run], path: Path) -> Path:
    """Test error against nonzeros, a curve a method, before and after fine-tuning.

    Hollow: the same part of each layer, where the curve is of Net-Trim's numbers.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    panels = ("before", "after") if found[0].epochs else ("before",)
    figure = Figure(figsize=(1.8 + 5 * len(panels), 4.8), layout="constrained")
    methods = list(dict.fromkeys(run.method for run in found if run.method != "dense"))
    by_eps = any(run.size.startswith("eps") for run in found)
    for axes, when in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.axhline(100 - 100 * getattr(found[0], when), color="0.6", linestyle="--", label="dense")
        for method, marker in zip(methods, "os^vD*Pp", strict=False):
            runs = sorted((run for run in found if run.method == method), key=lambda run: run.weights)
            apart = [run for run in runs if by_eps and "network" not in method and not run.size.startswith("eps")]
            joined = [run for run in runs if run not in apart]
            (line,) = axes.plot(*_points(joined, when), marker=marker, label=method)
            axes.plot(*_points(apart, when), marker, color=line.get_color(), fillstyle="none")
        axes.set(xscale="log", yscale="log", xlabel="nonzero weights", title=f"{found[0].task}, {when} fine-tuning")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(ScalarFormatter())
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test error, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=150)
    return path


def _points(runs: Sequence[Run], when: str) -> tuple[list[int], list[float]]:
    return [run.weights for run in runs], [100 - 100 * getattr(run, when) for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=DEFAULTS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--eps", type=float, nargs="*", help="LeNets: 0.05 0.1 0.2 0.3; ResNet-20: none")
    parser.add_argument("--sparsity", type=float, nargs="*", help="LeNets: 0.95 0.98; ResNet-20: 0.5 0.7 0.9")
    parser.add_argument("--samples", type=int, help="for calibration: 10,000, 1,000 and 256")
    parser.add_argument("--epochs", type=int, help="LeNets: 2; ResNet-20: 0")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    given, console = {key: value for key, value in vars(args).items() if value is not None}, Console(width=130)
    for name in args.tasks:
        args = argparse.Namespace(**{"methods": None} | DEFAULTS[name] | given)
        task = task_of(name, args.data, args.samples)
        found = list(runs(task, args, args.out / f"networks-{name}.jsonl", console))
        console.print(table(found), plot(found, args.out / f"networks-{name}.png"))


if __name__ == "__main__":
    main()
