"""A small random ReLU layer to a certified gap of 1e-4: ADMM against cvxpy's Clarabel and SCS.

    python benchmarks/random_layer.py

P = 1,000, N = 129 (128 inputs and the bias), M = 64, relative eps 0.1. Wall-clock seconds of the whole call, judging
and cvxpy's compilation included; the median of several runs for ADMM, one run for the others.
"""

import argparse
import statistics
import time

import torch

from convexprune.solvers import LayerProgram, ReluBall, Solution, solve


def random_layer(seed: int, P: int, N: int, M: int) -> LayerProgram:
    """Standard normal inputs after a ReLU with a column of ones, and standard normal weights."""
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(P, N, generator=rng).clamp(min=0)
    X[:, -1] = 1
    Y = (X @ torch.randn(N, M, generator=rng) / N**0.5).relu()
    return LayerProgram(X, ReluBall(Y, 0.1 * float(Y.norm())))


def timed(program: LayerProgram, *solver: object, **options: object) -> tuple[float, Solution]:
    began = time.perf_counter()
    solution = solve(program, *solver, tol=1e-4, feas_tol=1e-5, **options)  # type: ignore[arg-type]
    return time.perf_counter() - began, solution


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(1000, 129, 64), metavar=("P", "N", "M"))
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    program = random_layer(0, *arguments.shape)
    runs = [timed(program) for _ in range(arguments.repeats)]
    ours = statistics.median(seconds for seconds, _ in runs)
    report("admm", ours, runs[-1][1], ours)
    for backend in ("CLARABEL", "SCS"):
        seconds, solution = timed(program, "cvxpy", backend=backend)
        report(f"cvxpy {backend}", seconds, solution, ours)


def report(name: str, seconds: float, solution: Solution, ours: float) -> None:
    c = solution.certificate
    judged = f"{solution.status}, gap {c.gap:.1e}, violation {c.violation:.1e}, value {c.value:.4f}"
    times = f"{seconds:9.3f} s ({seconds / ours:6.1f} times)"
    print(f"{name:15} {times}  {judged}, {solution.iterations} iterations", flush=True)


if __name__ == "__main__":
    main()
