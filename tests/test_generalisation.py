"""The bounds' numbers by hand on a toy; what they depend on, and which way."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convexprune.pruners.generalisation import (
    CodedLayer,
    generalisation_terms,
    margin_loss,
)
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, ShapeMismatch

OUTPUTS = torch.tensor([[3.0, 0.0], [0.0, 4.0], [1.0, 0.5], [0.0, 0.0]])
LABELS = torch.tensor([0, 1, 0, 1])
LAYERS = [CodedLayer(6, 2, 3, S=5.0, Delta=2.0), CodedLayer(4, 4, 0, S=1.0, Delta=10.0)]


def bound(**changes):
    arguments = {
        "original": OUTPUTS,
        "pruned": OUTPUTS,
        "labels": LABELS,
        "layers": LAYERS,
        "margin": 1.0,
        "delta": 0.1,
    }
    return generalisation_terms(**(arguments | changes))


def test_margins_by_hand_and_ties_are_errors():
    assert [margin_loss(OUTPUTS, LABELS, margin) for margin in (0.0, 0.5, 2.9, 3.0, 4.0)] == [
        0.25,
        0.5,
        0.5,
        0.75,
        1.0,
    ]


def test_a_codes_bits_by_hand():
    """⌈log₂ 7⌉ + ⌈log₂ (6 over 2)⌉ + 5 values, and ⌈log₂ 5⌉ + 0 + 4 values."""
    assert [layer.bits() for layer in LAYERS] == [3 + 4 + 5 * 32, 3 + 0 + 4 * 32]
    assert [bound().bits, bound(bits_per_value=8).bits] == [167 + 131, 47 + 35]


def test_the_numbers_by_hand():
    found = bound()
    assert found.onwards == (20.0, 10.0)
    assert found.sensitivities == (5.0, 1.0)
    assert (found.samples, found.layers, found.bits) == (4, 3, 298)
    assert (found.margin_loss, found.training_error, found.largest_output) == (0.5, 0.25, 4.0)
    assert found.complexity == pytest.approx(math.sqrt(4**2 * 3**2 * (400 * 5 + 100 * 1) / (1 * 4)))
    assert found.bound == pytest.approx(0.25 + math.sqrt((298 * math.log(2) + math.log(10)) / 8))
    assert found.vacuous


def test_the_two_networks_are_not_mixed_up():
    worse = bound(pruned=-OUTPUTS)
    assert (worse.margin_loss, worse.largest_output) == (0.5, 4.0)
    assert worse.training_error == 1.0
    longer = bound(original=10 * OUTPUTS)
    assert (longer.margin_loss, longer.training_error, longer.largest_output) == (0.25, 0.25, 40.0)


def test_enough_samples_make_the_bound_say_something():
    outputs, labels = OUTPUTS[:2].repeat(5000, 1), LABELS[:2].repeat(5000)
    found = bound(original=outputs, pruned=outputs, labels=labels)
    assert found.training_error == 0
    assert 0 < found.bound < 0.2
    assert not found.vacuous
    assert "with probability 0.9" in str(found)
    assert "vacuous" in str(bound())
    assert "recalled" in str(found)


def test_it_is_plain_data():
    found = bound()
    data = json.loads(json.dumps(found.to_dict()))
    assert data["bound"] == found.bound
    assert data["vacuous"] is True
    assert data["onwards"] == [20.0, 10.0]


@given(st.integers(0, 60), st.integers(0, 60))
def test_codes_tell_every_choice_apart(weights, kept):
    kept = min(kept, weights)
    bits = CodedLayer(weights, kept, 0, 1.0, 1.0).bits(1) - kept
    assert 2**bits >= (weights + 1) * math.comb(weights, kept)  # fixed lengths, one part after the other: prefix-free
    assert 2 ** (bits - 2) < (weights + 1) * math.comb(weights, kept)


@pytest.mark.parametrize(("weights", "kept"), [(4097, 5), (5000, 2500), (20000, 19999)])
def test_bits_of_large_layers_are_no_fewer_and_at_most_one_more(weights, kept):
    exact = (math.comb(weights, kept) - 1).bit_length() + weights.bit_length() + 32 * kept
    assert 0 <= CodedLayer(weights, kept, 0, 1.0, 1.0).bits() - exact <= 1


def test_fewer_weights_and_more_samples_prove_more():
    few, many = bound(), bound(layers=[replace(LAYERS[0], kept=6), LAYERS[1]])
    assert few.bits < many.bits
    assert few.bound < many.bound
    more = bound(original=OUTPUTS.repeat(3, 1), pruned=OUTPUTS.repeat(3, 1), labels=LABELS.repeat(3))
    assert more.bound < few.bound
    assert more.complexity == pytest.approx(few.complexity / math.sqrt(3))
    assert bound(margin=2.0).complexity == pytest.approx(few.complexity / 2)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"margin": 0.0}, InvalidTolerance),
        ({"delta": 1.0}, InvalidTolerance),
        ({"bits_per_value": 0}, InvalidTolerance),
        ({"labels": LABELS[:3]}, ShapeMismatch),
        ({"pruned": OUTPUTS[:3]}, ShapeMismatch),
        ({"pruned": OUTPUTS[:, :1], "original": OUTPUTS[:, :1]}, ShapeMismatch),
        ({"labels": LABELS + 1}, InvalidInput),
        ({"labels": LABELS.double()}, InvalidInput),
        ({"original": OUTPUTS * math.nan}, InvalidInput),
    ],
)
def test_what_makes_no_sense_is_refused(changes, error):
    with pytest.raises(error):
        bound(**changes)
