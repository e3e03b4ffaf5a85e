"""How fast this machine is."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Self

import torch

from convexprune.solvers import L1, LayerProgram, ReluBall, solve


@dataclass(frozen=True)
class Pace:
    """Speeds of this machine.

    Attributes:
        single, double: Floating-point operations a second of a product in float32 and float64.
        iteration: Seconds of an iteration on hardly any data, judging included.
        reading: Seconds of a pass over the calibration data.
    """

    single: float
    double: float
    iteration: float
    reading: float

    @classmethod
    def measured(cls, device: torch.device, reading: float) -> Self:
        """Measure all but the last, in some tenths of a second."""
        return cls(_speed(device, torch.float32), _speed(device, torch.float64), _overhead(device), reading)


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    A, B = torch.ones(1024, 512, dtype=dtype, device=device), torch.ones(512, 128, dtype=dtype, device=device)
    return 2 * A.numel() * B.shape[1] / _timed(lambda: A @ B, device)


def _overhead(device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(64, 8, generator=generator).to(device)
    Y = (X @ torch.randn(8, 4, generator=generator).to(device)).clamp(min=0)
    program = LayerProgram(X, ReluBall(Y, 0.1 * float(Y.norm())), L1())
    count = 20
    return _timed(lambda: solve(program, "admm", tol=1e-12, max_iter=count), device, repeats=3) / count


def _timed(work: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Median seconds; the first run warms up."""
    taken = []
    for turn in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn:
            taken.append(time.perf_counter() - began)
    return median(taken)
