"""The command line: ``convexprune demo``, ``prune``, ``verify``, ``evaluate``, ``report``, ``methods``, ``solvers``."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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
from convexprune.options import Options

if TYPE_CHECKING:
    from convexprune.solvers.methods.registry import SolverInfo

C = TypeVar("C", bound=Callable[..., None])

app = typer.Typer(
    help="Prune trained networks by convex optimisation, with a certificate for every layer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"default_map": {"help": False}},  # typer loads pydantic to convert an option that has no value
)

_target = partial(typer.Option, rich_help_panel="How far")
_data = partial(typer.Option, rich_help_panel="The data")
_run = partial(typer.Option, rich_help_panel="The run")
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
_Holdout = Annotated[int | None, _data(help="Samples at random that errors are only measured on.", min=1)]
_Samples = Annotated[int | None, _data(help="Use so many samples, chosen at random.", min=1)]
_Key = Annotated[str | None, _data(help="The array in the file, such as x_train.")]
_LabelsKey = Annotated[
    str | None, _data(help="The labels there: samples have their share of each, for corenet's bound.")
]
_CALIBRATION = (
    "Inputs: .npz, .npy, .safetensors or .pt; several arrays if named as the model's arguments. Some methods need none."
)
_MAX_RATIO = "How many times its size a file that is read may unpack to; 256 MiB always pass."
_MaxRatio = Annotated[float, _data(help=_MAX_RATIO)]
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
    from convexprune.cli.demo import FIGURES, MODEL, PICTURE, run_demo, tables

    with _people_errors(), bars(errors) as shown:
        dense, rows = run_demo(out, seed=seed, progress=shown.progress, callback=shown.callback)
    for table in tables(dense, rows, console.width):
        console.print(table, "")
    for what, name in (("Picture", PICTURE), ("Sparse model", MODEL), ("Figures", FIGURES)):
        say(console, f"{what}: {out / name}")


def _with_options(command: C) -> C:
    """A command with one more flag for each field of ``Options`` that text can say, in the place of ``**options``."""
    signature = inspect.signature(command)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    flags = [_flag(each) for each in fields(Options) if each.name != "keep_solutions"]  # no file keeps these
    command.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
    return command


def _flag(field: "Field[Any]") -> inspect.Parameter:
    """The flag of a field: its help and its default are the field's own."""
    flag, help_, kind = f"--{field.name.replace('_', '-')}", field.metadata["help"].removesuffix("."), field.type
    if field.default is True:
        flag = f"{flag}/--no-{flag[2:]}"
    elif "Mapping" in str(kind):
        flag, help_, kind = flag.removesuffix("s"), f"{help_}: NAME=VALUE; repeatable", list[str] | None
    elif "Iterable" in str(kind):
        help_, kind = f"{help_}; repeatable", list[str] | None
    elif kind not in (bool, int, float, str, int | None, float | None):
        kind = str | None
    option = typer.Option(field.default, flag, help=f"{help_}.", rich_help_panel="How" if field.compare else "The run")
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


@app.command(epilog=_STATUSES)
@_with_options
def prune(
    model: Annotated[str, typer.Argument(help="lenet-300-100, lenet-5, or your own as package.module:factory.")],
    weights: Annotated[Path, typer.Option(help="The trained weights: .safetensors, or .pt without pickled code.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to. A run in it goes on.")] = None,
    calibration: Annotated[Path | None, typer.Option(help=_CALIBRATION)] = None,
    method: Annotated[str | None, typer.Option(help="See `convexprune methods`; else the one that suits.")] = None,
    method_option: Annotated[list[str] | None, typer.Option(help="The method's own NAME=VALUE; repeatable.")] = None,
    eps: Annotated[list[str] | None, _target(help="Error allowed: 0.1, or PATTERN=0.1; repeatable.")] = None,
    sparsity: Annotated[
        list[str] | None, _target(help="Part to be zero: 0.8; or 2:4; or PATTERN=either; repeatable.")
    ] = None,
    target: Annotated[
        str | None, _target(help="'KIND VALUE[ PATTERN=VALUE] setting=word': 'neurons 0.5', 'network-eps 0.05', …")
    ] = None,
    key: _Key = None,
    mask: Annotated[
        str | None, _data(help="The array of 1 where a position counts; attention_mask if not given.")
    ] = None,
    no_mask: Annotated[bool, _data("--no-mask", help="All positions count, whatever masks there are.")] = False,
    samples: _Samples = None,
    holdout: _Holdout = None,
    labels_key: _LabelsKey = None,
    data: Annotated[Path | None, _data(help="Labelled samples, for the accuracy before and after.")] = None,
    data_key: Annotated[str | None, _data(help="Its inputs, such as x_test.")] = None,
    label_key: Annotated[str | None, _data(help="Its labels, such as y_test.")] = None,
    max_ratio: _MaxRatio = 100.0,
    jobs: Annotated[int | None, _run(help="Layers at a time, in processes of their own.", min=1)] = None,
    scheduler: Annotated[str | None, _run(help="A Dask cluster's: tcp://host:8786.")] = None,
    dry_run: Annotated[bool, _run("--dry-run", help="Show the plan, with time and memory; write nothing.")] = False,
    as_json: _Json = False,
    **options: object,
) -> None:
    """Prune a trained model and write the smaller one, with a report, to a folder.

    The folder keeps each layer as soon as it is solved: the same command goes on where it was. Ctrl-C ends a run in
    order, a second one at once.
    """
    flags = {name: value for name, value in locals().items() if name != "options"} | options
    with _people_errors(as_json):
        from convexprune.cli.prune import prune as pruned

        status = pruned(flags)
    raise typer.Exit(status)


@app.command(epilog=_STATUSES)
def verify(
    folder: Annotated[Path, typer.Argument(help="The --out of a run.")],
    model: Annotated[str, typer.Argument(help="As for `prune`.")],
    weights: Annotated[Path, typer.Option(help="The trained weights, as given to `prune`.")],
    calibration: Annotated[Path | None, typer.Option(help="The same inputs.")] = None,
    key: _Key = None,
    samples: _Samples = None,
    holdout: _Holdout = None,
    labels_key: _LabelsKey = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="A run that is not complete may be in order, too.")
    ] = False,
    max_ratio: _MaxRatio = 100.0,
    as_json: _Json = False,
) -> None:
    """Judge a run again, without any solver: every certificate is recomputed in float64.

    Exit status 3 if anything differs, or if the run is not complete and --partial is not given.
    """
    with _people_errors(as_json):
        from convexprune.cli.source import read_source
        from convexprune.runs.data import Data
        from convexprune.runs.journal import Journal
        from convexprune.verification import verify as verified

        mask = Journal.existing(folder)[1]["recipe"].get("mask")
        own: dict[str, Any] = {"samples": samples, "max_ratio": max_ratio, "holdout": holdout, "labels_key": labels_key}
        read = read_source(model, weights, calibration, key, mask=mask, **own)
        own = {"mask": mask, "holdout": read.holdout, "labels": read.labels}
        data = None if read.inputs is None else Data(read.inputs, **own)
        found = verified(read.model, data, folder)
        status = 0 if found.ok and (found.complete or partial) else UNCERTIFIED
        if as_json:
            print_json({"status": "verified", "exit_status": status, "verification": found.to_dict()})
        else:
            console.print(found.table(console.width))
    raise typer.Exit(status)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="As for `prune`.")],
    weights: Annotated[
        list[Path], typer.Option(help="The network's; repeatable: of one network pruned to several ratios.")
    ],
    data: Annotated[Path, _data(help="Labelled samples that nothing was fitted to: .npz, .npy, .safetensors or .pt.")],
    data_key: Annotated[str | None, _data(help="Its inputs, such as x_test.")] = None,
    label_key: Annotated[str | None, _data(help="Its labels, such as y_test.")] = None,
    samples: _Samples = None,
    parent: Annotated[Path | None, typer.Option(help="Weights of the network before it was pruned.")] = None,
    control: Annotated[Path | None, typer.Option(help="Those of a network that was trained separately.")] = None,
    corruption: Annotated[
        list[str] | None, typer.Option(help="Only this one, such as gaussian_noise; repeatable.")
    ] = None,
    no_corruptions: Annotated[bool, typer.Option("--no-corruptions", help="The data as they are alone.")] = False,
    severity: Annotated[list[int], typer.Option(help="Of corruptions, 1 to 5; repeatable.")] = [3],  # noqa: B006
    noise: Annotated[
        bool | None, typer.Option(help="Compare with the parent under noise, or not; else where inputs are numbers.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What several networks are called together.")] = None,
    seed: Annotated[int, typer.Option(help="Of corruptions and noise.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the figures; in that of a run its page shows them.")
    ] = None,
    max_ratio: _MaxRatio = 100.0,
    as_json: _Json = False,
) -> None:
    """Evaluate a pruned network beyond its accuracy: under corruptions and noise, by class, and beside its parent.

    Of several networks also how far the method can prune at no loss on each distribution (the prune potential).
    """
    flags = dict(locals())
    with _people_errors(as_json):
        from convexprune.cli.evaluate import evaluate as evaluated

        status = evaluated(flags)
    raise typer.Exit(status)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The --out of `prune`.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; report.html in the folder if not given.")] = None,
) -> None:
    """Write one self-contained HTML page about a run, and print its path.

    Files that were changed since the run wrote them are named; whether its figures hold is for `verify` to say.
    """
    with _people_errors():
        from convexprune.page.page import write_page

        typer.echo(write_page(folder, out))
        typer.echo("what was checked, and what only `convexprune verify` can check, stands on the page", err=True)


@app.command()
def methods() -> None:
    """List the methods of pruning: what each chooses, its options, and what is missing."""
    from convexprune.pruners import available_pruners

    console.print(_listed("methods", available_pruners().values()))


@app.command()
def solvers() -> None:
    """List the solvers of layer programs and Löwner ellipsoids: what each takes, its options, and what is missing."""
    from convexprune.solvers import available
    from convexprune.solvers.geometry.method import ELLIPSOIDS

    console.print(_listed("layer programs", available().values()))
    console.print(_listed("Löwner ellipsoids", ELLIPSOIDS.available().values()))


def _listed(title: str, infos: "Iterable[SolverInfo]") -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("name", "what it is", "options", "missing"):
        table.add_column(heading)
    for info in infos:
        options = "\n".join(f"{name}={value}" for name, value in info.options.items())
        table.add_row(info.name, info.summary, options, info.missing or "")
    return table


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
