"""Time to certified gaps for every registered solver that takes a program: squared loss and ball, ℓ1 norm.

    python benchmarks/methods.py --data ../shared/data --threads 1

Programs: a small one, which conic solvers can take too; Gaussian inputs after a ReLU; the second layer of
LeNet-300-100; correlated inputs known by their Gram alone. The loss weights and radii keep a fifth to a half of the
weights.
Times are the solvers' own, without the judging; the best of some repeats, in which solvers take turns.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from layer import layer_data
from rich.console import Console
from rich.table import Table
from torch import Tensor

from convexprune.solvers import Ball, LayerProgram, Solution, available, solve
from convexprune.solvers.methods import IterativeSolver
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.programs import Gram, SquaredLoss

GAPS = (1e-3, 1e-6, 1e-9)
FEASIBLE = 1e-6
FEW = 1000  # weights that conic solvers take in seconds


def gaussian(P: int, N: int, M: int, factors: int | None = None) -> tuple[Tensor, Tensor]:
    """Inputs after a ReLU, from ``factors`` common ones and some noise, or independent; targets with 5 % noise."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    X = draw(P, factors) @ draw(factors, N) / factors**0.5 + 0.3 * draw(P, N) if factors else draw(P, N)
    X = X.clamp(min=0)
    X[:, -1] = 1
    Y = X @ (draw(N, M) * (draw(N, M) > 0.25) / N**0.5)
    return X, Y + 0.05 * Y.std() * draw(P, M)


def lenet(folder: Path, samples: int) -> tuple[Tensor, Tensor]:
    X, W = (array.double() for array in layer_data(folder, 1, samples))
    return X, X @ W


def programs(folder: Path, samples: int) -> Iterator[tuple[str, LayerProgram]]:
    recipes: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], float, float]] = {
        "small 200x30x10": (lambda: gaussian(200, 30, 10), 30, 0.2),
        "random 1000x129x64": (lambda: gaussian(1000, 129, 64), 30, 0.2),
        f"LeNet fc2 {samples}x301x100": (lambda: lenet(folder, samples), 100, 0.07),
        "Gram 400x100, correlated": (lambda: gaussian(2000, 400, 100, 40), 30, 0.07),
    }
    for name, (recipe, times, eps) in recipes.items():
        X, Y = recipe()
        # The least weight at which a neuron has a nonzero weight, in the middle of the neurons, times so many.
        weight = times / float((X.T @ Y).abs().amax(0).median())
        if name.startswith("Gram"):
            gram = Gram.of([(X, Y)], torch.float64)
            yield f"{name}, loss", LayerProgram(gram, SquaredLoss(gram, weight))
            yield f"{name}, ball", LayerProgram(gram, Ball(gram, eps * gram.size))
        else:
            yield f"{name}, loss", LayerProgram(X, SquaredLoss(Y, weight))
            yield f"{name}, ball", LayerProgram(X, Ball(Y, eps * float(Y.norm())))


def takers(program: LayerProgram) -> list[str]:
    """Solvers that take it, conic ones only where it is small; ``admm`` first."""
    names = []
    for name, info in available().items():
        if info.missing is None:
            solver = make_solver(name, {})[1]
            small = program.shape[0] * program.shape[1] <= FEW
            if (small or isinstance(solver, IterativeSolver)) and not solver.refuses(program):
                names.append(name)
    return sorted(names, key=lambda name: (name != "admm", name))


def seconds_to(solution: Solution, gap: float) -> tuple[float, int]:
    """Solver seconds and iterations to the first traced point within the gap, feasible to 1e-6 of the radius."""
    reached = [(p.seconds, p.iteration) for p in solution.trace if p.gap <= gap and p.violation <= FEASIBLE]
    return reached[0] if reached else (math.inf, 0)


def measure(program: LayerProgram, repeats: int, limit: float) -> dict[str, tuple[Solution, list[tuple[float, int]]]]:
    """For each solver a solution, and the least seconds to each gap."""
    found: dict[str, tuple[Solution, list[tuple[float, int]]]] = {}
    for _ in range(repeats):
        for name in takers(program):
            solution = solve(program, name, tol=GAPS[-1], feas_tol=FEASIBLE, max_iter=20_000, time_limit=limit)
            times = [seconds_to(solution, gap) for gap in GAPS]
            found[name] = (solution, list(map(min, times, found[name][1])) if name in found else times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--samples", type=int, default=5000, help="of LeNet's layer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds a solve")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table(
        title=f"seconds (iterations) to a certified gap; ×: admm's time over this; {arguments.threads} threads"
    )
    for heading in ("program", "solver", "kept", "gap", *(f"to {gap:g}" for gap in GAPS)):
        table.add_column(heading, justify="left" if heading in ("program", "solver") else "right")
    for program_name, program in programs(arguments.data, arguments.samples):
        found = measure(program, arguments.repeats, arguments.time_limit)
        for name, (solution, times) in found.items():
            cells = []
            for (seconds, iterations), (base, _) in zip(times, found["admm"][1], strict=True):
                ratio = base / seconds if seconds < math.inf > base else math.nan
                cells.append(f"{seconds:.3f} ({iterations}) ×{ratio:.1f}" if seconds < math.inf else "–")
            kept = float((solution.weights != 0).double().mean())
            table.add_row(program_name, name, f"{kept:.0%}", f"{solution.certificate.gap:.0e}", *cells)
        table.add_section()
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
