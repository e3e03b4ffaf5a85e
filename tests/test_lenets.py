"""The trained LeNets on MNIST: every layer certified within the iterations promised."""

from pathlib import Path

import numpy as np
import pytest
import torch
from calls import prune_

from convexprune.cli.reference import find_model
from convexprune.costs import accuracy
from convexprune.network.weights import load_weights_into_

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not (DATA / "mnist.npz").exists(), reason=f"needs the trained LeNets in {DATA}")


@pytest.mark.parametrize(
    ("name", "file", "samples", "loss"),
    [("lenet-300-100", "lenet300_mnist", 1000, 0.03), ("lenet-5", "lenet5_mnist", 200, 0.08)],
)
def test_every_layer_is_certified_within_250_iterations(name: str, file: str, samples: int, loss: float) -> None:
    reference = find_model(name)
    model = reference.build()
    load_weights_into_(model, DATA / f"{file}.safetensors")
    with np.load(DATA / "mnist.npz", allow_pickle=False) as mnist:
        x, x_test = reference.prepare(mnist["x_train"][:samples]), reference.prepare(mnist["x_test"][:1000])
        y_test = torch.from_numpy(mnist["y_test"][:1000])
    before = accuracy(model, x_test, y_test)
    report = prune_(model, x, eps=0.1)
    assert not report.skipped
    for row in report.layers:
        assert row.status == "solved"
        assert row.gap <= 1e-3
        assert row.violation <= 1e-4
        assert row.iterations <= 250
    assert report.nonzeros < 0.3 * report.nonzeros_before
    assert accuracy(model, x_test, y_test) > before - loss
