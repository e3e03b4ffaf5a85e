"""The demo: digits that come with scikit-learn, a network trained in seconds, pruned at a few eps."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from convexprune.baselines import magnitude_prune_
from convexprune.cli.digits import Digits, load_digits, train_digits_network
from convexprune.costs import accuracy
from convexprune.files.weights import make_folder, save_json
from convexprune.nettrim import prune_
from convexprune.network.weights import save_weights
from convexprune.progress import silent
from convexprune.report.plots import plot_accuracy
from convexprune.report.report import Report
from convexprune.solvers.certificate.solution import TracePoint

DEMO_EPS = (0.02, 0.05, 0.1, 0.2, 0.3)


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
    callback: Callable[[str, TracePoint], bool | None] | None = None,
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
    tell = progress or silent
    data = load_digits()
    dense = train_digits_network(data, seed, partial(tell, "training"))
    before = accuracy(dense, data.x_test, data.y_test)
    rows, models = [], []
    for radius in eps:
        model = copy.deepcopy(dense)
        report = prune_(model, data.x_train, radius, progress=partial(_with_eps, tell, radius), callback=callback)
        rows.append(DemoRow(radius, report, accuracy(model, data.x_test, data.y_test), _magnitude(dense, data, report)))
        models.append(model)
    good = [i for i, row in enumerate(rows) if row.accuracy >= before - 0.01]
    chosen = min(good or range(len(rows)), key=lambda i: rows[i].report.nonzeros * (1 if good else -1))
    make_folder(out)
    return DemoResult(before, tuple(rows), *_write(out, before, rows, models[chosen]))


def _with_eps(tell: Callable[[str, int, int], None], eps: float, stage: str, done: int, total: int) -> None:
    tell(f"eps {eps:g}: {stage}", done, total)


def _magnitude(dense: nn.Module, data: Digits, report: Report) -> float:
    model = copy.deepcopy(dense)
    magnitude_prune_(model, {row.name: row.nonzeros for row in report.layers})
    return accuracy(model, data.x_test, data.y_test)


def _write(out: Path, before: float, rows: Sequence[DemoRow], model: nn.Module) -> tuple[Path, Path, Path]:
    curves = {
        "Net-Trim": [(row.report.nonzeros, row.accuracy) for row in rows],
        "magnitude, same nonzeros in every layer": [(row.report.nonzeros, row.magnitude_accuracy) for row in rows],
    }
    dense = (rows[0].report.nonzeros_before, before)
    picture = plot_accuracy(curves, dense, out / "accuracy.png", "scikit-learn's digits, 64-128-64-10, no fine-tuning")
    plain: list[dict[str, Any]] = [asdict(row) | {"report": row.report.to_dict()} for row in rows]
    data = {"dense_accuracy": before, "rows": plain}
    return picture, save_weights(model, out / "model.safetensors"), save_json(data, out / "demo.json")
