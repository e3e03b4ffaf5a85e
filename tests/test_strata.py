"""Samples of rows are random, the same for the same seed, and taken from all parts of the data."""

import pytest
import torch
from calls import prune_
from hypothesis import given
from hypothesis import strategies as st
from networks import Net
from torch import nn

from convexprune.runs.fits import FITS
from convexprune.runs.layer import Fold
from convexprune.runs.problem import Problem
from convexprune.solvers import L1, LayerProgram, ReluBall
from convexprune.solvers.arrays import stratified
from convexprune.solvers.errors import InvalidTolerance
from convexprune.solvers.methods.admm import ADMM


@given(total=st.integers(1, 5000), part=st.floats(0, 1), seed=st.integers(0, 2**40))
def test_one_row_of_each_of_equally_long_runs(total, part, seed):
    count = max(1, int(part * total))
    rows = stratified(total, count, seed)
    assert torch.equal(rows, stratified(total, count, seed))
    ends = torch.tensor([i * total // count for i in range(count + 1)])
    assert bool((ends[:-1] <= rows).all() & (rows < ends[1:]).all())


def test_every_row_is_as_likely():
    seen = torch.zeros(12)
    for seed in range(2000):
        seen[stratified(12, 5, seed)] += 1
    runs = (seen[:2], seen[2:4], seen[4:7], seen[7:9], seen[9:])
    for run in runs:  # within a run: binomial, 5 standard deviations
        p = 1 / len(run)
        assert bool(((run - 2000 * p).abs() < 5 * (2000 * p * (1 - p)) ** 0.5).all())


def images(count=64, positions=16):
    """[count·positions, 2]: the number of the image and of the position of each row."""
    grid = torch.meshgrid(torch.arange(count), torch.arange(positions), indexing="ij")
    return torch.stack(grid, dim=-1).reshape(-1, 2).float()


def test_a_sample_to_measure_on_keeps_step_with_no_positions():
    """As many rows as images: one of each image, and not the same position of all."""
    X = images()
    problem = Problem("fc", X, X @ torch.eye(2), torch.eye(2), Fold(), False, FITS["relu-ball"], len(X))
    some = problem.sample(64, seed=0)
    assert some.samples == len(some.X) == 64
    assert torch.equal(some.X[:, 0].sort().values, torch.arange(64.0))
    assert 10 < len(some.X[:, 1].unique()) <= 16
    assert torch.equal(some.X, some.Y)
    assert not torch.equal(some.X, problem.sample(64, seed=1).X)


def test_admm_starts_from_random_samples():
    """Each eighth row is of another kind: a stride of 8 would see those alone, or none of them."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4096, 6, generator=generator)
    X[::8] = 0
    Y = (X @ torch.randn(6, 3, generator=generator)).relu()
    program = LayerProgram(X, ReluBall(Y, 0.1 * float(Y.norm())), L1())
    rows = stratified(4096, 512, 0)
    sample = ADMM()._on_sample(program)
    assert sample is not None
    assert 0.5 < int((rows % 8 == 0).sum()) / 64 < 1.5
    again = ADMM(seed=1)._on_sample(program)
    assert not torch.equal(sample.U, again.U)
    assert float(sample.U.norm()) == pytest.approx(float(again.U.norm()), rel=0.1)
    with pytest.raises(InvalidTolerance, match="seed"):
        ADMM(seed=-1)


def test_a_fit_of_indices_is_that_of_a_slice():
    Y = torch.rand(20, 3)
    for fit in (ReluBall(Y, 0.5), ReluBall(Y, 0.5).as_loss(2.0)):
        some, same = fit.sample(slice(None, None, 2)), fit.sample(torch.arange(0, 20, 2))
        assert torch.equal(some.Y, same.Y)
        assert some.scale == same.scale


def corners():
    """A convolution over maps whose corners hold nothing, and the mean of what it sees."""
    torch.manual_seed(0)
    own = {"conv": nn.Conv2d(3, 8, 1, bias=False), "fc": nn.Linear(8, 4)}
    return Net(lambda m, x: m.fc(m.conv(x).relu().mean((2, 3))), **own).eval()


def test_a_split_is_measured_on_all_positions():
    """64 is a multiple of the 16 positions: every 64th row is the empty corner, whose path says nothing."""
    model, x = corners(), torch.rand(48, 3, 4, 4)
    x[:, :, 0, 0] = 0
    counts = []
    for seed in (0, 1):
        report = prune_(corners(), x, sparsity=0.5, scope="network", seed=seed)
        counts.append([row.nonzeros for row in report.layers])
        assert report.provenance["seed"] == seed
        assert sum(counts[-1]) <= 28
        assert all(row.nonzeros > 4 for row in report.layers)
    with pytest.raises(InvalidTolerance, match="seed"):
        prune_(model, x, sparsity=0.5, seed=-1)
