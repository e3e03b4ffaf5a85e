"""Inputs and outputs of any size: answers do not depend on the unit, and no square overflows or vanishes unsaid."""

import copy
import math

import pytest
import torch
from calls import prune_
from networks import mlp
from tolerances import EXACT, ROUNDING, SINGLE
from torch import Tensor, nn

from convexprune.solvers import L1, Ball, LayerProgram, NetTrimSet, ReluBall, TopK, certify, solve
from convexprune.solvers.arrays import norm
from convexprune.solvers.errors import ConvexPruneError, NonFinite
from convexprune.solvers.methods import refit
from convexprune.solvers.programs import Gram, ReluLoss, SquaredLoss
from convexprune.solvers.testing.layers import critical_weight, gaussian, layer

POWERS = (-100, -60, 60, 100)  # of two: 1e-30 to 1e30
FITS = ["relu-ball", "net-trim", "ball", "ball quadratic", "squared-loss quadratic", "relu-loss budget", "loss budget"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    A = gaussian(0, 100, 100).to(dtype)
    length = math.hypot(*A.double().flatten().tolist())
    reach = {torch.float16: (-4, 10), torch.float64: (-900, -100, 100, 900)}.get(dtype, POWERS)
    for power in reach:
        scaled = A * 2.0**power if dtype != torch.float16 else A * torch.tensor(2.0**power, dtype=dtype)
        expected = length * 2.0**power
        assert float(norm(scaled)) == pytest.approx(expected, rel=SINGLE if dtype == torch.float16 else 1e-6)
    assert float(norm(torch.zeros(3, dtype=dtype))) == 0


def posed(kind: str, dtype: torch.dtype, unit: float) -> tuple[LayerProgram, str]:
    X, W = layer(1, 60, 8, 5)
    X, Z = X.to(dtype), (X @ W + 0.1 * gaussian(2, 60, 5)).to(dtype)
    Y, weight = Z.clamp(min=0), 10 * critical_weight(X.double(), Z.double(), L1())
    eps = 0.1 * float(Y.double().norm()) * unit
    program = {
        "relu-ball": lambda: LayerProgram(X * unit, ReluBall(Y * unit, eps)),
        "net-trim": lambda: LayerProgram(X * unit, NetTrimSet(Y * unit, eps, (Z - Y + 0.1) * unit)),
        "ball": lambda: LayerProgram(X * unit, Ball(Z * unit, eps)),
        "ball quadratic": lambda: LayerProgram(X * unit, Ball(Z * unit, eps)),
        "squared-loss quadratic": lambda: LayerProgram(X * unit, SquaredLoss(Z * unit, weight / unit / unit)),
        "relu-loss budget": lambda: LayerProgram(X * unit, ReluLoss(Y * unit), TopK(12)),
        "loss budget": lambda: LayerProgram(X * unit, SquaredLoss(Z * unit), TopK(12)),
    }[kind]()
    return program, "quadratic" if "quadratic" in kind else "continuation" if "budget" in kind else "admm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", FITS)
def test_the_unit_of_inputs_and_outputs_does_not_matter(kind: str, dtype: torch.dtype) -> None:
    """The same weights satisfy the same program of cX and cY, and are as good."""
    program, solver = posed(kind, dtype, 1.0)
    usual = solve(program, solver)
    for power in POWERS:
        scaled, _ = posed(kind, dtype, 2.0**power)
        found = solve(scaled, solver)
        assert found.status is usual.status
        assert torch.equal(found.weights != 0, usual.weights != 0)
        assert torch.allclose(found.weights, usual.weights, rtol=SINGLE, atol=SINGLE)
        again = certify(scaled, found.weights, found.multipliers)
        assert again.violation == pytest.approx(found.certificate.violation, rel=ROUNDING, abs=EXACT)
        if "budget" not in kind:
            assert again.value == pytest.approx(found.certificate.value, rel=ROUNDING)
            assert again.bound == pytest.approx(found.certificate.bound, rel=ROUNDING)


def test_refits_and_products_of_any_unit() -> None:
    X, W = layer(3, 50, 6, 4)
    support = gaussian(4, 6, 4) > -0.5
    for dtype in (torch.float32, torch.float64):
        x, y = X.to(dtype), (X @ W).clamp(min=0).to(dtype)
        usual = refit(LayerProgram(x, ReluLoss(y)), support)
        gram = Gram.of([(x, y)])
        for power in POWERS:
            unit = 2.0**power
            found = refit(LayerProgram(x * unit, ReluLoss(y * unit)), support)
            assert torch.allclose(found, usual, rtol=SINGLE, atol=SINGLE)
            scaled = Gram.of([(x * unit, y * unit)])
            assert torch.allclose(scaled.XX / unit / unit, gram.XX, rtol=1e-6)
            assert scaled.size / unit == pytest.approx(gram.size, rel=1e-6)


def test_a_loss_beyond_float64_is_refused_by_what_is_wrong() -> None:
    X, W = layer(5, 40, 6, 3)
    for unit in (1e200, 1e-200):
        with pytest.raises(NonFinite, match="divide inputs and targets"):
            solve(LayerProgram(X * unit, SquaredLoss(X @ W * unit), TopK(5)))
        ball = solve(LayerProgram(X * unit, Ball(X @ W * unit, unit)))
        usual = solve(LayerProgram(X, Ball(X @ W, 1.0)))
        assert torch.allclose(ball.weights, usual.weights, rtol=SINGLE, atol=SINGLE)


def network() -> nn.Sequential:
    return mlp(8, 8, 3, bias=False).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "arguments",
    [{"eps": 0.05}, {"eps": 0.05, "mode": "cascade"}, {"sparsity": 0.5}, {"sparsity": 0.5, "mode": "cascade"}],
    ids=["eps", "eps cascade", "sparsity", "sparsity cascade"],
)
def test_networks_are_pruned_alike_in_any_unit(arguments: dict[str, object], dtype: torch.dtype) -> None:
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(1))

    def pruned(unit: float) -> tuple[list[Tensor], list[float]]:
        model = copy.deepcopy(network()).to(dtype)
        report = prune_(model, x.to(dtype) * unit, **arguments)  # type: ignore[arg-type]
        return [weight.detach().float() for weight in model.parameters()], [row.output_error for row in report.layers]

    usual, errors = pruned(1.0)
    for power in (POWERS[0], POWERS[-1]):
        weights, found = pruned(2.0**power)
        assert all(torch.equal(a != 0, b != 0) for a, b in zip(weights, usual, strict=True))
        assert all(torch.allclose(a, b, rtol=SINGLE, atol=SINGLE) for a, b in zip(weights, usual, strict=True))
        assert found == pytest.approx(errors, rel=SINGLE)


@pytest.mark.parametrize(
    "arguments",
    [
        {"eps": 0.1, "mode": "cascade"},
        {"eps": 0.1, "refit": True},
        {"sparsity": 0.5},
        {"sparsity": "2:4"},
        {"sparsity": 0.5, "scope": "network"},
        {"sparsity": 0.5, "unit": "neurons"},
        {"network_eps": 0.2},
    ],
    ids=str,
)
def test_biases_of_any_unit_leave_networks_as_accurate(arguments: dict[str, object]) -> None:
    """Inputs, biases and outputs in another unit: the 1 that belongs to a bias has none, and is far from all inputs."""
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))

    def pruned(unit: float) -> tuple[int, float]:
        model = mlp(8, 12, 4).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(unit if name.endswith("bias") else 1)
        report = prune_(model, x * unit, **arguments)  # type: ignore[arg-type]
        return report.nonzeros, report.output_error

    nonzeros, error = pruned(1.0)
    for power in (POWERS[0], POWERS[-1]):
        kept, found = pruned(2.0**power)
        assert kept == pytest.approx(nonzeros, rel=0.1)
        assert found <= 1.3 * error


@pytest.mark.parametrize(("unit", "said"), [(1.0, None), (1e-30, "scaled to one length")])
def test_levelled_columns_are_said_in_the_provenance(unit: float, said: str | None) -> None:
    X, W = layer(5, 40, 6, 3)
    X[:, :-1] *= unit
    X[:, -1] = 1
    found = solve(LayerProgram(X, SquaredLoss(X @ W), TopK(9)), "continuation")
    assert found.provenance["effective"].get("columns") == said


def test_outputs_that_overflow_the_networks_own_precision_are_named() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(1)
    with pytest.raises(ConvexPruneError, match=r"[Nn]a[Nn]|infinit"):
        prune_(model, torch.full((50, 8), 3e38), eps=0.1)
