"""Random small programs of every kind: how many a solver leaves unsolved, by family and dtype, and what must never be.

python benchmarks/fuzz.py --programs 300
"""

import argparse
import time
from itertools import count, islice

import torch

from convexprune.solvers.testing.fuzzing import FAMILIES, Trial, draw, table, try_on


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=300, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--family", choices=FAMILIES, help="only programs of this row of the table")
    parser.add_argument("--solver", help="a registered name (default: that of solve)")
    parser.add_argument("--judge", type=int, default=0, metavar="K", help="let cvxpy judge every K-th (0: none)")
    parser.add_argument("--list", action="store_true", help="name each program that is left unsolved")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    trials, began = [], time.perf_counter()
    drawn = (one for one in map(draw, count(given.seed)) if given.family in (None, one.family))
    for number, one in enumerate(islice(drawn, given.programs)):
        trial = try_on(one, given.solver, judge=given.judge > 0 and number % given.judge == 0)
        trials.append(trial)
        for fault in trial.faults:
            print(f"seed {trial.drawn.seed}: {fault}")
        if given.list and not trial.settled:
            print(described(trial))
    print(table(trials))
    print(f"{given.programs} programs, {time.perf_counter() - began:.0f} s")


def described(trial: Trial) -> str:
    """An unsolved program in a line."""
    drawn, solution = trial.drawn, trial.solution
    (N, M), P, dtype = drawn.program.shape, drawn.program.samples, drawn.program.inputs.dtype
    line = f"seed {drawn.seed}: {trial.outcome}, {drawn.fit}, {drawn.penalty}, eps {drawn.eps:g}, {P}x{N}x{M}, {dtype}"
    if solution is None:
        return line
    return f"{line}, gap {solution.certificate.gap:.1e}, violation {solution.certificate.violation:.1e}"


if __name__ == "__main__":
    main()
