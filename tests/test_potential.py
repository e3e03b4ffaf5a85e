"""Prune potential and excess error: by hand, against loops and least squares, with intervals that cover."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from convexprune import Sparsity, prune_
from convexprune.errors import DamagedFile, UnsupportedModule
from convexprune.evaluation import Evaluation, Noise, Series, compare, evaluate, evaluate_series, load_evaluation
from convexprune.evaluation.potential import excess, potentials, resampled_means, slope_through_origin
from convexprune.evaluation.rows import DistributionRow, NoiseRow, Outcomes
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, NonFinite, ShapeMismatch

TITLES = ("nominal", "fog", "snow")


def evaluation(outcomes) -> Evaluation:
    """Of a network that is right, or not, on the samples of each distribution."""
    rows = [
        DistributionRow(name, 3 if i else None, "", len(own), float(own.double().mean()), outcomes=Outcomes.of(own))
        for i, (name, own) in enumerate(zip(TITLES, outcomes, strict=False))
    ]
    return Evaluation(tuple(rows), (), (), {"metric": None}, 0.0)


def right(*accuracies: float, samples: int = 1000) -> list[torch.Tensor]:
    """On each distribution this part of the samples."""
    return [torch.arange(samples) < round(accuracy * samples) for accuracy in accuracies]


def series(by_ratio, parent, name="method", samples=1000) -> Series:
    networks = tuple(evaluation(right(*accuracies, samples=samples)) for accuracies in by_ratio.values())
    return Series(name, tuple(by_ratio), networks, evaluation(right(*parent, samples=samples)))


UNEVEN = series(
    {0.2: (0.9, 0.7, 0.5), 0.5: (0.8, 0.7, 0.4), 0.7: (0.9, 0.66, 0.4), 0.9: (0.5, 0.4, 0.3)}, (0.9, 0.7, 0.6)
)


def test_the_potential_is_the_largest_ratio_that_holds_whatever_fails_before() -> None:
    found = UNEVEN.prune_potential()
    values = {title: estimate.value for title, estimate in found.distributions.items()}
    assert values == {"nominal": 0.7, "fog 3": 0.5, "snow 3": 0.0}
    assert found.average.value == pytest.approx(0.4)
    assert found.minimum.value == 0
    assert found.to_dict()["distributions"]["fog 3"]["value"] == 0.5


def test_the_potential_under_noise_is_that_of_its_samples_and_in_no_mean() -> None:
    radii = (0.0, 0.1)
    scores = {None: (0.9, 0.8), 0.2: (0.9, 0.8), 0.5: (0.9, 0.7), 0.7: (0.895, 0.8), 0.9: (0.2, 0.2)}

    def noisy(one: Evaluation, accuracies) -> Evaluation:
        rows = [
            NoiseRow(radius, len(own), 1.0, 0.0, float(own.double().mean()), Outcomes.of(own))
            for radius, own in zip(radii, right(*accuracies, samples=200), strict=True)
        ]
        return replace(one, noise=tuple(rows))

    networks = tuple(noisy(one, scores[ratio]) for ratio, one in zip(UNEVEN.ratios, UNEVEN.evaluations, strict=True))
    whole = replace(UNEVEN, evaluations=networks, parent=noisy(UNEVEN.parent, scores[None]))
    found, without = whole.prune_potential(), UNEVEN.prune_potential()
    assert {radius: estimate.value for radius, estimate in found.noise.items()} == {0.0: 0.5, 0.1: 0.7}
    assert all(each.low <= each.value <= each.high for each in found.noise.values())
    assert (found.average, found.minimum, found.distributions) == (
        without.average,
        without.minimum,
        without.distributions,
    )
    assert without.noise == {}
    assert found.to_dict()["noise"][0.1]["value"] == 0.7


def test_a_loss_of_delta_itself_is_one() -> None:
    exact = series({0.3: (0.895,), 0.6: (0.894,)}, (0.9,))
    assert exact.prune_potential(0.005).average.value == 0
    assert exact.prune_potential(0.0051).average.value == 0.3
    assert exact.prune_potential(0.1).average.value == 0.6


@given(
    st.integers(2, 5), st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([0.0, 0.005, 0.2])
)
def test_potentials_are_those_of_a_loop(M: int, D: int, n: int, seed: int, delta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(n + 1, (M + 1, D), generator=generator)
    ratios = torch.rand(M, generator=generator, dtype=torch.float64)
    found = potentials(counts[1:] / n, counts[0] / n, ratios, delta)
    for d in range(D):
        best = 0.0
        for m in range(M):  # in whole numbers: score > parent − delta
            if int(counts[m + 1, d]) * 1000 > int(counts[0, d]) * 1000 - round(delta * 1000 * n):
                best = max(best, float(ratios[m]))
        assert found[d] == best


def test_excess_error_by_hand_and_its_slope_by_least_squares() -> None:
    by_ratio = {0.2: (0.9, 0.7, 0.5), 0.5: (0.85, 0.6, 0.4), 0.8: (0.6, 0.3, 0.2)}
    found = series(by_ratio, (0.9, 0.8, 0.6)).excess_error()
    # The parent loses 0.2 by corruptions on average; the networks 0.3, 0.35 and 0.35.
    assert found.errors == pytest.approx((0.1, 0.15, 0.15))
    slope = np.linalg.lstsq(np.array([[0.2], [0.5], [0.8]]), np.array(found.errors), rcond=None)[0]
    assert found.slope.value == pytest.approx(slope.item())
    assert found.slope.low <= found.slope.value <= found.slope.high
    assert found.to_dict()["ratios"] == (0.2, 0.5, 0.8)


@given(st.floats(-2, 2), st.lists(st.floats(0.01, 1), min_size=2, max_size=6))
def test_errors_on_a_line_have_its_slope(slope: float, ratios: list[float]) -> None:
    rho = torch.tensor(ratios, dtype=torch.float64)
    assert float(slope_through_origin(rho, slope * rho)) == pytest.approx(slope)


def test_networks_like_their_parent_have_no_excess_error() -> None:
    scores = torch.rand(4, 3, 7, generator=torch.Generator().manual_seed(0))
    assert float(excess(scores[:1].expand_as(scores), scores[0]).abs().max()) < 1e-6
    same = series({0.1: (0.9, 0.7), 0.3: (0.9, 0.7)}, (0.9, 0.7)).excess_error()
    assert (same.errors, same.slope.value, same.slope.low, same.slope.high) == ((0.0, 0.0), 0.0, 0.0, 0.0)


# The bootstrap.


def test_samples_are_drawn_alike_for_all_and_anew_for_each_seed() -> None:
    values = torch.rand(500, generator=torch.Generator().manual_seed(0)) < 0.4
    outcomes = torch.stack([values, values, ~values]).reshape(3, 1, 500)
    drawn = resampled_means(outcomes, 50, 1)
    assert drawn.shape == (3, 1, 50)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.allclose(drawn[0] + drawn[2], torch.ones(1, 50, dtype=torch.float64))
    assert torch.equal(drawn, resampled_means(outcomes, 50, 1))
    assert torch.allclose(drawn, resampled_means(outcomes.double(), 50, 1))
    assert not torch.equal(drawn, resampled_means(outcomes, 50, 2))


def test_resampled_means_have_the_mean_and_the_spread_of_a_binomial() -> None:
    drawn = resampled_means(torch.arange(400) < 120, 4000, 0)
    assert float(drawn.mean()) == pytest.approx(0.3, abs=0.002)
    assert float(drawn.std()) == pytest.approx((0.3 * 0.7 / 400) ** 0.5, rel=0.05)


def test_blocks_of_draws_are_put_together() -> None:
    assert resampled_means(torch.ones(2, 3_000_000, dtype=torch.bool), 3, 0).tolist() == [[1.0] * 3] * 2


def test_the_interval_of_the_slope_covers_the_true_one() -> None:
    """Networks that are right with given probabilities, on 300 samples, 60 times over."""
    generator = torch.Generator().manual_seed(0)
    ratios, parent = (0.3, 0.6, 0.9), torch.tensor([0.9, 0.7])
    networks = torch.stack([torch.tensor([0.9, 0.7 - 0.3 * ratio]) for ratio in ratios])  # the slope is 0.3
    covered = 0
    for _ in range(60):
        draws = torch.rand(4, 2, 300, generator=generator) < torch.cat([parent[None], networks])[:, :, None]
        whole = Series("drawn", ratios, tuple(map(evaluation, draws[1:])), evaluation(draws[0]))
        slope = whole.excess_error(resamples=200).slope
        covered += slope.low <= 0.3 <= slope.high
    assert covered >= 52  # 57 are expected; fewer than 52 have a probability below 2 %


def test_the_interval_of_a_potential_holds_what_other_samples_would_give() -> None:
    close = series({0.2: (0.9,), 0.4: (0.898,), 0.8: (0.5,)}, (0.9,), samples=500)
    found = close.prune_potential(0.001)
    assert found.average.value == 0.2
    assert (found.average.low, found.average.high) == (0.2, 0.4)  # nested: the second loses 1 of 500, or nothing
    sure = UNEVEN.prune_potential(0.001).distributions["nominal"]
    assert sure.low == sure.high == sure.value == 0.7


def test_figures_are_those_of_their_seed() -> None:
    assert UNEVEN.prune_potential(seed=3) == UNEVEN.prune_potential(seed=3)
    assert UNEVEN.excess_error(seed=3, resamples=20) != UNEVEN.excess_error(seed=4, resamples=20)


# Series of networks.


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))


def samples():
    x = torch.rand(40, 1, 10, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, network()(x).argmax(1)


def pruned(*sparsities: float) -> list[nn.Module]:
    models = [network() for _ in sparsities]
    for model, sparsity in zip(models, sparsities, strict=True):
        prune_(model, target=Sparsity(sparsity, "network"), method="magnitude")
    return models


SETTINGS = {"corruptions": ("brightness", "gaussian_noise")}


def test_a_series_has_its_networks_ratios_counted_and_their_parent() -> None:
    models = [network(), *pruned(0.5, 0.8)]
    found = evaluate_series(models, samples(), parent=network(), name="magnitude", **SETTINGS)
    assert found.ratios == pytest.approx((0, 0.5, 0.8), abs=0.01)
    assert found.parent.nominal.score == 1
    assert [row.outcomes for row in found.evaluations[0].rows] == [row.outcomes for row in found.parent.rows]
    assert [row.agreement for row in found.evaluations[0].rows] == [1, 1, 1]
    assert all(one.parent is found.parent for one in found.evaluations)
    potential = found.prune_potential()
    assert set(potential.distributions) == {"nominal", "brightness 3", "gaussian_noise 3"}
    assert potential.noise == {}
    assert found.excess_error().errors[0] == 0


def test_of_noise_of_radius_0_on_all_images_the_potential_is_the_nominal_one() -> None:
    noise = Noise((0.0, 1e-9, 0.5, 0.5), images=40, draws=1)
    models = pruned(0.2, 0.5, 0.9)
    found = evaluate_series(models, samples(), parent=network(), noise=noise, corruptions=()).prune_potential(0.05)
    assert found.noise[0.0] == found.distributions["nominal"]
    assert list(found.noise) == [0.0, 1e-9, 0.5]
    unlabelled = evaluate_series(models, samples()[0], parent=network(), noise=noise, corruptions=())
    assert unlabelled.evaluations[0].noise[0].agreement > 0
    with pytest.raises(InvalidInput, match="there were no labels"):
        unlabelled.prune_potential()


def test_draws_of_an_image_are_no_samples_of_their_own() -> None:
    """At radius 0 they say nothing new, and intervals are as wide as of one draw."""
    models = pruned(0.2, 0.5, 0.9)
    one, several = (
        evaluate_series(models, samples(), parent=network(), noise=Noise((0.0,), 40, draws), corruptions=())
        for draws in (1, 6)
    )
    assert several.evaluations[0].noise[0].samples == 240
    assert several.prune_potential(0.05).noise == one.prune_potential(0.05).noise


def test_networks_of_a_series_are_evaluated_as_they_are_alone() -> None:
    models, data = pruned(0.5, 0.8), samples()
    found = evaluate_series(models, data, parent=network(), ratios=(0.5, 0.8), batch_size=7, **SETTINGS)
    for model, one in zip(models, found.evaluations, strict=True):
        assert one.rows == evaluate(model, data, parent=network(), batch_size=7, **SETTINGS).rows
    assert found.ratios == (0.5, 0.8)


def test_a_series_is_saved_and_read_back(tmp_path: Path) -> None:
    settings = {"control": copy.deepcopy(network()), "name": "magnitude", **SETTINGS}
    noise = Noise((0.0, 0.1), images=9, draws=2)
    found = evaluate_series(pruned(0.5, 0.8), samples(), parent=network(), noise=noise, **settings)
    again = Series.load(found.save(tmp_path / "series.json"))
    assert again == found == load_evaluation(tmp_path / "series.json")
    assert again.evaluations[1].noise == found.evaluations[1].noise
    assert again.evaluations[0].parent == found.parent
    assert again.prune_potential() == found.prune_potential()
    with pytest.raises(DamagedFile, match="kind 'series'"):
        Evaluation.load(tmp_path / "series.json")
    text = (tmp_path / "series.json").read_text(encoding="utf-8")
    for broken in (text.replace("magnitude", "gravity"), text[:-20], text.replace("series", "evaluation", 1), "{}", ""):
        (tmp_path / "series.json").write_text(broken, encoding="utf-8")
        with pytest.raises(DamagedFile, match=r"series\.json is damaged"):
            load_evaluation(tmp_path / "series.json")
    records = found.records()
    assert {(record["series"], record["network"]) for record in records} == {
        ("magnitude", who) for who in ("parent", "model", "control")
    }
    assert {record["ratio"] for record in records} == {0.0, None, *found.ratios}


def test_tables_show_a_row_a_network_and_what_they_add_up_to() -> None:
    text = str(UNEVEN)
    assert all(f"{ratio:.3f}" in text for ratio in UNEVEN.ratios)
    assert "prune potential: mean 0.4 (" in text
    assert "excess error a ratio:" in text
    text = " ".join(str(replace(UNEVEN, **nominal_only())).split())
    assert "prune potential: mean 0.7 (0.7 to 0.7)" in text
    assert "the excess error is the mean over corruptions, and none were evaluated" in text
    assert len(UNEVEN.table(160).columns) > len(UNEVEN.table(80).columns)
    alone = replace(UNEVEN, ratios=(0.2,), evaluations=UNEVEN.evaluations[:1])
    assert "expected at least two, found 1" in " ".join(str(alone).split())


def shown(table) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_comparisons_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, wide in ((80, False), (150, True)):
        monkeypatch.setenv("COLUMNS", str(columns))
        console = Console()
        with console.capture() as capture:
            console.print(compare([UNEVEN]))
        assert "method" in capture.get()
        assert "…" not in capture.get()
        assert ("0.7 (0.7 to 0.7)" in capture.get()) == wide


def test_series_are_compared_and_the_best_of_each_column_is_marked() -> None:
    other = series({0.45: (0.9, 0.7, 0.6), 0.6: (0.7, 0.5, 0.4)}, (0.9, 0.7, 0.6), name="other")
    lines = shown(compare([UNEVEN, other], width=160)).splitlines()
    (first,) = [line for line in lines if line.startswith("method ") and "nominal" not in line]
    (second,) = [line for line in lines if line.startswith("other")]
    assert first.count("*") == 1  # the nominal potential
    assert second.count("*") == 3
    assert "0.7 (0.7 to 0.7) *" in first
    assert "0.45 (0.45 to 0.45) *" in second
    assert "excess error" not in shown(compare([replace(UNEVEN, **nominal_only()), replace(UNEVEN, **nominal_only())]))


def nominal_only():
    rows = [replace(one, rows=one.rows[:1]) for one in (UNEVEN.parent, *UNEVEN.evaluations)]
    return {"parent": rows[0], "evaluations": tuple(rows[1:])}


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InvalidInput, match="found none"):
        compare([])
    with pytest.raises(InvalidInput, match="of the same distributions and samples"):
        compare([UNEVEN, replace(UNEVEN, **nominal_only())])


WRONG = {
    "no network": ([], {}, InvalidInput, "models: expected at least one"),
    "no module": ([3], {"ratios": [0.5]}, InvalidInput, "expected a torch.nn.Module, found 3"),
    "a ratio too many": (1, {"ratios": (0.1, 0.2)}, ShapeMismatch, "each of the 1 networks, found 2"),
    "a ratio above 1": (1, {"ratios": (1.5,)}, InvalidTolerance, "from 0 to 1, found"),
    "a word": (1, {"ratios": ("half",)}, InvalidTolerance, "ratios: expected a number, found 'half'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_series_that_make_no_sense_are_refused(case: str) -> None:
    models, settings, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        evaluate_series([network()] if models == 1 else models, samples(), parent=network(), **settings, **SETTINGS)


def test_a_parent_with_fewer_weights_than_a_network_leaves_the_ratio_to_the_caller() -> None:
    with pytest.raises(InvalidInput, match=r"a pruned network [0-9]+: give ratios="):
        evaluate_series([network()], samples(), parent=pruned(0.5)[0], **SETTINGS)
    masked = network()
    nn.utils.prune.l1_unstructured(masked[0], "weight", 0.5)
    with pytest.raises(UnsupportedModule, match=r"torch\.nn\.utils\.prune"):
        evaluate_series([masked], samples(), parent=network(), **SETTINGS)
    assert evaluate_series([masked], samples(), parent=network(), ratios=[0.4], **SETTINGS).ratios == (0.4,)


def test_errors_name_the_network_of_a_series() -> None:
    broken = network()
    with torch.no_grad():
        broken[4].bias.fill_(torch.nan)
    with pytest.raises(NonFinite, match=r"model 1 \(ratio 0\.8\): NaN or infinity in the outputs on 'nominal'"):
        evaluate_series([network(), broken], samples(), parent=network(), ratios=(0.1, 0.8), **SETTINGS)


def test_potential_and_excess_error_say_what_they_need() -> None:
    alone = replace(UNEVEN, ratios=(0.2,), evaluations=UNEVEN.evaluations[:1])
    for figure in (alone.prune_potential, alone.excess_error):
        with pytest.raises(InvalidInput, match="several ratios: expected at least two, found 1"):
            figure()
    with pytest.raises(InvalidInput, match="mean over corruptions, and none were evaluated"):
        replace(UNEVEN, **nominal_only()).excess_error()
    with pytest.raises(InvalidInput, match="all of them are 0"):
        replace(UNEVEN, ratios=(0.0,) * 4).excess_error()
    unlabelled = evaluate_series(pruned(0.2, 0.5), samples()[0], parent=network(), **SETTINGS)
    with pytest.raises(InvalidInput, match="there were no labels"):
        unlabelled.prune_potential()
    with pytest.raises(InvalidTolerance, match="delta: expected a number ≥ 0"):
        UNEVEN.prune_potential(-0.1)
    with pytest.raises(InvalidTolerance, match="resamples"):
        UNEVEN.prune_potential(resamples=0)
