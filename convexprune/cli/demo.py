"""The demo: scikit-learn's 8 x 8 digits, an MLP that learns them in seconds, pruned at a few eps."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from convexprune.costs import accuracy
from convexprune.files.weights import make_folder, save_json
from convexprune.network.weights import save_weights
from convexprune.prune import prune_
from convexprune.report.report import Report
from convexprune.runs.run import LayerCallback, Progress, silent
from convexprune.solvers.errors import MissingExtra
from convexprune.targets import Eps, Sparsity

DEMO_EPS = (0.02, 0.05, 0.1, 0.2, 0.3)
PICTURE, MODEL, FIGURES = "accuracy.png", "model.safetensors", "demo.json"
_TRAIN = 1300  # of 1,797 images
_EPOCHS, _BATCH = 30, 50


class Digits(NamedTuple):
    """The split data: images as float32 pixels in [0, 1], [n, 64], and int64 labels, [n]."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_digits() -> Digits:
    """Scikit-learn's embedded digits in a fixed split, 1,300 to train and 497 to test; nothing is downloaded.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingExtra('The digits come with scikit-learn: pip install "convexprune[demo]".') from error
    images, labels = load(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(images).float()[order] / 16, torch.from_numpy(labels).long()[order]
    return Digits(x[:_TRAIN], y[:_TRAIN], x[_TRAIN:], y[_TRAIN:])


@torch.enable_grad()
def train_digits_network(
    data: Digits, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> nn.Sequential:
    """The MLP 64-128-64-10 trained with Adam, in eval mode; the global random state is left alone.

    Args:
        data: What ``load_digits`` returns.
        seed: Of the first weights and the order of the samples.
        progress: Called after each epoch with the epochs done and their total.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _EPOCHS)
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(_EPOCHS):
        for batch in torch.split(torch.randperm(len(data.x_train), generator=shuffle), _BATCH):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(data.x_train[batch]), data.y_train[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        schedule.step()
        if progress is not None:
            progress(epoch + 1, _EPOCHS)
    return model.eval()


@dataclass(frozen=True)
class DemoRow:
    """The network pruned at one eps; accuracies in [0, 1] on the test digits.

    Attributes:
        eps: Relative, the same for every layer.
        report: Of ``prune_``.
        accuracy: After Net-Trim.
        magnitude_accuracy: After keeping as many weights in every layer by magnitude.
    """

    eps: float
    report: Report
    accuracy: float
    magnitude_accuracy: float


def run_demo(
    out: Path,
    eps: Sequence[float] = DEMO_EPS,
    seed: int = 0,
    progress: Progress = silent,
    callback: LayerCallback | None = None,
) -> tuple[float, list[DemoRow]]:
    """Train on the digits, prune at each eps, compare with magnitude pruning at the same nonzeros in every layer.

    Args:
        out: Folder for ``accuracy.png``, ``demo.json`` and ``model.safetensors`` (the sparsest network within one
            point of the dense accuracy, else the densest).
        eps: To try.
        seed: Of the training.
        progress: Called as ``progress(stage, done, total)``.
        callback: As in ``prune_``.

    Returns:
        The accuracy before, and a row an eps.
    """
    data = load_digits()
    dense = train_digits_network(data, seed, lambda done, total: progress("training", done, total))
    before = accuracy(dense, data.x_test, data.y_test)
    rows, models = [], []
    for radius in eps:
        model, magnitude = copy.deepcopy(dense), copy.deepcopy(dense)
        report = prune_(model, data.x_train, Eps(radius), progress=progress, callback=callback)
        prune_(magnitude, target=Sparsity({row.name: row.nonzeros for row in report.layers}), method="magnitude")
        rows.append(DemoRow(radius, report, *(accuracy(m, data.x_test, data.y_test) for m in (model, magnitude))))
        models.append(model)
    good = [i for i, row in enumerate(rows) if row.accuracy >= before - 0.01]
    chosen = min(good or range(len(rows)), key=lambda i: rows[i].report.nonzeros * (1 if good else -1))
    make_folder(out)
    _plot(before, rows, out / PICTURE)
    save_weights(models[chosen], out / MODEL)
    plain = [asdict(row) | {"report": row.report.to_dict()} for row in rows]
    save_json({"dense_accuracy": before, "rows": plain}, out / FIGURES)
    return before, rows


def tables(dense: float, rows: Sequence[DemoRow], width: int) -> list[Table]:
    """The report of each eps, and last the network's accuracies."""
    network = Table(title="The network: test accuracy, no fine-tuning", title_justify="left")
    for heading in ("eps", "nonzeros", "kept", "output error", "dense", "Net-Trim", "magnitude"):
        network.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        report, accuracies = row.report, (dense, row.accuracy, row.magnitude_accuracy)
        size = (f"{report.nonzeros:,}", f"{report.nonzeros / report.nonzeros_before:.1%}")
        network.add_row(f"{row.eps:g}", *size, f"{report.output_error:.4f}", *[f"{100 * a:.1f} %" for a in accuracies])
    return [*(row.report.table(width) for row in rows), network]


def _plot(before: float, rows: Sequence[DemoRow], path: Path) -> None:
    """Accuracy against nonzero weights as a PNG, by both methods and of the network before."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(
            'pictures need matplotlib, which is not installed: pip install "convexprune[demo]"'
        ) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100 * before, color="0.6", linestyle="--", label=f"dense, {rows[0].report.nonzeros_before:,} weights")
    nonzeros = [row.report.nonzeros for row in rows]
    axes.plot(nonzeros, [100 * row.accuracy for row in rows], "o-", label="Net-Trim")
    axes.plot(nonzeros, [100 * row.magnitude_accuracy for row in rows], "s-", label="magnitude, as many in each layer")
    title = "scikit-learn's digits, 64-128-64-10, no fine-tuning"
    axes.set(xscale="log", xlabel="nonzero weights", ylabel="test accuracy, %", title=title)
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
