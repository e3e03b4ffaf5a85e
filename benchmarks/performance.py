"""A performance profile of every solver over every problem: the zoo, and layers that ``dump.py`` wrote.

    python benchmarks/performance.py --tol 1e-4 --time-limit 10 --plot benchmarks/results/profile.png

Each answer is judged anew, from its weights and multipliers alone, on data built afresh. The time is what a caller
waits: building, solving, and each judging that the call asked for. Failures stay failures.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from dump import read_layer
from measure import fastest
from profiles import Answer, plot_profile, standings, times
from rich.console import Console
from rich.progress import track
from rich.table import Table

from convexprune.files.weights import save_json
from convexprune.solvers import available, solve
from convexprune.solvers.methods.interface import Solver
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.methods.solve import versions
from convexprune.solvers.testing import zoo

HEADINGS = ("solver", "takes", "solves", "fastest", "mean s", "× best", "building", "judging", "claims", "true")
CAPTION = (
    "mean: shifted geometric, over what it takes, a failure costs the limit; × best: relative to the best on the same; "
    "claims: ended by its own rule; true: what it first claimed was certified"
)


def chosen_solvers(names: Sequence[str] | None) -> tuple[dict[str, Solver], dict[str, str]]:
    """Solvers by name, each used once so that imports are not timed; and those that lack a package."""
    known = available()
    wanted = names or list(known)
    lacking = {name: str(known[name].missing) for name in wanted if name in known and known[name].missing}
    solvers = {name: make_solver(name, {})[1] for name in wanted if name not in lacking}
    for solver in solvers.values():
        easy = next((m for m in (*zoo.representative(), *zoo.budgets()) if solver.refuses(m.build()) is None), None)
        if easy:
            solve(easy.build(), solver, tol=1e-2, time_limit=1.0)
    return solvers, lacking


def chosen_problems(kinds: Sequence[str], names: Sequence[str] | None, files: Sequence[Path]) -> dict[str, Any]:
    """Members of the zoo and dumped layers, by name."""
    members = [zoo.member(name) for name in names] if names is not None else zoo.members(*kinds)
    layers = {path.stem: lambda path=path: read_layer(path) for path in files}
    return {member.name: member.build for member in members} | layers


def table(answers: Sequence[Answer], limit: float, shift: float) -> Table:
    """A row a solver."""
    problems, tol = len({a.problem for a in answers}), answers[0].tol
    title = f"{problems} problems, gap ≤ {tol:g}, violation ≤ {tol / 10:g}, {limit:g} s each"
    found = Table(title=title, caption=CAPTION)
    for heading in HEADINGS:
        found.add_column(heading, justify="left" if heading == "solver" else "right")
    for s in (s for s in standings(answers, limit, shift) if s.taken):
        counts = (str(s.taken), f"{s.solved} ({100 * s.solved / problems:.0f} %)", str(s.fastest))
        spent = (f"{s.mean:.3f}", f"{s.ratio:.1f}", f"{100 * s.setup:.0f} %", f"{100 * s.certify:.0f} %")
        told = f"{100 * s.true / s.claims:.1f} %" if s.claims else "–"
        found.add_row(s.solver, *counts, *spent, str(s.claims), told)
    return found


def failures(answers: Sequence[Answer]) -> Iterator[str]:
    """A line for each answer that is taken and not solved, exceptions first."""
    failed = [a for a in answers if a.taken and not a.solved]
    for a in sorted(failed, key=lambda a: (a.status != "raised", a.solver)):
        late = ", late" if a.certified else ""
        figures = f"gap {a.gap:.1e}, violation {a.violation:.1e}, {a.seconds:.2f} s{late}"
        yield f"{a.solver}: {a.problem}: {a.status}: {figures} {a.message}"


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("convexprune", "torch", "numpy", "scipy", "cvxpy", "clarabel", "scs", "osqp")
    machine = {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    layers = [path.stem for path in arguments.layers]
    return {"arguments": given | {"layers": layers}, **machine, "versions": versions(*packages)}


def save_parquet(answers: Sequence[Answer], path: Path) -> None:
    """A row an answer."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist([asdict(a) for a in answers]), path)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--tol", type=float, nargs="+", default=[1e-4], help="certified gaps; the violation: a tenth")
    found.add_argument("--time-limit", type=float, default=10.0, help="seconds for each answer")
    found.add_argument("--solvers", nargs="+", help="names; everything in the registry if left out")
    found.add_argument("--kinds", nargs="+", default=[], choices=zoo.KINDS, help="of zoo members; all if left out")
    found.add_argument("--members", nargs="*", help="zoo members by name; with nothing behind it, none")
    found.add_argument("--layers", nargs="+", type=Path, default=[], help="files written by dump.py")
    found.add_argument("--repeats", type=int, default=1, help="the fastest of so many")
    found.add_argument("--shift", type=float, default=0.01, help="seconds, of the shifted geometric mean")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--failures", type=int, default=20, help="lines about failures at most")
    for name, what in (("parquet", "every answer"), ("json", "the same, with the environment"), ("plot", "PNG")):
        found.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    a, console = parser().parse_args(arguments), Console(width=140)
    torch.set_num_threads(a.threads)
    solvers, lacking = chosen_solvers(a.solvers)
    problems = chosen_problems(a.kinds, a.members, a.layers)
    by_tol = {}
    for tol in a.tol:
        steps = track(list(problems.items()), description=f"gap {tol:g}", console=console, transient=True)
        by_tol[tol] = [
            replace(fastest(build, solver, tol, a.time_limit, a.repeats), problem=name, solver=title)
            for name, build in steps
            for title, solver in solvers.items()
        ]
        console.print(table(by_tol[tol], a.time_limit, a.shift))
        for line in list(failures(by_tol[tol]))[: a.failures]:
            console.print(line, style="dim", highlight=False, markup=False, overflow="ellipsis", no_wrap=True)
    answers = [answer for found in by_tol.values() for answer in found]
    takers = {answer.solver for answer in answers if answer.taken}
    left_out = lacking | {name: "it refuses all of these problems" for name in solvers if name not in takers}
    for name, reason in left_out.items():
        console.print(f"{name} left out: {reason}", markup=False)
    if a.parquet:
        save_parquet(answers, a.parquet)
    if a.json:
        save_json({"environment": environment(a), "answers": [asdict(answer) for answer in answers]}, a.json)
    if a.plot:
        plot_profile({tol: times(a for a in found if a.solver in takers) for tol, found in by_tol.items()}, a.plot)


if __name__ == "__main__":
    wanted = str(parser().parse_args().threads)
    if os.environ.get("OMP_NUM_THREADS") != wanted:  # libraries size their thread pools when they are loaded
        os.environ["OMP_NUM_THREADS"] = wanted
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 - this very script
    main()
