"""LeNet-300-100's first layer on all 60,000 training images: iterations, time an iteration, and peak memory.

    python benchmarks/mnist.py --data ../shared/data

Relative eps 0.1, ReLU ball, float32. An iteration is compared with its two products with X, XU and XᵀZ, alternating in
one run; memory is what a solve adds to X and Y, in arrays as large as Y (Linux only).
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from layer import layer_data

from convexprune.solvers import LayerProgram, ReluBall, Solution, solve
from convexprune.solvers.methods.admm import ADMM


def resident(reset: bool = False) -> int:
    """Peak resident bytes since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def iteration_ratio(program: LayerProgram, rounds: int) -> tuple[float, float]:
    """Median seconds of an iteration and of two products with X."""
    method, X = ADMM(sampled=0), program.inputs
    state = method.init(program, None)
    U, Z = torch.zeros_like(state.T), torch.zeros_like(state.q)
    steps, products = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        method.step(state)
        between = time.perf_counter()
        torch.mm(X, U, out=Z)
        torch.mm(X.T, Z, out=U)
        steps.append(between - began)
        products.append(time.perf_counter() - between)
    return statistics.median(steps), statistics.median(products)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    X, W = layer_data(arguments.data, 0, arguments.samples)
    Y = (X @ W).relu()
    program = LayerProgram(X, ReluBall(Y, 0.1 * float(Y.double().norm())))
    before = resident(reset=True)
    solution: Solution = solve(program, tol=1e-3, feas_tol=1e-4)
    added = (resident() - before) / (Y.numel() * Y.element_size())
    c, s = solution.certificate, solution.seconds
    print(f"{solution.status}: {solution.iterations} iterations, gap {c.gap:.1e}, violation {c.violation:.1e}")
    print(
        f"value {c.value:.1f}, {solution.nonzeros:,} nonzeros; seconds {s.setup:.1f} + {s.solve:.1f} + {s.certify:.1f}"
    )
    print(f"peak memory: X plus {added + 1:.1f} arrays of {list(Y.shape)}, Y among them")
    step, products = iteration_ratio(program, arguments.rounds)
    print(f"an iteration {step:.3f} s, its two products with X {products:.3f} s: {step / products:.2f} times")


if __name__ == "__main__":
    main()
