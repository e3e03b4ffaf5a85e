"""An eps path of 20 points against its hardest point alone.

    python benchmarks/path.py --data ../shared/data

LeNet-300-100, ReLU ball, float32, certified gap 1e-3 at each point; wall-clock seconds, judging included. Every point
is also solved alone, so that the hardest is known.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from layer import layer_data

from convexprune.solvers import LayerProgram, ReluBall, solve, solve_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--layer", type=int, choices=(0, 1), default=1)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--range", type=float, nargs=2, default=(0.02, 0.4), help="smallest and largest relative eps")
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--order", choices=("tighten", "loosen"), default="loosen")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    X, W = layer_data(arguments.data, arguments.layer, arguments.samples)
    Y = (X @ W).relu()
    size = float(Y.double().norm())
    program = LayerProgram(X, ReluBall(Y, 0.1 * size))
    eps = [float(e) * size for e in np.geomspace(*arguments.range, arguments.points)]
    limits = {"tol": 1e-3, "feas_tol": 1e-4}
    began = time.perf_counter()
    path = solve_path(program, eps, order=arguments.order, **limits)
    together = time.perf_counter() - began
    alone = []
    for radius, point in zip(eps, path, strict=True):
        began = time.perf_counter()
        solution = solve(replace(program, fit=ReluBall(Y, radius)), **limits)
        alone.append(time.perf_counter() - began)
        c = point.solution.certificate
        judged = f"value {c.value:9.1f}  gap {c.gap:.0e}  {point.solution.status}"
        iterations = f"{point.solution.iterations} iterations, alone {solution.iterations}"
        print(f"eps {radius / size:.4f}  {point.nonzeros:7,} nonzeros  {judged}, {iterations}", flush=True)
    ratio = f"{together / max(alone):.2f} times"
    print(
        f"the path {together:.1f} s, its hardest point alone {max(alone):.1f} s: {ratio}; all alone {sum(alone):.1f} s"
    )
    if arguments.plot:
        path.plot().figure.savefig(arguments.plot, dpi=120)


if __name__ == "__main__":
    main()
