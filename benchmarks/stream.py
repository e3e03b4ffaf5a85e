"""A linear layer known only through streamed products: forming the Gram against solving on it, and peak memory.

    python benchmarks/stream.py
    python benchmarks/stream.py --samples 1000000 --memory

N = 1,536 inputs, M = 384 outputs, batches of 8,192 samples of correlated, half inactive inputs, made as they are
asked for; relative eps 0.1, certified gap 1e-3. ``--memory`` only accumulates, and says what that adds beside a batch.
"""

import argparse
import time
from collections.abc import Iterator

import torch
from mnist import resident

from convexprune.solvers import Ball, LayerProgram, solve
from convexprune.solvers.programs import Gram

BATCH = 8192


class Source:
    """Samples made on the fly; the time that making them takes is kept apart."""

    def __init__(self, samples: int, N: int, M: int) -> None:
        self.samples, self.rng, self.seconds = samples, torch.Generator().manual_seed(0), 0.0
        self.mixing = torch.randn(64, N, generator=self.rng) / 8
        self.W = torch.randn(N, M, generator=self.rng) ** 3 / N**0.5

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first in range(0, self.samples, BATCH):
            began, rows = time.perf_counter(), min(BATCH, self.samples - first)
            X = torch.randn(rows, self.mixing.shape[1], generator=self.rng)
            X.add_(torch.randn(rows, 64, generator=self.rng) @ self.mixing).clamp_(min=0)
            Y = X @ self.W
            self.seconds += time.perf_counter() - began
            yield X, Y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=262_144)
    parser.add_argument("--shape", type=int, nargs=2, default=(1536, 384), metavar=("N", "M"))
    parser.add_argument("--solver", default="quadratic")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    source = Source(arguments.samples, *arguments.shape)
    batch = next(iter(source))
    if arguments.memory:
        Gram.of([batch])
        size, before = sum(part.nbytes for part in batch), resident(reset=True)
    source.seconds, began = 0.0, time.perf_counter()
    gram = Gram.of(source)
    forming = time.perf_counter() - began - source.seconds
    if arguments.memory:
        added = (resident() - before) / 2**20
        print(f"{gram.samples:,} samples: {added:.0f} MiB beside the first batch of {size / 2**20:.0f} MiB")
        return
    began = time.perf_counter()
    program = LayerProgram(gram, Ball(gram, 0.1 * gram.size))
    solution = solve(program, arguments.solver, tol=1e-3, feas_tol=1e-4)
    solving = time.perf_counter() - began
    c = solution.certificate
    ratio = f"{solving / forming:.2f} times"
    print(f"{gram.samples:,} samples: forming the Gram {forming:.1f} s, solving {solving:.1f} s: {ratio}")
    judged = f"gap {c.gap:.1e}, violation {c.violation:.1e}"
    print(f"{solution.status}: {solution.iterations} iterations, {judged}, {solution.nonzeros:,} weights kept")


if __name__ == "__main__":
    main()
