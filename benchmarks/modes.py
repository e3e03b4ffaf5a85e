"""Which mode and which scope: accuracy, the network's own error, seconds and memory, at eps and at sparsities.

    python benchmarks/modes.py mlp cnn resnet transformer        # digits, trained here in seconds
    python benchmarks/modes.py lenet-300-100 lenet-5 resnet-20 --data ../shared/data

Each network is pruned in parallel and in cascade, to the same part of each layer and to that part of all of them
("network"). Memory is what a process that prunes and does nothing else takes beside what it had before. A line a run
goes to a .jsonl file as soon as it is done, and runs that are there already are not made again.
"""

import argparse
import copy
import multiprocessing
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from small import SMALL, train
from torch import Tensor, nn
from trained import Kept, load

from convexprune import Eps, Options, Sparsity, prune_
from convexprune.costs import accuracy
from convexprune.targets import Target

_TRAINED = {"lenet-300-100": 2000, "lenet-5": 400, "resnet-20": 300}  # calibration samples


@dataclass(frozen=True)
class Run:
    """One network pruned once; ``error`` is that of its outputs, relative, ``memory`` in MiB."""

    task: str
    target: str
    mode: str
    samples: int
    kept: float
    accuracy: float
    error: float
    seconds: float
    memory: float


def task_of(name: str, args: argparse.Namespace) -> tuple[nn.Module, Tensor, tuple[Tensor, Tensor]]:
    """The trained network, its calibration inputs, and the images to test on."""
    if name in _TRAINED:
        model, train_set, test = load(name, args.data)
        count = args.samples or _TRAINED[name]
        chosen = torch.randperm(len(train_set[0]), generator=torch.Generator().manual_seed(0))[:count]
        return model, train_set[0][chosen], test
    model, data = train(name)
    return model, data.x_train[: args.samples or 500], (data.x_test, data.y_test)


def requests(args: argparse.Namespace) -> Iterator[tuple[Target, str]]:
    """(the target, the mode)."""
    for mode in args.modes:
        for eps in args.eps:
            yield Eps(eps), mode
        for part in args.sparsity:
            for scope in args.scopes:
                yield Sparsity(part, scope), mode


def made(task: str, target: Target, mode: str, given: Any) -> Run:
    """Prune in a process of its own, and test."""
    model, x, test = given
    inbox, outbox = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        pruned = copy.deepcopy(model)
        report = prune_(pruned, x, target, options=Options(mode=mode))
        seconds, memory = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        figures = (report.nonzeros / report.nonzeros_before, accuracy(pruned, *test), report.output_error)
        outbox.send(Run(task, str(target), mode, len(x), *figures, seconds, memory / 1024))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    run: Run = inbox.recv()
    process.join()
    return run


def table(found: list[Run], dense: float) -> Table:
    """A row for each target, beside each other the modes."""
    modes = list(dict.fromkeys(run.mode for run in found))
    shown = Table(title=f"{found[0].task}: dense {100 * dense:.1f} %, {found[0].samples:,} calibration samples")
    shown.add_column("target")
    for figure in ("accuracy, %", "network's error", "kept, %", "seconds", "MiB"):
        for mode in modes:
            shown.add_column(f"{figure}, {mode}", justify="right")
    for target in dict.fromkeys(run.target for run in found):
        runs = {run.mode: run for run in found if run.target == target}
        texts = [
            (f"{100 * r.accuracy:.1f}", f"{r.error:.3f}", f"{100 * r.kept:.1f}", f"{r.seconds:.1f}", f"{r.memory:.0f}")
            for r in (runs[mode] for mode in modes)
        ]
        shown.add_row(target, *(text for column in zip(*texts, strict=True) for text in column))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=["mlp", *SMALL, *_TRAINED])
    parser.add_argument("--eps", type=float, nargs="*", default=[0.05, 0.1, 0.2])
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--modes", nargs="+", default=["parallel", "cascade"])
    parser.add_argument("--scopes", nargs="+", default=["layer", "network"])
    parser.add_argument("--samples", type=int)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args, console = parser.parse_args(), Console(width=140)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        given = task_of(name, args)
        key = lambda run: (run.target, run.mode, run.samples)  # noqa: E731
        kept = Kept(args.out / f"modes-{name}.jsonl", Run, key, console)
        found = [
            kept.get((str(target), mode, len(given[1])), lambda: made(name, target, mode, given))  # noqa: B023
            for target, mode in requests(args)
        ]
        console.print(table(found, accuracy(given[0], *given[2])))


if __name__ == "__main__":
    main()
