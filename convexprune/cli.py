"""The command line: ``convexprune demo``, ``convexprune prune``, ``convexprune solvers``."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from convexprune.solvers.errors import ConvexPruneError, InvalidInput, ShapeMismatch

__all__ = ["app"]

app = typer.Typer(
    help="Prune trained networks by convex optimisation, with a certificate for every layer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

_UNCERTIFIED = 3  # exit status: the model was written, but not every layer's certificate closed


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture, the model and the figures.")] = Path(
        "convexprune-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
) -> None:
    """Train a small ReLU network on scikit-learn's digits and prune it at a few eps; needs no files and no network."""
    from convexprune.demo import run_demo

    with _people_errors(), _bars() as (progress, callback):
        result = run_demo(out, seed=seed, progress=progress, callback=callback)
    console.print(_accuracy_table(result), _layer_table(result))
    console.print(f"Picture: {result.picture}\nSparse model: {result.model}\nFigures: {result.json}", highlight=False)


def _accuracy_table(result: Any) -> Table:
    table = _table(
        "The network: test accuracy, no fine-tuning",
        ("eps", "nonzeros", "kept", "output error", "dense", "Net-Trim", "magnitude"),
    )
    for row in result.rows:
        report, accuracies = row.report, (result.dense_accuracy, row.accuracy, row.magnitude_accuracy)
        size = [f"{report.nonzeros:,}", f"{report.nonzeros / report.nonzeros_before:.1%}", f"{report.output_error:.4f}"]
        table.add_row(f"{row.eps:g}", *size, *[f"{100 * accuracy:.1f} %" for accuracy in accuracies])
    return table


def _layer_table(result: Any) -> Table:
    headings = ("eps", "layer", "nonzeros", "kept", "output error", "certified gap", "violation")
    table = _table("Layer by layer: error and certificate", headings)
    for row in result.rows:
        for layer in row.report.layers:
            kept = f"{layer.nonzeros / max(layer.nonzeros_before, 1):.1%}"
            proof = (f"{layer.output_error:.4f}", f"{layer.gap:.1e}", f"{layer.violation:.1e}")
            table.add_row(f"{row.eps:g}", layer.name, f"{layer.nonzeros:,}", kept, *proof)
        table.add_section()
    return table


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="lenet-300-100, lenet-5, or your own as package.module:factory.")],
    weights: Annotated[Path, typer.Option(help="The trained weights: .safetensors, or .pt without pickled code.")],
    calibration: Annotated[Path, typer.Option(help="Inputs: .npz or .npy.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; nothing in it is overwritten.")],
    key: Annotated[str | None, typer.Option(help="The array in the .npz, such as x_train.")] = None,
    samples: Annotated[int | None, typer.Option(help="Use only the first samples.", min=1)] = None,
    eps: Annotated[list[str] | None, typer.Option(help="0.1, or PATTERN=0.1 for some layers; repeatable.")] = None,
    fit: Annotated[str | None, typer.Option(help="relu-ball, net-trim or ball for every layer.")] = None,
    solver: Annotated[str, typer.Option(help="See `convexprune solvers`.")] = "admm",
    layers: Annotated[list[str] | None, typer.Option(help="Name pattern of layers to prune; repeatable.")] = None,
    tol: Annotated[float, typer.Option(help="Certified relative gap to reach.")] = 1e-3,
    feas_tol: Annotated[float, typer.Option(help="Violation to reach, relative to eps.")] = 1e-4,
    max_iter: Annotated[int | None, typer.Option(help="Iterations a layer at most.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds a layer at most.")] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled samples, for the accuracy before and after.")] = None,
    data_key: Annotated[str | None, typer.Option(help="Its inputs, such as x_test.")] = None,
    label_key: Annotated[str | None, typer.Option(help="Its labels, such as y_test.")] = None,
    multipliers: Annotated[bool, typer.Option(help="Also write the dual multipliers that prove the bounds.")] = False,
) -> None:
    """Prune a trained model and write the sparse one, with a report, to a folder."""
    with _people_errors():
        sys.path.insert(0, str(Path.cwd()))  # so that the user's own module is found, as with `python -m`
        run = _Run(model, weights, calibration, out, key, samples, data, data_key, label_key)
        with _bars() as (progress, callback):
            report = run.prune(
                eps=_parsed_eps(eps or ["0.1"]),
                fit=fit,
                solver=solver,
                layers=layers,
                tol=tol,
                feas_tol=feas_tol,
                max_iter=max_iter,
                time_limit=time_limit,
                keep_solutions=multipliers,
                progress=progress,
                callback=callback,
            )
        console.print(report.table(console.width))
        for line in run.written(report):
            console.print(line, highlight=False)
    if not report.certified:
        errors.print("[red]not every layer's certificate closed[/red]: see the status column, and raise the limits")
        raise typer.Exit(_UNCERTIFIED)


@app.command()
def solvers() -> None:
    """List the solvers, what each takes, its options, and what is missing."""
    from convexprune.solvers import available

    table = Table()
    for heading in ("name", "what it is", "options", "missing"):
        table.add_column(heading)
    for info in available().values():
        options = "\n".join(f"{name}={value}" for name, value in info.options.items())
        table.add_row(info.name, info.summary, options, info.missing or "")
    console.print(table)


class _Run:
    """``convexprune prune``: everything is read and checked before anything is solved."""

    def __init__(
        self,
        model: str,
        weights: Path,
        calibration: Path,
        out: Path,
        key: str | None,
        samples: int | None,
        data: Path | None,
        data_key: str | None,
        label_key: str | None,
    ) -> None:
        from convexprune.files import LABEL_NAMES, load_array, load_weights_into_
        from convexprune.reference import find_model

        self.out = out
        self.targets = [out / name for name in ("model.safetensors", "report.json", "multipliers.safetensors")]
        existing = [str(path) for path in self.targets if path.exists()]
        if existing:
            raise InvalidInput(f"{', '.join(existing)}: there already, and not overwritten; choose another --out")
        reference = find_model(model)
        self.model = reference.build()
        load_weights_into_(self.model, weights)
        self.inputs = reference.prepare(load_array(calibration, key)[:samples])
        self.labelled = None
        if data is not None:
            labels = load_array(data, label_key, LABEL_NAMES)
            images = load_array(data, data_key, ("x_test", "x_train", "x", "images", "inputs"))
            if len(images) != len(labels):
                raise ShapeMismatch(
                    f"{data}: {len(images)} inputs and {len(labels)} labels; choose --data-key, --label-key"
                )
            self.labelled = reference.prepare(images), labels
        self.accuracy: dict[str, float] = {}

    def prune(self, **recipe: Any) -> Any:
        """Prune the model, with its accuracy before and after."""
        from convexprune.nettrim import prune_

        self._measure("before")
        report = prune_(self.model, self.inputs, **recipe)
        self._measure("after")
        return report

    def _measure(self, when: str) -> None:
        import torch

        from convexprune.evaluate import accuracy

        if self.labelled is not None:
            inputs, labels = self.labelled
            self.accuracy[when] = accuracy(self.model, inputs, torch.from_numpy(labels))

    def written(self, report: Any) -> Iterator[str]:
        """Write the results; a line about each."""
        from safetensors.torch import save

        from convexprune.files import save_json, save_weights, write_atomically

        if self.accuracy:
            yield "accuracy {before:.2%} before, {after:.2%} after".format(**self.accuracy)
        yield f"sparse model: {save_weights(self.model, self.targets[0])}"
        yield f"report: {save_json(report.to_dict() | {'accuracy': self.accuracy}, self.targets[1])}"
        kept = {f"{name}.{i}": s.multipliers for name, group in report.solutions.items() for i, s in enumerate(group)}
        if kept:
            tensors = {name: tensor.contiguous() for name, tensor in kept.items() if tensor is not None}
            yield f"multipliers: {write_atomically(save(tensors), self.targets[2])}"


def _parsed_eps(texts: list[str]) -> float | dict[str, float]:
    """["0.1"] or ["features.*=0.05", "0.1"]: patterns in their order, then the plain number for the rest."""
    table: dict[str, float] = {}
    for text in texts:
        pattern, equals, number = text.rpartition("=")
        try:
            table[pattern if equals else "*"] = float(number)
        except ValueError:
            raise InvalidInput(f"--eps: expected a number or PATTERN=number, found {text!r}") from None
    rest = table.pop("*", None)
    return table | ({} if rest is None else {"*": rest}) if table else float(rest or 0.0)


@contextmanager
def _people_errors() -> Iterator[None]:
    """What the library raises on purpose, and what the disk says, without a traceback."""
    try:
        yield
    except (ConvexPruneError, OSError) as error:
        errors.print(f"[red]error:[/red] {type(error).__name__}: ", end="", highlight=False)
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


@contextmanager
def _bars() -> Iterator[tuple[Callable[[str, int, int], None], Callable[[str, Any], None]]]:
    """A progress bar a stage, with the running solve's iteration and certified gap beside it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=errors, transient=True) as bars:
        task = bars.add_task("", total=None, note="")

        def progress(stage: str, done: int, total: int) -> None:
            bars.update(task, description=stage, completed=done, total=total, note="")

        def callback(layer: str, point: Any) -> None:  # noqa: ARG001 - the stage says which layer
            bars.update(task, note=f"iteration {point.iteration}, gap {point.gap:.1e}, violation {point.violation:.1e}")

        yield progress, callback


@app.callback()
def main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the library's log.")] = False) -> None:
    """Prune trained networks by convex optimisation, with a certificate for every layer."""
    if verbose:
        from rich.logging import RichHandler

        logging.basicConfig(level=logging.INFO, handlers=[RichHandler(console=errors)])
