"""Coreset pruners, baselines and Net-Trim at equal numbers of weights, before and after a short fine-tuning.

    python benchmarks/coresets.py lenet-300-100 [--keep 0.1] [--seeds 5] [--epochs 3] [--data ../shared/data]
    python benchmarks/coresets.py resnet-20 --keep 0.7 0.5 --seeds 3 --epochs 1

LeNet-300-100 is fine-tuned on MNIST's training images, ResNet-20 on the 4,000 images of cifar10_calib.npz. A line a run
goes to a .jsonl file as soon as it is done, and runs that are there already are not made again; a table and a picture
follow at the end.

Methods that choose neurons or filters remove them; methods that choose single weights, and Net-Trim, set the others to
zero and keep these at zero. All leave as many weights: those that are left once the given part of the neurons is gone.
"largest" keeps the items of largest sensitivity as they are, in place of a reweighted sample.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from trained import Kept, finetune_, load

from convexprune import Eps, Neurons, Options, Sparsity, prune_
from convexprune.costs import accuracy
from convexprune.pruners import make_pruner
from convexprune.targets import Target

Apply = Callable[[nn.Module, int], None]  # (model, seed): prunes in place


@dataclass(frozen=True, eq=False)
class Task:
    """A trained network and its data.

    Attributes:
        removed: What becomes of neurons, for a part of the weights to keep.
        rate: Of Adam, falling to 0 by a cosine.
        calibration: How many training samples the data-dependent methods see, Net-Trim among them.
    """

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    removed: Callable[[float], Neurons]
    rate: float
    calibration: int


@dataclass(frozen=True)
class Run:
    """One network pruned by one method with one seed."""

    task: str
    keep: float
    method: str
    seed: int
    epochs: int
    weights: int
    before: float
    after: float
    seconds: float


def lenet(data: Path) -> Task:
    """LeNet-300-100: 33 and 33 hidden neurons hold a tenth of its weights."""
    return Task("lenet-300-100", *load("lenet-300-100", data), _hidden, rate=3e-3, calibration=1000)


def _hidden(keep: float) -> Neurons:
    """So many neurons of either hidden layer as leave the given part of 266,200 weights."""
    first = next(n for n in range(300, 0, -1) if 784 * n + n * _second(n) + 10 * _second(n) <= keep * 266_200)
    return Neurons({"0": first, "2": _second(first)})


def _second(first: int) -> int:
    return max(1, min(100, first))


def resnet(data: Path) -> Task:
    """ResNet-20: the filters inside its blocks."""
    return Task("resnet-20", *load("resnet-20", data), lambda keep: Neurons(1 - keep), rate=1e-3, calibration=100)


TASKS = {"lenet-300-100": lenet, "resnet-20": resnet}


def methods(task: Task, keep: float) -> dict[str, Apply]:
    """Every method by name, at the number of weights that removing neurons leaves."""
    x = task.train[0][: task.calibration]
    target = task.removed(keep)
    neurons: dict[str, dict[str, object]] = {
        "lowner": {"method": "lowner"},
        "mussay": {"method": "mussay"},
        "pfp": {"method": "pfp"},
        "lowner, largest": {"method": "lowner", "sampling": "top"},
        "mussay, largest": {"method": "mussay", "sampling": "top"},
        "pfp, largest": {"method": "pfp", "sampling": "top"},
        "uniform neurons": {"method": "uniform"},
        "largest neurons": {"method": "magnitude"},
    }
    weights: dict[str, dict[str, object]] = {
        "corenet": {"method": "corenet"},
        "sipp": {"method": "sipp"},
        "corenet, largest": {"method": "corenet", "sampling": "top"},
        "sipp, largest": {"method": "sipp", "variant": "deterministic"},
        "uniform weights": {"method": "uniform", "items": "weights"},
        "magnitude": {"method": "magnitude"},
    }
    removed = copy.deepcopy(task.model)
    prune_(removed, None, target, method="uniform")
    part = Sparsity(1 - _weights(removed) / _weights(task.model), "network")
    found: dict[str, Apply] = {"dense": lambda model, seed: None}  # noqa: ARG005
    for chosen, sizes in ((neurons, target), (weights, part)):
        found |= {name: partial(_pruned, x=x, target=sizes, options=own) for name, own in chosen.items()}
    return found | {"net-trim": NetTrim(x, _weights(removed))}


def _pruned(model: nn.Module, seed: int, x: Tensor, target: Target, options: Mapping[str, object]) -> None:
    own = dict(options)
    _, pruner = make_pruner(str(own.pop("method")), target, own)
    prune_(model, x, target, method=pruner, options=Options(seed=seed))


@dataclass(frozen=True, eq=False)
class NetTrim:
    """The least eps, by bisection, that leaves no more weights; the same for all layers. Found once, for all seeds."""

    x: Tensor
    most: int
    found: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, model: nn.Module, seed: int) -> None:  # noqa: ARG002
        low, high = 0.0, 1.0
        for _ in range(0 if self.found else _HALVINGS):
            eps = (low + high) / 2
            trial = copy.deepcopy(model)
            prune_(trial, self.x, Eps(eps), options=Options(mode="parallel", tol=1e-2, feas_tol=1e-3, max_iter=300))
            if _weights(trial) <= self.most:
                high = eps
                self.found.update(trial.state_dict())
            else:
                low = eps
        model.load_state_dict(self.found)


_HALVINGS = 6


def _weights(model: nn.Module) -> int:
    """Nonzero entries of Linear and Conv2d weights."""
    layers = (module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return sum(int(layer.weight.count_nonzero()) for layer in layers)


def made(task: Task, keep: float, name: str, prune: Apply, seed: int, epochs: int) -> Run:
    """Prune, measure, fine-tune, measure."""
    model = copy.deepcopy(task.model)
    began = time.perf_counter()
    prune(model, seed)
    seconds = time.perf_counter() - began
    before, weights = accuracy(model, *task.test), _weights(model)
    finetune_(model, task.train, epochs, task.rate, seed)
    return Run(task.name, keep, name, seed, epochs, weights, before, accuracy(model, *task.test), seconds)


def runs(task: Task, args: argparse.Namespace, log: Path, console: Console) -> Iterator[Run]:
    """All of them, those in the log first made earlier."""
    kept = Kept(log, Run, lambda run: (run.task, run.keep, run.method, run.seed, run.epochs), console)
    for keep in args.keep:
        for name, prune in methods(task, keep).items():
            if args.methods and name not in args.methods:
                continue
            for seed in range(args.seeds):
                key = (task.name, keep, name, seed, args.epochs)
                yield kept.get(key, partial(made, task, keep, name, prune, seed, args.epochs))


def table(found: Sequence[Run]) -> Table:
    """A row a method and size: medians over the seeds, with the range."""
    shown = Table(title=f"{found[0].task}: test accuracy in %, median (least to most) of {_seeds(found)} seeds")
    for heading in ("keep", "method", "weights", "before", "after fine-tuning", "most seconds to prune"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for (keep, method), group in _grouped(found).items():
        seconds = max(run.seconds for run in group)  # Net-Trim, the same for all seeds, is found once
        weights = round(statistics.median(run.weights for run in group))
        cells = [_spread([getattr(run, when) for run in group]) for when in ("before", "after")]
        shown.add_row(f"{keep:g}", method, f"{weights:,}", *cells, f"{seconds:.1f}")
    return shown


def _seeds(found: Sequence[Run]) -> int:
    return max(run.seed for run in found) + 1


def _grouped(found: Sequence[Run]) -> dict[tuple[float, str], list[Run]]:
    groups: dict[tuple[float, str], list[Run]] = {}
    for run in found:
        groups.setdefault((run.keep, run.method), []).append(run)
    return groups


def _spread(values: Sequence[float]) -> str:
    low, middle, high = (100 * f(values) for f in (min, statistics.median, max))
    return f"{middle:.2f}" if low == high else f"{middle:.2f} ({low:.2f} to {high:.2f})"


def plot(found: Sequence[Run], path: Path) -> Path:
    """A panel a size: accuracy of every seed before and after fine-tuning, methods from worst to best."""
    from matplotlib.figure import Figure

    keeps = list(dict.fromkeys(run.keep for run in found))
    figure = Figure(figsize=(1 + 5.5 * len(keeps), 4.5), layout="constrained")
    for axes, keep in zip(figure.subplots(1, len(keeps), squeeze=False)[0], keeps, strict=True):
        groups = {method: group for (size, method), group in _grouped(found).items() if size == keep}
        order = sorted(groups, key=lambda method: statistics.median(run.after for run in groups[method]))
        for height, method in enumerate(order):
            for when, colour in (("before", "0.6"), ("after", "C0")):
                values = [100 * getattr(run, when) for run in groups[method]]
                label = f"{when} fine-tuning" if height == 0 else None
                axes.plot(values, [height] * len(values), "o", color=colour, alpha=0.6, markersize=5, label=label)
        axes.set(title=f"{found[0].task}, {keep:g} of the weights or filters kept", xlabel="test accuracy, %")
        axes.set_yticks(range(len(order)), order)
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.1], help="part of the weights, or of the filters")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=120)
    found = list(runs(TASKS[args.task](args.data), args, args.out / f"coresets-{args.task}.jsonl", console))
    console.print(table(found), plot(found, args.out / f"coresets-{args.task}.png"))


if __name__ == "__main__":
    main()
