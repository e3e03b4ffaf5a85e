"""Which pixels networks rest on: the ranking against brute force, what is enough, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convexprune.evaluation import informative_features
from convexprune.evaluation.features import forwards_of
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, NonFinite, ShapeMismatch


def linear(seed: int, side: int = 4, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * side**2, 3))
    model[1].weight.data *= scale
    return model


def test_pixel_by_pixel_it_is_the_published_greedy_search() -> None:
    model, image = linear(0), torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    label = int(model(image).argmax())
    left, order = set(range(16)), []
    with torch.no_grad():
        while left:
            confidences = {}
            for pixel in sorted(left):
                mask = torch.zeros(16)
                mask[sorted(left - {pixel})] = 1
                confidences[pixel] = float(model(image * mask.view(1, 1, 4, 4)).double().softmax(1)[0, label])
            order.append(max(confidences, key=lambda pixel: confidences[pixel]))
            left.remove(order[-1])
    found = informative_features({"model": model}, image, rounds=16)
    assert found.order[0][0].tolist() == order
    assert found.forwards == 16 * 17 // 2


class Lone(nn.Module):
    """Sees one pixel alone."""

    def __init__(self, pixel: int) -> None:
        super().__init__()
        self.pixel, self.scale = pixel, nn.Parameter(torch.tensor(8.0))

    def forward(self, x: Tensor) -> Tensor:
        seen = x.flatten(2)[:, :, self.pixel].sum(1)
        return torch.stack([self.scale * seen, torch.zeros_like(seen)], dim=1)


def test_networks_that_see_other_pixels_are_told_apart_by_them() -> None:
    images = torch.ones(2, 1, 4, 4)
    found = informative_features({"one": Lone(5), "same": Lone(5), "other": Lone(9)}, images, keep=1 / 16, rounds=16)
    assert [int(order[0, -1]) for order in found.order] == [5, 5, 9]
    matrix = torch.tensor(found.confidence)
    assert (matrix[:2, :2] > 0.99).all()
    assert matrix[2, 2] > 0.99
    assert torch.equal(matrix[:2, 2], torch.full((2,), 0.5, dtype=torch.float64).to(matrix))
    assert found.sufficient == (1 / 16,) * 3
    assert "other" in str(found)
    assert found.to_dict()["forwards"] == 2 * forwards_of(16, 16)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 36), st.integers(0, 5))
def test_every_pixel_is_ranked_once_in_any_number_of_rounds(rounds: int, seed: int) -> None:
    model, image = linear(seed, side=6), torch.randn(2, 3, 6, 6)
    before = [p.clone() for p in model.parameters()]
    found = informative_features({"model": model}, image, torch.tensor([0, 1]), rounds=rounds)
    assert found.order[0].sort(1).values.tolist() == [list(range(36))] * 2
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_with_all_pixels_networks_see_the_images_themselves() -> None:
    model, other, images = linear(0), linear(1), torch.randn(3, 3, 4, 4)
    found = informative_features({"a": model, "b": other}, images, torch.tensor([0, 1, 2]), keep=1.0, rounds=4)
    expected = [m(images).double().softmax(1)[torch.arange(3), torch.arange(3)].mean().item() for m in (model, other)]
    assert found.confidence[0] == pytest.approx(expected, abs=1e-12)
    assert found.confidence[0] == found.confidence[1]


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * torch.nan


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x: informative_features({}, x), InvalidInput, "expected at least one network"),
        (lambda x: informative_features({"m": linear(0)}, x[0]), ShapeMismatch, "expected numbers"),
        (lambda x: informative_features({"m": linear(0)}, x[:0]), ShapeMismatch, "expected numbers"),
        (lambda x: informative_features({"m": linear(0)}, x * torch.inf), NonFinite, "images"),
        (lambda x: informative_features({"m": linear(0)}, x, keep=0.0), InvalidTolerance, "keep: expected"),
        (lambda x: informative_features({"m": linear(0)}, x, rounds=17), InvalidTolerance, "at most the 16 pixels"),
        (lambda x: informative_features({"m": linear(0)}, x, torch.tensor([1.0])), ShapeMismatch, "whole numbers"),
        (lambda x: informative_features({"m": linear(0)}, x, torch.tensor([0, 7])), InvalidInput, "labels: expected"),
        (lambda x: informative_features({"m": Broken()}, x), NonFinite, "m: its outputs hold NaN"),
    ],
)
def test_what_cannot_be_ranked_is_refused(call: Callable[[Tensor], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(torch.ones(2, 3, 4, 4))
