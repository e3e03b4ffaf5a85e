"""Time to a certified gap on one layer of LeNet-300-100: our ADMM on both fits against the published ADMM.

    python benchmarks/layer.py --data ../shared/data --layer 1 --samples 2000

One run, one machine, the same certificate for all; times are the solvers' own, set-up included, without the judging.
Each run ends at the gap ``--tol`` and a violation of a tenth of it; ratios are to the first row's time to ``--tol``.
"""

import argparse
import math
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from convexprune.cli.reference import find_model
from convexprune.files.arrays import load_array
from convexprune.files.weights import load_weights
from convexprune.solvers import LayerProgram, NetTrimSet, ReluBall, Solution, solve

GAPS = (1e-1, 1e-2, 1e-3)


def layer_data(folder: Path, layer: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with a column of ones, and weights with the bias as last row, of hidden layer 0 or 1."""
    weights = load_weights(folder / "lenet300_mnist.safetensors")
    X = find_model("lenet-300-100").prepare(load_array(folder / "mnist.npz", "x_train")[:samples])
    matrices = [torch.cat([weights[f"{k}.weight"], weights[f"{k}.bias"][:, None]], 1).T.contiguous() for k in (0, 2)]
    X = torch.cat([X, torch.ones(samples, 1)], 1)
    if layer == 1:
        X = torch.cat([(X @ matrices[0]).relu(), torch.ones(samples, 1)], 1)
    return X, matrices[layer]


def seconds_to(solution: Solution, gap: float) -> float:
    """Solver seconds to the first traced point within the gap and with a violation of at most a tenth of it."""
    reached = [p.seconds for p in solution.trace if p.gap <= gap and p.violation <= gap / 10]
    return reached[0] if reached else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--layer", type=int, choices=(0, 1), default=1)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--max-iter", type=int, default=3000)
    arguments = parser.parse_args()
    X, W = layer_data(arguments.data, arguments.layer, arguments.samples)
    Y = (X @ W).relu()
    eps = arguments.eps * float(Y.double().norm())
    runs = {
        "admm, ReLU ball": (ReluBall(Y, eps), "admm"),
        "admm, Net-Trim set": (NetTrimSet(Y, eps), "admm"),
        "published, Net-Trim set": (NetTrimSet(Y, eps), "published"),
    }
    table = Table(title=f"layer {arguments.layer}, {arguments.samples} samples, relative eps {arguments.eps:g}")
    for heading in (
        "",
        "ℓ1 value",
        "nonzeros",
        "gap",
        "violation",
        "iterations",
        *(f"s to {gap:g}" for gap in GAPS),
        "ratio",
    ):
        table.add_column(heading, justify="right")
    solve(LayerProgram(X, ReluBall(Y, eps)), max_iter=3)  # so that no method pays for what happens once a process
    first = 0.0
    for name, (fit, solver) in runs.items():
        limits = {"tol": arguments.tol, "feas_tol": arguments.tol / 10, "max_iter": arguments.max_iter}
        solution = solve(LayerProgram(X, fit), solver, **limits)
        first = first or seconds_to(solution, arguments.tol)
        c, times = solution.certificate, [f"{seconds_to(solution, gap):.2f}" for gap in GAPS]
        figures = (f"{c.value:.1f}", f"{solution.nonzeros:,}", f"{c.gap:.1e}", f"{c.violation:.1e}")
        ratio = f"{seconds_to(solution, arguments.tol) / first:.1f}"
        table.add_row(name, *figures, str(solution.iterations), *times, ratio)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
