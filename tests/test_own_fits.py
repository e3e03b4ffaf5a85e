"""A user's own fits of layers and penalties go through whole runs, one layer by hand, and verification."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import prune_
from documented import get
from networks import mlp
from torch import Tensor, nn

from convexprune import Options, layer_program, verify
from convexprune.runs.fits import FITS, LayerFit, register_fit
from convexprune.solvers import certify
from convexprune.solvers.errors import InvalidInput, SolverRefused
from convexprune.solvers.programs import L1, Ball, Fit, ReluBall, SquaredLoss

HuberBall, HuberLoss, huber = (get("fits.md", name) for name in ("HuberBall", "HuberLoss", "huber"))
ElasticNet = get("penalties.md", "ElasticNet")
DELTA = 0.3


class Huber(LayerFit):
    """Σ H(Z − Y) ≤ ½r², H of a slope of at most DELTA: outliers among the outputs are forgiven."""

    name = "huber"

    def within(self, Y: Any, radius: float) -> Any:
        return HuberBall(Y, DELTA, eps=radius)

    def loss(self, Y: Any) -> Any:
        return HuberLoss(Y, DELTA)

    def reach(self, Y: Any, Z: Tensor) -> float:
        return math.sqrt(2 * float(huber((Z - Y).double(), DELTA).sum()))

    def program_fit(self, X: Tensor, Y: Any, W: Tensor, radius: float, options: Options) -> tuple[Fit, float, float]:
        """‖Z − Y‖² is convex in the values of H, so that it is largest where one entry has it all."""
        fit, radius, _ = super().program_fit(X, Y, W, radius, options)
        return fit, radius, max(radius, (radius**2 / DELTA + DELTA) / 2)


class EachNeuron(LayerFit):
    """‖z_m − y_m‖ ≤ r·‖y_m‖/‖Y‖ for each neuron m."""

    name = "each-neuron"
    kind: Any = Ball

    def within(self, Y: Any, radius: float) -> Any:
        return self.kind(Y, radius * Y.norm(dim=0) / Y.norm())

    def loss(self, Y: Any) -> Any:
        return SquaredLoss(Y)

    def reach(self, Y: Any, Z: Tensor) -> float:
        missed = self.within(Y, 1.0).residual(Z).norm(dim=0) / Y.norm(dim=0)
        return float(missed.max() * Y.norm())


class EachBehindRelu(EachNeuron):
    """The same behind the ReLU that follows."""

    name = "each-behind-relu"
    relu = True
    kind = ReluBall


def elastic(N: int, M: int, biased: bool) -> Any:
    """Σ|u| + ½·0.1·u², the bias free."""
    ridge = torch.full((N, 1), 0.1)
    ridge[N - biased :] = 0
    return ElasticNet(ridge, L1.free_bias(N) if biased else L1())


OWN = {fit.name: fit for fit in (Huber(), EachNeuron(), EachBehindRelu())}


def network() -> tuple[nn.Sequential, Tensor]:
    return mlp(6, 4, 3), torch.randn(24, 6)


def missed(fit: LayerFit, Z: Tensor, Y: Tensor) -> float:
    """By how much more than eps 1 outputs miss the targets, from the definitions of the sets."""
    Z, Y = (fit.targets(outputs.detach().double()) for outputs in (Z, Y))
    if isinstance(fit, Huber):
        return math.sqrt(2 * float(huber(Z - Y, DELTA).sum())) / float(Y.norm())
    return float(((Z - Y).norm(dim=0) / Y.norm(dim=0)).max())


@pytest.mark.parametrize("penalty", ["l1", elastic])
@pytest.mark.parametrize("name", OWN)
def test_a_run_and_a_layer_by_hand_are_the_same_program_and_keep_the_sets_promise(name: str, penalty: Any) -> None:
    model, x = network()
    dense, fit = copy.deepcopy(model), OWN[name]
    report = prune_(model, x, 0.2, fit={"0": fit, "*": "ball"}, penalty=penalty, keep_solutions=True)
    row = report.layers[0]
    assert report.certified
    assert [each.fit for each in report.layers] == [name, "ball"]
    assert row.nonzeros < row.nonzeros_before
    assert missed(fit, model[0](x), dense[0](x)) <= 0.2 * (1 + 2e-4)
    assert row.output_error <= row.promised
    program = layer_program(dense[0], x, 0.2, options=Options(fit=fit, penalty=penalty))
    (solution,) = report.solutions["0"]
    assert certify(program, solution.weights, solution.multipliers) == solution.certificate
    assert report.network is not None
    assert report.network.error <= report.network.bound


@pytest.mark.parametrize("name", OWN)
def test_in_cascade_the_set_is_as_large_as_trained_weights_need(name: str) -> None:
    """Its least radius for these outputs holds them, a smaller one does not; and each layer is solved."""
    fit, (model, x) = OWN[name], network()
    Z, Y = torch.randn(24, 4).double(), fit.targets(torch.randn(24, 4).double())
    radius = fit.reach(Y, Z)
    for factor, inside in ((1 + 1e-6, True), (0.99, False)):
        held = fit.within(Y, factor * radius)
        assert (held.distance(held.sums(Z)) <= 1e-9 * radius) is inside
    last = EachNeuron() if fit.relu else fit
    report = prune_(model, x, 1e-3, fit={"0": "ball", "*": last}, mode="cascade", layers="2")
    assert report.layers[0].status == "solved"
    model, x = network()
    report = prune_(model, x, [0.4, 0.01], fit={"0": fit, "*": last}, mode="cascade")
    assert report.certified
    assert report.layers[1].raised
    assert all(row.output_error <= row.promised for row in report.layers)


def test_a_run_goes_on_and_is_verified_where_the_same_objects_are_given_again(tmp_path: Path) -> None:
    model, x = network()
    trained, again = copy.deepcopy(model), copy.deepcopy(model)
    own: dict[str, Any] = {"fit": {"0": OWN["each-behind-relu"], "*": OWN["each-neuron"]}, "penalty": elastic}
    prune_(model, x, 0.2, run=tmp_path, **own)
    prune_(again, x, 0.2, run=tmp_path, callback=lambda name, point: pytest.fail(name), **own)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    found = verify(trained, x, tmp_path, options=Options(**own))
    assert found.ok
    assert found.complete
    for lacking, named in (
        ({}, "fit"),
        ({"fit": own["fit"]}, "penalty"),
        ({**own, "penalty": lambda N, M, biased: L1()}, "penalty"),
        ({**own, "fit": OWN["huber"]}, "fit"),
    ):
        with pytest.raises(InvalidInput, match=rf"{named}: the run was given an object of its caller's.*give the same"):
            verify(trained, x, tmp_path, options=Options(**lacking))


def test_a_fit_that_is_registered_goes_by_its_name(tmp_path: Path) -> None:
    try:
        assert register_fit(EachNeuron) is EachNeuron
        model, x = network()
        trained = copy.deepcopy(model)
        assert prune_(model, x, 0.2, fit="each-neuron", run=tmp_path).layers[1].fit == "each-neuron"
        assert verify(trained, x, tmp_path).ok
    finally:
        del FITS["each-neuron"]
    with pytest.raises(InvalidInput, match="expected one of relu-ball, ball, net-trim, or a LayerFit, found 'each-n"):
        prune_(*network(), 0.2, fit="each-neuron")


def test_budgets_and_refits_take_a_fits_loss_where_solvers_know_it() -> None:
    model, x = network()
    dense = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    report = prune_(model, x, sparsity=0.5, layers="2", fit=OWN["each-neuron"])
    prune_(plain, x, sparsity=0.5, layers="2", fit="ball")
    assert torch.equal(model[2].weight, plain[2].weight)
    assert report.nonzeros == 6
    refitted = prune_(dense, x, 0.2, layers="2", fit=OWN["each-neuron"], refit=True)
    assert refitted.layers[0].status == "refitted"
    for arguments in ({"sparsity": 0.5}, {"eps": 0.2, "refit": True}):
        with pytest.raises(SolverRefused, match=r"expected one of the fits of this library|it is for SquaredLoss"):
            prune_(*network(), fit=OWN["huber"], layers="2", **arguments)


class Bare(LayerFit):
    """No loss, and a set without a residual."""

    name = "bare"

    def within(self, Y: Any, radius: float) -> Any:
        return self


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sparsity": 0.5, "fit": Bare()}, "fit: 'bare' has no loss that a budget could minimise"),
        ({"eps": 0.1, "fit": Bare(), "mode": "cascade"}, "fit: 'bare' gives no residual, which cascade needs"),
        ({"eps": 0.1, "fit": Huber}, "expected one of relu-ball, ball, net-trim, or a LayerFit"),
        ({"eps": 0.1, "penalty": "l2"}, r"penalty: expected 'l1' or a function \(N, M, biased\), found 'l2'"),
    ],
)
def test_what_a_fit_or_a_penalty_lacks_is_named(arguments: dict[str, Any], says: str) -> None:
    model, x = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidInput, match=says):
        prune_(model, x, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
