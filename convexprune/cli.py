"""The command line: ``convexprune demo``, ``prune``, ``methods``, ``solvers``."""

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from convexprune.solvers.errors import ConvexPruneError, InvalidInput

__all__ = ["app"]

app = typer.Typer(
    help="Prune trained networks by convex optimisation, with a certificate for every layer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

_NET_TRIM, _CORESET = "Net-Trim", "Coresets (--method)"  # panels of --help: the ones refuse the options of the others
_net_trim = partial(typer.Option, rich_help_panel=_NET_TRIM)
_coreset = partial(typer.Option, rich_help_panel=_CORESET)
_UNCERTIFIED = 3  # exit status: the model was written, but not every layer has what was promised for it


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
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="lenet-300-100, lenet-5, or your own as package.module:factory.")],
    weights: Annotated[Path, typer.Option(help="The trained weights: .safetensors, or .pt without pickled code.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; nothing in it is overwritten.")],
    calibration: Annotated[Path | None, typer.Option(help="Inputs: .npz or .npy. lowner and mussay need none.")] = None,
    method: Annotated[str, typer.Option(help="net-trim, or a coreset: see `convexprune methods`.")] = "net-trim",
    key: Annotated[str | None, typer.Option(help="The array in the .npz, such as x_train.")] = None,
    samples: Annotated[int | None, typer.Option(help="Use only the first samples.", min=1)] = None,
    layers: Annotated[list[str] | None, typer.Option(help="Name pattern of layers to prune; repeatable.")] = None,
    eps: Annotated[list[str] | None, typer.Option(help="Error allowed: 0.1, or PATTERN=0.1; repeatable.")] = None,
    fit: Annotated[str | None, _net_trim(help="relu-ball, net-trim or ball for every layer.")] = None,
    solver: Annotated[str, _net_trim(help="See `convexprune solvers`.")] = "admm",
    tol: Annotated[float, _net_trim(help="Certified relative gap to reach.")] = 1e-3,
    feas_tol: Annotated[float, _net_trim(help="Violation to reach, relative to eps.")] = 1e-4,
    max_iter: Annotated[int | None, _net_trim(help="Iterations a layer at most.")] = None,
    time_limit: Annotated[float | None, _net_trim(help="Seconds a layer at most.")] = None,
    multipliers: Annotated[bool, _net_trim(help="Also write the multipliers.")] = False,
    keep: Annotated[list[str] | None, _coreset(help="Ratio (0.1) or count (30), or PATTERN=…; repeatable.")] = None,
    delta: Annotated[float | None, _coreset(help="With --eps, a guarantee instead of --keep.")] = None,
    scope: Annotated[str, _coreset(help="The size is each layer's, or the network's.")] = "layer",
    order: Annotated[str, _coreset(help="bottom-up or top-down.")] = "bottom-up",
    remove: Annotated[bool, _coreset(help="Really remove neurons, or leave zeros.")] = True,
    baseline: Annotated[bool, _coreset(help="Report uniform sampling at the same size, too.")] = False,
    seed: Annotated[int, _coreset(help="Of the sampling.", min=0)] = 0,
    labels_key: Annotated[str | None, _coreset(help="The calibration labels, for corenet's bound.")] = None,
    option: Annotated[list[str] | None, _coreset(help="The method's own NAME=VALUE; repeatable.")] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled samples, for the accuracy before and after.")] = None,
    data_key: Annotated[str | None, typer.Option(help="Its inputs, such as x_test.")] = None,
    label_key: Annotated[str | None, typer.Option(help="Its labels, such as y_test.")] = None,
) -> None:
    """Prune a trained model and write the smaller one, with a report, to a folder."""
    from convexprune.coresets.methods import make_method
    from convexprune.job import Job, Labelled, parsed_options, parsed_size, parsed_table

    with _people_errors():
        sys.path.insert(0, str(Path.cwd()))  # so that the user's own module is found, as with `python -m`
        labelled = None if data is None else Labelled(data, data_key, label_key)
        if method == "net-trim":
            _refuse_given(context, _CORESET, "for coresets only; give --method, too")
            limits: dict[str, Any] = {"tol": tol, "feas_tol": feas_tol, "max_iter": max_iter, "time_limit": time_limit}
            radius = parsed_table("--eps", eps or ["0.1"])
            recipe: dict[str, Any] = limits | {
                "eps": radius,
                "fit": fit,
                "solver": solver,
                "keep_solutions": multipliers,
            }
            verb: Callable[..., Any] = Job.net_trim
        else:
            _refuse_given(context, _NET_TRIM, f"for Net-Trim only, and {method} takes no notice; leave it out")
            _, pruner = make_method(method, parsed_options(option or []))
            recipe = {"method": pruner, "size": parsed_size(keep, eps, delta), "scope": scope, "order": order}
            recipe |= {"remove": remove, "baseline": baseline, "seed": seed}
            verb = Job.coreset
        job = Job(model, weights, out, calibration, key, samples, labels_key, labelled)
        with _bars() as (progress, callback):
            told = {"callback": callback} if method == "net-trim" else {}
            report = verb(job, layers=layers, progress=progress, **told, **recipe)
        _finish(job, report)


def _refuse_given(context: typer.Context, panel: str, reason: str) -> None:
    """No option of the panel may have been given.

    Raises:
        InvalidInput: One was.
    """
    options = (option for option in context.command.params if getattr(option, "rich_help_panel", None) == panel)
    given = [option.opts[0] for option in options if not _is_default(context, option.name or "")]
    if given:
        raise InvalidInput(f"{', '.join(given)}: {reason}")


def _is_default(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is None or source.name.startswith("DEFAULT")


def _finish(job: Any, report: Any) -> None:
    """Show and write; an exit status of its own where a promise fails."""
    console.print(report.table(console.width))
    for line in job.written(report):
        console.print(line, highlight=False)
    if not report.certified:
        errors.print("[red]not every certificate or guarantee holds[/red]: see the status column")
        raise typer.Exit(_UNCERTIFIED)


@app.command()
def methods() -> None:
    """List the coreset methods, what each chooses, and its options."""
    from convexprune.coresets import METHODS

    table = Table()
    for heading in ("name", "what it is", "options"):
        table.add_column(heading)
    for name, kind in METHODS.items():
        summary = " ".join((kind.__doc__ or "").strip().split("\n\n")[0].split())
        options = "\n".join(f"{field.name}={field.default}" for field in dataclasses.fields(kind))  # type: ignore[arg-type]
        table.add_row(name, summary, options)
    console.print(table)


@app.command()
def solvers() -> None:
    """List the solvers of layer programs and Löwner ellipsoids: what each takes, its options, and what is missing."""
    from convexprune.solvers import available
    from convexprune.solvers.lowner.method import ELLIPSOIDS

    for title, found in (("layer programs", available()), ("Löwner ellipsoids", ELLIPSOIDS.available())):
        table = Table(title=title, title_justify="left")
        for heading in ("name", "what it is", "options", "missing"):
            table.add_column(heading)
        for info in found.values():
            options = "\n".join(f"{name}={value}" for name, value in info.options.items())
            table.add_row(info.name, info.summary, options, info.missing or "")
        console.print(table)


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
