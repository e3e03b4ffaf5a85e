"""Figures beyond accuracy: by hand on outputs that are given, and the same however samples are batched and passed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convexprune.errors import DamagedFile, EmptyCalibration
from convexprune.evaluation import Evaluation, Noise, evaluate, load_evaluation
from convexprune.evaluation.measures import BINS, Predictions, calibration_error, calibration_sums
from convexprune.evaluation.rows import Outcomes
from convexprune.runs.data import Data
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, MissingExtra, NonFinite, ShapeMismatch

CORRUPTIONS = ("brightness", "gaussian_noise")


class Given(nn.Module):
    """A network that returns the rows of a table that its inputs are numbers of."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.as_tensor(rows, dtype=torch.float64)

    def forward(self, numbers):
        return self.rows[numbers[:, 0].long()]


class Seeing(nn.Module):
    """A network that keeps what it is given, and changes it in place."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.model(x.mul_(2))


def numbers(count):
    return torch.arange(count)[:, None].float()


def outputs(confidence, predicted, classes=2):
    """Outputs of two classes whose softmax gives the predicted one this confidence."""
    rows = torch.zeros(len(predicted), classes, dtype=torch.float64)
    p = torch.as_tensor(confidence, dtype=torch.float64)
    rows[torch.arange(len(predicted)), predicted] = (p * (classes - 1) / (1 - p)).log()
    return rows


def convolutional(seed=0, channels=1, classes=4):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(channels, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(20, classes))


def images(count=30, channels=1, size=12, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, size, size, generator=generator), torch.randint(4, (count,), generator=generator)


def assert_same(one, other):
    assert len(one.records()) == len(other.records()) > 0
    for a, b in zip(one.records(), other.records(), strict=True):
        assert a | {"value": 0} == b | {"value": 0}
        assert a["value"] == pytest.approx(b["value"], abs=1e-6), a
    assert [row.outcomes for row in one.rows] == [row.outcomes for row in other.rows]


# Measures.


def test_a_calibrated_classifier_has_no_calibration_error() -> None:
    confidence, right = [], []
    for p in (0.6, 0.7, 0.8, 0.9):
        confidence += [p] * 100
        right += [True] * round(100 * p) + [False] * (100 - round(100 * p))
    labels = torch.zeros(400, dtype=torch.long)
    predicted = torch.tensor([0 if hit else 1 for hit in right])
    row = evaluate(Given(outputs(confidence, predicted)), (numbers(400), labels)).nominal
    assert row.score == pytest.approx(0.75)
    assert row.calibration_error == pytest.approx(0, abs=1e-9)


def test_an_overconfident_one_has_the_excess_of_its_confidence() -> None:
    predicted = torch.tensor([0] * 60 + [1] * 40)
    row = evaluate(Given(outputs([0.9] * 100, predicted)), (numbers(100), torch.zeros(100, dtype=torch.long))).nominal
    assert row.calibration_error == pytest.approx(0.9 - 0.6)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=60), st.data())
def test_calibration_sums_add_up_over_batches_and_bound_the_error(pairs, data) -> None:
    confidence, right = (torch.tensor(column) for column in zip(*pairs, strict=True))
    cut = data.draw(st.integers(0, len(pairs)))
    whole = calibration_sums(confidence, right)
    parts = [calibration_sums(confidence[part], right[part]) for part in (slice(cut), slice(cut, None))]
    assert torch.allclose(parts[0] + parts[1], whole)
    error = calibration_error(whole)
    assert abs(float(confidence.double().mean() - right.double().mean())) - 1e-6 <= error <= 1
    assert error <= float((confidence - right.float()).abs().mean()) + 1e-6


def test_bins_are_closed_above() -> None:
    sums = calibration_sums(torch.tensor([0.0, 0.2, 0.21, 1.0], dtype=torch.float64), torch.tensor([True] * 4), bins=5)
    assert sums[:, 0].tolist() == [2, 1, 0, 0, 1]
    assert BINS == 15


def test_each_class_has_its_accuracy_and_one_without_samples_none() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 3])
    predicted = torch.tensor([0, 1, 1, 1, 0, 0])
    found = evaluate(Given(outputs([0.9] * 6, predicted, 4)), (numbers(6), labels))
    assert found.nominal.classes == (0.5, pytest.approx(2 / 3), None, 0.0)
    assert (found.nominal.worst_class, found.nominal.worst_accuracy) == (3, 0.0)
    assert "class 2 has no sample: what the network does there is not known" in found.notices


def test_likeness_to_the_parent_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    parent = outputs([0.9, 0.8, 0.7, 0.6], torch.tensor([0, 1, 1, 0]))  # wrong on samples 1 and 3
    pruned = outputs([0.9, 0.6, 0.9, 0.8], torch.tensor([0, 1, 0, 1]))
    row = evaluate(Given(pruned), (numbers(4), labels), parent=Given(parent)).nominal
    assert row.agreement == 0.5
    apart = torch.tensor([0, 0.2, 0.6, 0.4]) * 2**0.5  # two classes: both probabilities differ alike
    assert row.distance == pytest.approx(float(apart.mean()))
    assert (row.mistakes, row.accuracy_on_mistakes) == (2, 0.5)
    assert row.confidence_on_mistakes == pytest.approx(0.7)


def test_a_network_is_like_itself() -> None:
    model = convolutional()
    found = evaluate(model, images(), parent=model, corruptions=CORRUPTIONS, noise=Noise((0, 0.3), images=9, draws=2))
    for row in (*found.rows, *found.noise):
        assert (row.agreement, row.distance) == (1.0, 0.0)
    for row, of_parent in zip(found.rows, found.parent.rows, strict=True):
        assert row.accuracy_on_mistakes == 0.0
        assert (row.score, row.outcomes) == (of_parent.score, of_parent.outcomes)


def test_predictions_are_those_of_the_largest_outputs_even_where_probabilities_round_to_the_same() -> None:
    said = Predictions.of(torch.tensor([[200.0, 100.0, 0.0], [0.0, 1e-9, -1.0]]))
    assert said.classes.tolist() == [0, 1]
    assert torch.allclose(said.probabilities.sum(1), torch.ones(2))


# Data, in every form.


def test_figures_do_not_depend_on_batches_or_on_the_form_of_the_data() -> None:
    x, y = images(22)
    forms = {
        "tensors": (x, y),
        "data": Data(x, labels=y, batch_size=9),
        "batches": [(x[i : i + 5], y[i : i + 5]) for i in range(0, 22, 5)],
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4),
        "iterator": iter([(x[:20], y[:20]), (x[20:], y[20:])]),
        "arrays": (x.numpy(), y.tolist()),
    }
    model, parent = convolutional(), convolutional(1)
    settings = {"parent": parent, "corruptions": CORRUPTIONS, "noise": Noise((0.1,), images=7, draws=3), "seed": 5}
    found = {name: evaluate(model, data, **settings) for name, data in forms.items()}
    found["small"] = evaluate(model, (x, y), batch_size=1, **settings)
    for other in found.values():
        assert_same(found["tensors"], other)


def test_mappings_are_read_by_their_keys() -> None:
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = convolutional()

        def forward(self, pixel_values):
            return {"logits": self.model(pixel_values), "hidden": pixel_values}

    x, y = images()
    keyed = evaluate(Keyed(), [{"pixel_values": x, "labels": y}], corruptions="brightness")
    assert_same(keyed, evaluate(convolutional(), (x, y), corruptions="brightness"))
    assert any("'labels'" in notice for notice in keyed.notices)


def test_without_labels_likeness_is_left() -> None:
    x, _ = images()
    found = evaluate(convolutional(), x, parent=convolutional(1), corruptions=("brightness",))
    for row in found.rows:
        assert row.agreement is not None
        assert (row.score, row.classes, row.calibration_error, row.mistakes, row.outcomes) == (None,) * 5
    two = Seeing(nn.Flatten())
    two.forward = lambda a, b: torch.cat([a, b], 1)  # two inputs, and no labels
    a, b = torch.rand(6, 2), torch.rand(6, 3)
    assert evaluate(two, [(a, b)], parent=two, corruptions=()).nominal.agreement == 1


def test_a_metric_takes_the_place_of_the_accuracy() -> None:
    x, y = images()
    model = convolutional()

    def second(outputs, labels):
        return (outputs.topk(2).indices == labels[:, None]).any(1)

    found = evaluate(model, (x, y), metric=second, corruptions=())
    with torch.no_grad():
        wanted = second(model.eval()(x), y)
    assert torch.equal(found.nominal.outcomes.tensor(), wanted)
    assert found.nominal.score == pytest.approx(float(wanted.double().mean()))
    plain = evaluate(model, (x, y), corruptions=()).nominal
    assert (found.nominal.classes, found.nominal.calibration_error) == (plain.classes, plain.calibration_error)
    assert "second" in found.provenance["metric"]


def test_what_is_no_classifier_has_its_metric_alone() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 1), torch.rand(12, 5), torch.rand(12, 1)
    found = evaluate(model, (x, y), metric=lambda outputs, labels: -(outputs - labels).square().sum(1), parent=model)
    row = found.nominal
    assert row.score == pytest.approx(-float((model(x) - y).square().mean().detach()))
    assert (row.classes, row.agreement, row.calibration_error) == (None, None, None)
    assert "-0." in str(found)


# Corruptions and noise.


def test_all_networks_see_the_same_corrupted_and_noisy_inputs() -> None:
    x, y = images()
    models = [Seeing(convolutional(seed)) for seed in range(3)]
    before = x.clone()
    noise = Noise((0.0, 0.2), images=6, draws=2)
    evaluate(
        models[0], (x, y), parent=models[1], control=models[2], corruptions=CORRUPTIONS, noise=noise, batch_size=16
    )
    assert torch.equal(x, before)
    seen = [torch.cat([part for part in model.seen if len(part) > 8]) for model in models]
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_noise_keeps_within_its_radius_and_scales_with_it() -> None:
    x = images(10)[0]
    model = Seeing(convolutional())
    noise = Noise((0.0, 0.25, 0.5), images=10, draws=2)
    found = evaluate(model, x, parent=model, corruptions=(), noise=noise)
    clean, small, large = [part for part in model.seen if len(part) == 10][-6::2]
    assert torch.equal(clean, x[5:].repeat_interleave(2, 0))
    assert 0.2 < float((small - clean).abs().max()) <= 0.25
    assert torch.allclose(large - clean, 2 * (small - clean), atol=1e-6)
    assert abs(float((large - clean).mean())) < 0.05
    assert [row.samples for row in found.noise] == [20, 20, 20]


def test_noise_of_radius_0_is_the_likeness_on_the_images_themselves() -> None:
    x, y = images()
    found = evaluate(convolutional(), (x, y), parent=convolutional(1), corruptions=(), noise=Noise((0.0,), images=99))
    assert found.noise[0].agreement == found.nominal.agreement
    assert found.noise[0].distance == pytest.approx(found.nominal.distance)
    assert found.noise[0].score == found.nominal.score
    drawn = Noise((0.0, 0.2), images=11, draws=3)
    model, parent = convolutional(), convolutional(1)
    found = evaluate(model, (x, y), parent=parent, corruptions=(), noise=drawn, seed=4)
    chosen = sorted(drawn.chosen(30, 4))
    few = evaluate(model, (x[chosen], y[chosen]), parent=parent, corruptions=())
    assert found.noise[0].score == pytest.approx(few.nominal.score)
    assert torch.equal(found.noise[0].outcomes.tensor(), few.nominal.outcomes.tensor().repeat_interleave(3))
    assert [row.agreement for row in found.parent.noise] == [1, 1]  # with itself
    assert [row.distance for row in found.parent.noise] == [0, 0]
    assert found.parent.noise[0].score == pytest.approx(few.parent.nominal.score)


def test_scores_under_noise_are_those_of_the_metric_and_none_without_labels() -> None:
    x, y = images()
    settings = {"parent": convolutional(1), "corruptions": (), "noise": Noise((0.0, 0.3), images=30, draws=1)}
    own = evaluate(convolutional(), (x, y), metric=lambda outputs, labels: outputs[:, 0], **settings)
    assert own.noise[0].score == pytest.approx(own.nominal.score)
    assert own.noise[0].outcomes.tensor().dtype == torch.float64
    unlabelled = evaluate(convolutional(), x, **settings)
    assert [(row.score, row.outcomes) for row in unlabelled.noise] == [(None, None)] * 2
    assert unlabelled.noise[1].agreement == own.noise[1].agreement


def test_default_noise_is_that_of_the_paper_at_the_cost_of_six_passes_over_ten_thousand_images() -> None:
    noise = Noise()
    assert (len(noise.radii), noise.radii[0], noise.radii[-1]) == (15, 0, 0.7)
    assert len(noise.radii) * noise.images * noise.draws == 60_000
    assert len(noise.chosen(5000, 0)) == 1000
    assert noise.chosen(12, 0) == set(range(12))


def test_corruptions_are_of_pixels_whatever_the_normalisation() -> None:
    class Normalising(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model((x - mean[:, None, None]) / std[:, None, None])

    x, y = images(channels=3)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    model = convolutional(channels=3)
    normalised = (x - mean[:, None, None]) / std[:, None, None]
    found = evaluate(model, (normalised, y), mean=mean, std=std.tolist(), corruptions=CORRUPTIONS)
    assert_same(found, evaluate(Normalising(model), (x, y), corruptions=CORRUPTIONS))
    one = evaluate(model, ((x - 0.5) / 0.25, y), mean=0.5, std=0.25, corruptions=CORRUPTIONS)
    assert [row.title for row in one.rows] == ["nominal", "brightness 3", "gaussian_noise 3"]


@pytest.mark.parametrize("channels", [1, 3])
def test_flattened_images_have_the_figures_of_images(channels: int) -> None:
    x, y = images(channels=channels, size=9)
    torch.manual_seed(0)
    linear, parent = (nn.Linear(channels * 81, 4) for _ in range(2))
    settings = {"mean": 0.4, "std": 0.3, "corruptions": CORRUPTIONS, "noise": Noise((0.0, 0.2), images=8), "seed": 2}
    shaped = [nn.Sequential(nn.Flatten(), model) for model in (linear, parent)]
    normalised = (x - 0.4) / 0.3
    flat = evaluate(linear, (normalised.flatten(1), y), parent=parent, shape=(channels, 9, 9), batch_size=7, **settings)
    assert_same(flat, evaluate(shaped[0], (normalised, y), parent=shaped[1], **settings))
    assert flat.provenance["shape"] == [channels, 9, 9]


def test_inputs_that_are_not_of_the_shape_are_no_images() -> None:
    x, y = images(8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    for data, size in (((x.flatten(1), y), 11), ((x, y), 12)):
        found = evaluate(model, data, shape=(1, size, size))
        assert len(found.rows) == 1
        assert f"expected flattened images [n, {size**2}]" in found.notices[0]
        with pytest.raises(InvalidInput, match="corruptions: expected flattened images"):
            evaluate(model, data, shape=(1, size, size), corruptions=["fog"])


def test_images_are_corrupted_unasked_and_what_cannot_be_is_said() -> None:
    x, y = images(4, size=32)
    found = evaluate(convolutional(), (x, y), severities=(1, 5))
    assert {"gaussian_noise 1", "gaussian_noise 5"} <= {row.title for row in found.rows}
    assert any(notice.startswith("left out: frost (expected textures") for notice in found.notices)
    assert any(notice.startswith("left out: saturate (expected images of 3 channels") for notice in found.notices)
    assert all(row.category for row in found.rows[1:])
    flat = evaluate(nn.Linear(6, 4), (torch.rand(8, 6), y.repeat(2)))
    assert len(flat.rows) == 1
    assert "found [8, 6] (float32)" in flat.notices[0]
    wide = evaluate(convolutional(), (3 * x - 1, y))
    assert len(wide.rows) == 1
    assert "expected pixels from 0 to 1, found -0.99" in wide.notices[0]
    assert "give mean= and std=" in wide.notices[0]


def test_corruptions_that_fail_on_such_images_are_left_out_unless_they_are_named(monkeypatch) -> None:
    small, y = images(4, size=6)
    found = evaluate(convolutional(), (small, y))
    assert len(found.rows) == 1
    assert any(notice.startswith("left out: gaussian_noise, ") and "8 × 8" in notice for notice in found.notices)
    with pytest.raises(ShapeMismatch, match="8 × 8 pixels"):
        evaluate(convolutional(), (small, y), corruptions=["fog"])
    monkeypatch.setitem(sys.modules, "PIL", None)
    x, y = images(4)
    notices = evaluate(convolutional(), (x, y)).notices
    assert any(notice.startswith("left out: jpeg (") and "pip install" in notice for notice in notices)
    with pytest.raises(MissingExtra, match="Pillow"):
        evaluate(convolutional(), (x, y), corruptions=["jpeg"])


def test_a_later_batch_out_of_range_leaves_corruptions_out_of_all() -> None:
    x, y = images(8)
    data = [(x, y), (2 * x, y)]
    found = evaluate(convolutional(), data)
    assert [row.samples for row in found.rows] == [16]
    assert len([notice for notice in found.notices if notice.startswith("corruptions are left out")]) == 1
    with pytest.raises(InvalidInput, match=r"corruptions: expected pixels from 0 to 1, found 0\.0.* to 1\.9"):
        evaluate(convolutional(), data, corruptions=("brightness",))


# Networks stay as they are, and in the faster layout where that changes nothing.


def test_models_are_left_as_found() -> None:
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.model, self.last = convolutional(), None

        def forward(self, x):
            self.calls += 1
            self.last = x
            return self.model(x) * (self.calls == 1)  # what it returns depends on the calls before

    model = Counting().train()
    model.model[1].eval()
    found = evaluate(model, images(), corruptions=CORRUPTIONS, batch_size=8)
    assert (int(model.calls), model.last, model.training, model.model[1].training) == (0, None, True, False)
    assert_same(found, evaluate(convolutional(), images(), corruptions=CORRUPTIONS))


class Viewing(nn.Module):
    """Flattens what a convolution gives by a view, which channels side by side do not allow."""

    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear, self.shape, self.layouts = nn.Conv2d(3, 4, 3), nn.Linear(400, 4), shape, set()

    def forward(self, x):
        self.layouts.add(x.is_contiguous(memory_format=torch.channels_last))
        return self.linear(self.shape(self.conv(x)))


def test_channels_side_by_side_are_given_to_networks_that_take_them() -> None:
    reading, viewing = Viewing(lambda x: x.flatten(1)), Viewing(lambda x: x.view(len(x), -1))
    data = images(12, channels=3)
    assert_same(*(evaluate(model, data, corruptions=CORRUPTIONS) for model in (reading, viewing)))
    with torch.no_grad():
        wanted = viewing.eval()(data[0]).argmax(1) == data[1]
    assert torch.equal(evaluate(reading, data, corruptions=()).nominal.outcomes.tensor(), wanted)
    batches = []
    reading.conv.register_forward_pre_hook(lambda _, args: batches.append(args[0]))
    viewing.conv.register_forward_pre_hook(lambda _, args: batches.append(args[0]))
    evaluate(reading, data, corruptions=())
    assert batches[-1].is_contiguous(memory_format=torch.channels_last)
    evaluate(viewing, data, corruptions=())
    assert batches[-1].is_contiguous()


def test_progress_is_told() -> None:
    told = []
    settings = {"parent": convolutional(), "corruptions": CORRUPTIONS, "noise": Noise((0.1,), images=5)}
    evaluate(convolutional(), images(20), batch_size=8, progress=lambda *step: told.append(step), **settings)
    assert told == [("evaluate", n, 9) for n in range(1, 10)] + [("noise", n, 3) for n in range(1, 4)]


# Errors.

X, Y = images(8)
PARENT = convolutional(1)
WRONG = {
    "no labels": (X, {}, InvalidInput, "without a parent= they are needed"),
    "labels that are no classes": ((X, Y.float()), {}, InvalidInput, r"labels torch\.float32 \[8\]: give metric="),
    "a label too many": ((X, Y + 1), {}, InvalidInput, "whole numbers from 0 to 3, for 4 outputs, found . to 4"),
    "fewer labels": ((X, Y[:5]), {}, ShapeMismatch, "expected one for each of the 8 samples"),
    "labels of some": ([(X, Y), X], {"parent": PARENT}, InvalidInput, "some batches have labels and others none"),
    "no sample": ((X[:0], Y[:0]), {}, EmptyCalibration, "no sample"),
    "no data": (None, {}, InvalidInput, "data: expected inputs"),
    "a metric without labels": (X, {"metric": len, "parent": PARENT}, InvalidInput, "metric= needs them"),
    "a metric of the mean": ((X, Y), {"metric": lambda o, y: o.mean()}, ShapeMismatch, r"expected a tensor \[8\]"),
    "a metric with NaN": ((X, Y), {"metric": lambda o, y: o[:, 0] * torch.nan}, NonFinite, "metric: NaN"),
    "no metric": ((X, Y), {"metric": "accuracy"}, InvalidInput, "metric: expected a function"),
    "a control without a parent": ((X, Y), {"control": PARENT}, InvalidInput, "control: .* give parent="),
    "noise without a parent": ((X, Y), {"noise": Noise()}, InvalidInput, "noise: .* give parent="),
    "other noise": ((X, Y), {"noise": 0.1, "parent": PARENT}, InvalidInput, r"expected Noise\(radii, images, draws\)"),
    "no such corruption": ((X, Y), {"corruptions": ["rain"]}, InvalidInput, "'rain', expected some of .*brightness"),
    "frost without pictures": (
        (X, Y),
        {"corruptions": ["frost"]},
        InvalidInput,
        "frost: expected textures, found none",
    ),
    "colours of grey": (
        (X, Y),
        {"corruptions": ["saturate"]},
        InvalidInput,
        "saturate: expected images of 3 channels, found 1",
    ),
    "severity 6": ((X, Y), {"severities": (3, 6)}, InvalidTolerance, r"from 1 to 5, found \[3, 6\]"),
    "severity 0": ((X, Y), {"severities": 0}, InvalidTolerance, "severities: expected a whole number ≥ 1"),
    "a deviation of 0": ((X, Y), {"std": 0}, InvalidTolerance, "std: expected positive numbers"),
    "a mean too many": ((X, Y), {"mean": (0.1, 0.2)}, ShapeMismatch, "mean: .* each of the 1 channels, found 2"),
    "two channels": ((X, Y), {"shape": (2, 12, 12)}, InvalidInput, r"shape: .* found \(2, 12, 12\)"),
    "no channels": ((X, Y), {"shape": (12, 12)}, InvalidInput, "shape: expected .1 or 3 channels, height, width"),
    "a word for a mean": ((X, Y), {"mean": "imagenet"}, InvalidInput, "mean: expected a number"),
    "a seed": ((X, Y), {"seed": -1}, InvalidTolerance, "seed"),
    "another parent": ((X, Y), {"parent": convolutional(classes=5)}, ShapeMismatch, r"\[8, 5\], as the parent's"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_evaluated_is_refused_with_what_was_found(case: str) -> None:
    data, settings, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        evaluate(convolutional(), data, **settings)


def test_outputs_that_are_not_finite_name_the_network_and_the_distribution() -> None:
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = convolutional()

        def forward(self, x):
            return self.model(x) / (x.amax() < 1)

    model, data = convolutional(), images()
    for networks, title in (((Fragile(), model), "the model"), ((model, Fragile()), "the parent")):
        with pytest.raises(NonFinite, match=f"{title}: NaN or infinity in the outputs on 'brightness 3'"):
            evaluate(networks[0], data, parent=networks[1], corruptions=("brightness",))


@pytest.mark.parametrize("values", [{"radii": ()}, {"radii": 0.1}, {"radii": (-1,)}, {"images": 0}, {"draws": 1.5}])
def test_noise_is_checked(values) -> None:
    with pytest.raises(InvalidTolerance, match="noise"):
        Noise(**values)


def test_noise_needs_classes_and_numbers() -> None:
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Embedding(9, 4), nn.Flatten()), torch.randint(9, (8, 2))
    with pytest.raises(InvalidInput, match="expected inputs of floating-point numbers"):
        evaluate(model, tokens, parent=model, noise=Noise())
    model, data = nn.Linear(3, 2), (torch.rand(8, 3), torch.rand(8, 2))
    with pytest.raises(InvalidInput, match="noise: it compares predictions"):
        evaluate(model, data, parent=model, metric=lambda outputs, labels: labels[:, 0], noise=Noise())


# Storage.


@pytest.fixture(scope="module")
def found() -> Evaluation:
    settings = {"corruptions": CORRUPTIONS, "noise": Noise((0.0, 0.3), images=5), "severities": (2, 4)}
    return evaluate(convolutional(), images(), parent=convolutional(1), control=convolutional(2), **settings)


@pytest.mark.parametrize("metric", [None, lambda outputs, labels: outputs[:, 0]])
def test_what_is_saved_is_read_back(metric, tmp_path: Path) -> None:
    settings = {"corruptions": CORRUPTIONS, "metric": metric, "parent": convolutional(1)}
    found = evaluate(convolutional(), images(), control=convolutional(2), noise=Noise((0.1,), images=3), **settings)
    path = found.save(tmp_path / "new" / "found.json")
    again = Evaluation.load(path)
    assert again == found == load_evaluation(path)
    assert again.noise[0].outcomes is not None
    assert str(again) == str(found)
    assert json.loads(found.to_json())["rows"][1]["name"] == "brightness"


@given(st.lists(st.booleans(), max_size=40))
def test_outcomes_are_kept_bit_by_bit(values) -> None:
    outcomes = Outcomes.of(torch.tensor(values, dtype=torch.bool))
    assert Outcomes.from_dict(outcomes.to_dict()).tensor().tolist() == values


def damaged(text: str) -> dict[str, str]:
    data = json.loads(text)
    return {
        "cut short": text[: len(text) // 2],
        "empty": "",
        "changed": text.replace('"samples": 30', '"samples": 31', 1),
        "no object": "[]",
        "another kind": json.dumps(data | {"kind": "series"}),
        "a strange kind": json.dumps(data | {"kind": 3}),
        "a later format": json.dumps(data | {"format": 99}),
    }


@pytest.mark.parametrize("how", list(damaged("{}")))
def test_damaged_files_are_refused(how: str, found: Evaluation, tmp_path: Path) -> None:
    path = found.save(tmp_path / "found.json")
    path.write_text(damaged(path.read_text(encoding="utf-8"))[how], encoding="utf-8")
    for load in (Evaluation.load, load_evaluation):
        with pytest.raises(DamagedFile, match=r"found\.json is damaged"):
            load(path)


@pytest.mark.parametrize("change", [{"samples": 10**12}, {"samples": -8}, {"packed": ""}, {"packed": "eJwDAAAAAAE="}])
def test_outcomes_that_are_not_of_their_length_are_refused(change) -> None:
    described = Outcomes.of(torch.ones(30, dtype=torch.bool)).to_dict()
    with pytest.raises((ValueError, OverflowError)):
        Outcomes.from_dict(described | change)


def test_a_file_that_is_not_there_or_no_json(tmp_path: Path) -> None:
    for load in (Evaluation.load, load_evaluation):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "found.json")
        with pytest.raises(InvalidInput, match=r"ending in \.json"):
            load(tmp_path)


def test_records_have_every_figure_with_what_it_is_of(found: Evaluation) -> None:
    records = found.records()
    assert len({tuple(record) for record in records}) == 1
    (one,) = [
        record["value"]
        for record in records
        if (record["network"], record["distribution"], record["severity"]) == ("parent", "brightness", 4)
        and record["figure"] == "score"
    ]
    assert one == found.parent.rows[2].score
    assert {record["radius"] for record in records if record["network"] == "control"} == {None, 0.0, 0.3}


def test_parquet_needs_its_package(found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match="pip install"):
        found.to_parquet(tmp_path / "found.parquet")


def test_parquet_holds_the_records(found: Evaluation, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    assert parquet.read_table(found.to_parquet(tmp_path / "found.parquet")).to_pylist() == found.records()


def test_the_table_has_a_row_for_all(found: Evaluation) -> None:
    wide, narrow = found.table(160), found.table(80)
    assert len(wide.rows) == len(narrow.rows) == len(found.rows) + len(found.noise) == 7
    assert len(wide.columns) > len(narrow.columns)
    text = str(found)
    assert "brightness 4" in text
    assert "noise ≤ 0.3" in text
    assert f"{found.nominal.score:.1%}" in text
