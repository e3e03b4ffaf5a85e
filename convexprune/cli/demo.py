"""The demo: scikit-learn's 8 x 8 digits, an MLP that learns them in seconds, pruned at a few eps."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from convexprune.costs import accuracy
from convexprune.files.weights import make_folder, save_json
from convexprune.network.weights import save_weights
from convexprune.prune import prune_
from convexprune.report.report import Report
from convexprune.runs.run import LayerCallback, silent
from convexprune.solvers.errors import MissingExtra
from convexprune.targets import Eps, Sparsity

DEMO_EPS = (0.02, 0.05, 0.1, 0.2, 0.3)
_TRAIN = 1300  # of 1,797 images
_EPOCHS, _BATCH = 30, 50


@dataclass(frozen=True, eq=False)
class Digits:
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
    x = torch.from_numpy(images).float()[order] / 16
    y = torch.from_numpy(labels).long()[order]
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
            loss = nn.functional.cross_entropy(model(data.x_train[batch]), data.y_train[batch])
            optimiser.zero_grad()
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


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found, and where it was written."""

    dense_accuracy: float
    rows: tuple[DemoRow, ...]
    picture: Path
    model: Path
    json: Path


def run_demo(
    out: Path,
    eps: Sequence[float] = DEMO_EPS,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    callback: LayerCallback | None = None,
) -> DemoResult:
    """Train on the digits, prune at each eps, compare with magnitude pruning at the same nonzeros in every layer.

    Args:
        out: Folder for ``accuracy.png``, ``demo.json`` and ``model.safetensors`` (the sparsest network within one
            point of the dense accuracy, else the densest).
        eps: To try.
        seed: Of the training.
        progress: Called as ``progress(stage, done, total)``.
        callback: As in ``prune_``.
    """
    notify = progress or silent
    data = load_digits()
    dense = train_digits_network(data, seed, partial(notify, "training"))
    before = accuracy(dense, data.x_test, data.y_test)
    rows, models = [], []
    for radius in eps:
        model = copy.deepcopy(dense)
        show = partial(_with_eps, notify, radius)
        report = prune_(model, data.x_train, Eps(radius), progress=show, callback=callback)
        rows.append(DemoRow(radius, report, accuracy(model, data.x_test, data.y_test), _magnitude(dense, data, report)))
        models.append(model)
    good = [i for i, row in enumerate(rows) if row.accuracy >= before - 0.01]
    chosen = min(good or range(len(rows)), key=lambda i: rows[i].report.nonzeros * (1 if good else -1))
    make_folder(out)
    return DemoResult(before, tuple(rows), *_write(out, before, rows, models[chosen]))


def tables(result: DemoResult) -> tuple[Table, Table]:
    """The network's accuracies, and each layer's error and certificate, at each eps."""
    headings = ("eps", "nonzeros", "kept", "output error", "dense", "Net-Trim", "magnitude")
    network = _table("The network: test accuracy, no fine-tuning", headings)
    headings = ("eps", "layer", "nonzeros", "kept", "output error", "certified gap", "violation")
    layers = _table("Layer by layer: error and certificate", headings)
    for row in result.rows:
        report, accuracies = row.report, (result.dense_accuracy, row.accuracy, row.magnitude_accuracy)
        size = [f"{report.nonzeros:,}", f"{report.nonzeros / report.nonzeros_before:.1%}", f"{report.output_error:.4f}"]
        network.add_row(f"{row.eps:g}", *size, *[f"{100 * accuracy:.1f} %" for accuracy in accuracies])
        for layer in report.layers:
            kept = f"{layer.nonzeros / max(layer.nonzeros_before, 1):.1%}"
            proof = (f"{layer.output_error:.4f}", f"{layer.gap:.1e}", f"{layer.violation:.1e}")
            layers.add_row(f"{row.eps:g}", layer.name, f"{layer.nonzeros:,}", kept, *proof)
        layers.add_section()
    return network, layers


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _with_eps(notify: Callable[[str, int, int], None], eps: float, stage: str, done: int, total: int) -> None:
    notify(f"eps {eps:g}: {stage}", done, total)


def _magnitude(dense: nn.Module, data: Digits, report: Report) -> float:
    model = copy.deepcopy(dense)
    prune_(model, target=Sparsity({row.name: row.nonzeros for row in report.layers}), method="magnitude")
    return accuracy(model, data.x_test, data.y_test)


def _write(out: Path, before: float, rows: Sequence[DemoRow], model: nn.Module) -> tuple[Path, Path, Path]:
    curves = {
        "Net-Trim": [(row.report.nonzeros, row.accuracy) for row in rows],
        "magnitude, same nonzeros in every layer": [(row.report.nonzeros, row.magnitude_accuracy) for row in rows],
    }
    dense = (rows[0].report.nonzeros_before, before)
    picture = _plot(curves, dense, out / "accuracy.png")
    data = {"dense_accuracy": before, "rows": [asdict(row) | {"report": row.report.to_dict()} for row in rows]}
    return picture, save_weights(model, out / "model.safetensors"), save_json(data, out / "demo.json")


def _plot(curves: Mapping[str, Sequence[tuple[float, float]]], dense: tuple[float, float], path: Path) -> Path:
    """Accuracy against nonzero weights as a PNG: (nonzeros, accuracy) by method, and of the network before."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(
            'pictures need matplotlib, which is not installed: pip install "convexprune[demo]"'
        ) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100 * dense[1], color="0.6", linestyle="--", label=f"dense, {dense[0]:,.0f} weights")
    for (method, points), marker in zip(curves.items(), "os^vD*", strict=False):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, [100 * value for value in y], marker=marker, label=method)
    title = "scikit-learn's digits, 64-128-64-10, no fine-tuning"
    axes.set(xscale="log", xlabel="nonzero weights", ylabel="test accuracy, %", title=title)
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return path
