"""The command line: ``convexprune demo``, ``prune``, ``verify``, ``report``, ``methods``, ``solvers``."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

# Nothing here may import torch before a command runs: it takes seconds, and --help is to be there at once.
from convexprune.cli.live import (
    INTERRUPTED,
    UNCERTIFIED,
    VisibleFormatter,
    bars,
    console,
    errors,
    print_json,
    say,
    show_anything,
)

app = typer.Typer(
    help="Prune trained networks by convex optimisation, with a certificate for every layer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"default_map": {"help": False}},  # typer loads pydantic to convert an option that has no value
)

_NET_TRIM, _CORESET = "Net-Trim", "Coresets (--method)"  # panels of --help: the ones refuse the options of the others
_goal = partial(typer.Option, rich_help_panel=f"{_NET_TRIM}: the goal, in the place of --eps")
_program = partial(typer.Option, rich_help_panel=f"{_NET_TRIM}: the programs, and how they are solved")
_runs = partial(typer.Option, rich_help_panel=f"{_NET_TRIM}: the run")
_coreset = partial(typer.Option, rich_help_panel=_CORESET)
_CALIBRATION = (
    "Inputs: .npz, .npy, .safetensors or .pt; several arrays if named as the model's arguments. lowner and mussay need "
    "none."
)
_MAX_RATIO = "How many times its size a file that is read may unpack to; 256 MiB always pass."
_STATUSES = (
    "Exit status: 0 all holds; 1 an error; 2 a misspelt command; 3 written, but a certificate or a guarantee does not "
    "hold; 4 the time limit ran out; 5 written, but nothing could be pruned; 130 interrupted. After 4 and 130 the same "
    "command goes on."
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture, the model and the figures.")] = Path(
        "convexprune-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
) -> None:
    """Train a small ReLU network on scikit-learn's digits and prune it at a few eps; needs no files and no network."""
    from convexprune.cli.demo import run_demo

    with _people_errors(), bars(errors) as shown:
        result = run_demo(out, seed=seed, progress=shown.progress, callback=shown.callback)
    console.print(_accuracy_table(result), _layer_table(result))
    say(console, f"Picture: {result.picture}\nSparse model: {result.model}\nFigures: {result.json}")


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


@app.command(epilog=_STATUSES)
def prune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="lenet-300-100, lenet-5, or your own as package.module:factory.")],
    weights: Annotated[Path, typer.Option(help="The trained weights: .safetensors, or .pt without pickled code.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to. A run of Net-Trim in it goes on.")] = None,
    calibration: Annotated[Path | None, typer.Option(help=_CALIBRATION)] = None,
    method: Annotated[str, typer.Option(help="net-trim, or a coreset: see `convexprune methods`.")] = "net-trim",
    key: Annotated[str | None, typer.Option(help="The array in the file, such as x_train.")] = None,
    mask: Annotated[
        str | None, typer.Option(help="The array of 1 where a position counts; attention_mask if not given.")
    ] = None,
    no_mask: Annotated[bool, typer.Option("--no-mask", help="All positions count, whatever masks there are.")] = False,
    samples: Annotated[int | None, typer.Option(help="Use so many samples, chosen at random.", min=1)] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Name pattern of layers to prune, or '!stem' for all but it; repeatable.")
    ] = None,
    eps: Annotated[list[str] | None, typer.Option(help="Error allowed: 0.1, or PATTERN=0.1; repeatable.")] = None,
    scope: Annotated[str, typer.Option(help="The size is each layer's, or the network's: layer or network.")] = "layer",
    remove: Annotated[bool, typer.Option(help="Neurons that go are really removed, or left as zeros.")] = True,
    data: Annotated[Path | None, typer.Option(help="Labelled samples, for the accuracy before and after.")] = None,
    data_key: Annotated[str | None, typer.Option(help="Its inputs, such as x_test.")] = None,
    label_key: Annotated[str | None, typer.Option(help="Its labels, such as y_test.")] = None,
    max_ratio: Annotated[float, typer.Option(help=_MAX_RATIO)] = 100.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    sparsity: Annotated[
        list[str] | None, _goal(help="Part to be zero: 0.8; or 2:4; or PATTERN=either; repeatable.")
    ] = None,
    network_eps: Annotated[float | None, _goal(help="Error allowed of the network's outputs.")] = None,
    guarantee: Annotated[
        str, _goal(help="With --network-eps: the error that is measured, or the bound on it.")
    ] = "measured",
    objective: Annotated[str, _goal(help="With --network-eps: l1, or nonzeros.")] = "l1",
    search: Annotated[str, _goal(help="With --sparsity: budget, or path.")] = "budget",
    unit: Annotated[str, _goal(help="With --sparsity: weights, or neurons.")] = "weights",
    mode: Annotated[
        str | None, _program(help="parallel, or cascade; if not given parallel with --eps and --jobs.")
    ] = None,
    fit: Annotated[str | None, _program(help="relu-ball, net-trim or ball for every layer.")] = None,
    norms: Annotated[str, _program(help="A BatchNorm is part of its layer's program, or not: fold or leave.")] = "fold",
    gamma: Annotated[float, _program(help="In cascade: room for the trained weights, at least 1.")] = 1.1,
    refit: Annotated[bool, _program(help="With an eps: fit again on the support found.")] = False,
    keep_zeros: Annotated[bool, _program("--keep-zeros", help="Weights that are zero stay zero.")] = False,
    solver: Annotated[str | None, _program(help="See `convexprune solvers`; else the one that suits.")] = None,
    tol: Annotated[float, _program(help="Certified relative gap to reach.")] = 1e-3,
    feas_tol: Annotated[float, _program(help="Violation to reach, relative to eps.")] = 1e-4,
    max_iter: Annotated[int | None, _program(help="Iterations a layer at most.")] = None,
    layer_time_limit: Annotated[float | None, _program(help="Seconds a layer at most.")] = None,
    time_limit: Annotated[float | None, _runs(help="Seconds for everything; the same command then goes on.")] = None,
    holdout: Annotated[int | None, _runs(help="Samples at random that errors are only measured on.", min=1)] = None,
    jobs: Annotated[int | None, _runs(help="Layers at a time, in processes of their own.", min=1)] = None,
    scheduler: Annotated[str | None, _runs(help="A Dask cluster's: tcp://host:8786.")] = None,
    dry_run: Annotated[bool, _runs("--dry-run", help="Show the plan, with time and memory; write nothing.")] = False,
    keep: Annotated[list[str] | None, _coreset(help="Ratio (0.1) or count (30), or PATTERN=…; repeatable.")] = None,
    delta: Annotated[float | None, _coreset(help="With --eps, a guarantee instead of --keep.")] = None,
    order: Annotated[str, _coreset(help="bottom-up or top-down.")] = "bottom-up",
    baseline: Annotated[bool, _coreset(help="Report uniform sampling at the same size, too.")] = False,
    seed: Annotated[int, typer.Option(help="Of random samples.", min=0)] = 0,
    labels_key: Annotated[str | None, _coreset(help="The calibration labels, for corenet's bound.")] = None,
    option: Annotated[list[str] | None, _coreset(help="The method's own NAME=VALUE; repeatable.")] = None,
) -> None:
    """Prune a trained model and write the smaller one, with a report, to a folder.

    With Net-Trim the folder keeps each layer as soon as it is solved: the same command goes on where it was. Ctrl-C
    ends a run in order, a second one at once.
    """
    given = dict(locals())
    with _people_errors(as_json):
        from convexprune.solvers.errors import InvalidInput

        if out is None and not dry_run:
            raise InvalidInput("--out: expected a folder to write to, found none")
        if method == "net-trim":
            _refuse_given(context, _CORESET, "for coresets only; give --method, too")
        else:
            _refuse_given(context, _NET_TRIM, f"for Net-Trim only, and {method} takes no notice; leave it out")
        from convexprune.cli.prune import coreset, net_trim

        status = net_trim(given) if method == "net-trim" else coreset(given)
    raise typer.Exit(status)


def _refuse_given(context: typer.Context, panel: str, reason: str) -> None:
    """No option of the panels that begin so may have been given.

    Raises:
        InvalidInput: One was.
    """
    from convexprune.solvers.errors import InvalidInput

    params = context.command.params
    options = (option for option in params if (getattr(option, "rich_help_panel", None) or "").startswith(panel))
    given = [option.opts[0] for option in options if not _is_default(context, option.name or "")]
    if given:
        raise InvalidInput(f"{', '.join(given)}: {reason}")


def _is_default(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is None or source.name.startswith("DEFAULT")


@app.command(epilog=_STATUSES)
def verify(
    folder: Annotated[Path, typer.Argument(help="The --out of a run of Net-Trim.")],
    model: Annotated[str, typer.Argument(help="As for `prune`.")],
    weights: Annotated[Path, typer.Option(help="The trained weights, as given to `prune`.")],
    calibration: Annotated[Path, typer.Option(help="The same inputs.")],
    key: Annotated[str | None, typer.Option(help="As for `prune`.")] = None,
    samples: Annotated[int | None, typer.Option(help="As for `prune`.", min=1)] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="A run that is not complete may be in order, too.")
    ] = False,
    holdout: Annotated[int | None, typer.Option(help="As for `prune`.", min=1)] = None,
    max_ratio: Annotated[float, typer.Option(help=_MAX_RATIO)] = 100.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Judge a run again, without any solver: every certificate is recomputed in float64.

    Exit status 3 if anything differs, or if the run is not complete and --partial is not given.
    """
    with _people_errors(as_json):
        from convexprune.cli.source import Source
        from convexprune.nettrim.verify import recorded_mask
        from convexprune.nettrim.verify import verify as verified

        source = Source(model, weights, calibration, key, recorded_mask(folder), samples, max_ratio, holdout)
        read = source.read()
        found = verified(read.model, read.inputs, folder, holdout=read.holdout)
        status = 0 if found.ok and (found.complete or partial) else UNCERTIFIED
        if as_json:
            print_json({"status": "verified", "exit_status": status, "verification": found.to_dict()})
        else:
            console.print(found.table(console.width))
    raise typer.Exit(status)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The --out of `prune`.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; report.html in the folder if not given.")] = None,
) -> None:
    """Write one self-contained HTML page about a run, and print its path.

    What the report says is checked against all that lies beside it; errors and certificates are for `verify`.
    """
    with _people_errors():
        from convexprune.report.page import write_page

        typer.echo(write_page(folder, out))
        typer.echo("what was checked, and what only `convexprune verify` can check, stands on the page", err=True)


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
    from convexprune.solvers.geometry.method import ELLIPSOIDS

    for title, found in (("layer programs", available()), ("Löwner ellipsoids", ELLIPSOIDS.available())):
        table = Table(title=title, title_justify="left")
        for heading in ("name", "what it is", "options", "missing"):
            table.add_column(heading)
        for info in found.values():
            options = "\n".join(f"{name}={value}" for name, value in info.options.items())
            table.add_row(info.name, info.summary, options, info.missing or "")
        console.print(table)


@contextmanager
def _people_errors(as_json: bool = False) -> Iterator[None]:
    """What the library raises on purpose, and what the disk says, without a traceback."""
    try:
        yield
    except KeyboardInterrupt as error:
        _say(error, "aborted; in a folder that was given, every layer that was solved is kept", as_json)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        from convexprune.solvers.errors import ConvexPruneError

        if not isinstance(error, ConvexPruneError | OSError):
            raise
        _say(error, str(error), as_json)
        raise typer.Exit(1) from None


def _say(error: BaseException, message: str, as_json: bool) -> None:
    kind = type(error).__name__
    if as_json:
        print_json({"error": {"type": kind, "message": message}})
        return
    errors.print(f"[red]error:[/red] {kind}: ", end="", highlight=False)
    say(errors, message)


def _print_version(wanted: bool) -> None:
    if wanted:
        from convexprune import __version__

        typer.echo(f"convexprune {__version__}")
        raise typer.Exit


@app.callback()
def main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the library's log.")] = False,
    version: Annotated[  # noqa: ARG001 - its callback prints it and ends
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Prune trained networks by convex optimisation, with a certificate for every layer."""
    show_anything()
    if verbose:
        from rich.logging import RichHandler

        handler = RichHandler(console=errors)
        handler.setFormatter(VisibleFormatter(logging.BASIC_FORMAT))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
