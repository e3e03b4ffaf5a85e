"""The Löwner ellipsoid of many points: seconds and memory to a certified gap, against methods of one point at a time.

    python benchmarks/ellipsoid.py
    python benchmarks/ellipsoid.py --points 1000000 --dim 50 --tol 1e-3 --solvers wolfe-atwood
    python benchmarks/ellipsoid.py --race --out benchmarks/results/ellipsoid.png

Gaussian points in float64, about the origin. Ours from the points to the certificate, the median of three runs in a
process of its own, with the peak memory that the first one adds. Then the others from uniform weights, each until its
own leverages say that the gap is there (they lose no time on being judged), or for ``--factor`` times our seconds.
``--race`` draws the certified gap against seconds on a small and a medium instance, judging off the clock.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from convexprune.solvers.geometry.cloud import Cloud
from convexprune.solvers.geometry.ellipsoid import certify_weights, lowner_ellipsoid
from convexprune.solvers.geometry.method import ELLIPSOIDS

FIGURES = ((1_000_000, 50, 1e-3), (100_000, 200, 1e-2), (20_000, 1000, 2e-2))
RIVALS = ("wolfe-atwood", "khachiyan")
SMALL, MEDIUM = (500, 10), (20_000, 20)
RACERS = ("working-set", "wolfe-atwood", "khachiyan", "multiplicative")
BEST = 1e-9  # gaps below this are not drawn


def gaussian(n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def peak() -> int:
    """The most memory that this process has held so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def ours(n: int, d: int, tol: float, repeats: int) -> dict[str, Any]:
    """Seconds of each run; gap and passes of the last; MiB that the first one takes beside the points."""
    points, seconds, before = gaussian(n, d), [], peak()
    added = 0.0
    for run in range(repeats):
        began = time.perf_counter()
        e = lowner_ellipsoid(points, tol)
        seconds.append(time.perf_counter() - began)
        added = (peak() - before) / 2**10 if run == 0 else added
    told = {"points": points.nbytes / 2**20, "added": added, "status": str(e.status), "gap": e.certificate.gap}
    return told | {"seconds": seconds, "passes": e.iterations, "support": len(e.support)}


def plainly(n: int, d: int, tol: float, name: str, limit: float) -> dict[str, Any]:
    """A method stepped from uniform weights until its own gap is ``tol`` or its time is over."""
    points, (_, method) = gaussian(n, d), ELLIPSOIDS.make(name, {})
    began = time.perf_counter()
    state, steps = method.init(Cloud.of(points, free=False), None), 0
    while (gap := method.own_gap(state)) > tol and time.perf_counter() - began < limit:
        method.step(state)
        steps += 1
    return {"seconds": time.perf_counter() - began, "steps": steps, "gap": gap, "solved": gap <= tol}


def apart(task: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a task returns that runs in a fresh process, so that its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(task, arguments)


def figure(n: int, d: int, tol: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """One instance, ours and the others, printed as it comes."""
    mine = apart(ours, n, d, tol, arguments.repeats)
    seconds = statistics.median(mine["seconds"])
    spread = f"({min(mine['seconds']):.1f} to {max(mine['seconds']):.1f})"
    print(f"{n:,} × {d} to a gap of {tol:g}: {seconds:.1f} s {spread}, {mine['status']}, gap {mine['gap']:.1e}")
    memory = f"{mine['added']:.0f} MiB beside {mine['points']:.0f} MiB of points"
    print(f"    {mine['passes']} passes, {mine['support']} points in the support, {memory}", flush=True)
    others = {}
    for name in arguments.solvers:
        others[name] = other = apart(plainly, n, d, tol, name, arguments.factor * seconds)
        how = "reached" if other["solved"] else "stopped"
        ratio = f"{other['seconds'] / seconds:.1f} times"
        print(f"    {name}: {how} at {other['seconds']:.1f} s ({ratio}), {other['steps']:,} steps, ", end="")
        print(f"gap {other['gap']:.1e}", flush=True)
    return {"n": n, "d": d, "tol": tol, "ours": mine, "others": others}


def curve(name: str, points: torch.Tensor, limit: float) -> Iterator[tuple[float, float]]:
    """Seconds and the certified gap, at times a tenth apart; judging is off the clock."""
    method = ELLIPSOIDS.make(name, {})[1]
    began = time.perf_counter()
    cloud = Cloud.of(points, free=False)
    state = method.init(cloud, None)
    spent, due, gap = time.perf_counter() - began, 0.0, 1.0
    while spent < limit and gap > BEST and not method.done(state):
        began = time.perf_counter()
        method.step(state)
        spent += time.perf_counter() - began
        if spent >= due or spent >= limit:
            gap, due = certify_weights(cloud, method.weights(state)).gap, 1.1 * spent
            yield spent, gap


def conic(points: torch.Tensor) -> list[tuple[float, float]]:
    """Where cvxpy's default solver ends: one point."""
    e = lowner_ellipsoid(points, 1e-6, solver="cvxpy")
    return [(e.seconds.setup + e.seconds.solve, e.certificate.gap)]


def race(limit: float) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Curves by instance and method."""
    for name in RACERS:  # nothing is loaded or compiled on the clock
        lowner_ellipsoid(gaussian(50, 3), 1e-2, solver=name)
    found = {}
    for n, d in (SMALL, MEDIUM):
        points = gaussian(n, d)
        curves = {name: list(curve(name, points, limit)) for name in RACERS}
        if (n, d) == SMALL:
            conic(points[:50])
            curves["cvxpy"] = conic(points)
        for name, line in curves.items():
            print(f"{n:,} × {d} {name}: gap {line[-1][1]:.1e} after {line[-1][0]:.2f} s", flush=True)
        found[f"{n:,} × {d}"] = curves
    return found


def draw(found: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    """One panel an instance, both axes logarithmic."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 4), layout="constrained")
    panels = picture.subplots(1, len(found), squeeze=False)[0]
    for axes, (title, curves) in zip(panels, found.items(), strict=True):
        for name, line in curves.items():
            seconds, gaps = zip(*line, strict=True)
            axes.loglog(seconds, [max(gap, BEST) for gap in gaps], "o" if len(line) == 1 else "-", label=name)
        axes.set(title=f"{title} Gaussian points", xlabel="seconds", ylabel="certified gap")
        axes.grid(alpha=0.3)
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    picture.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, help="one instance instead of the three; with --dim")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--solvers", nargs="*", default=RIVALS, help="methods to compare with")
    parser.add_argument("--factor", type=float, default=10.0, help="time that these get, in our seconds")
    parser.add_argument("--race", action="store_true", help="gap against seconds, and nothing else")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that each method races for")
    parser.add_argument("--out", type=Path, help="picture of the race, a JSON file of the same name beside it")
    given = parser.parse_args(arguments)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
    instances = [(given.points, given.dim, given.tol)] if given.points and given.dim else FIGURES
    found: Any = race(given.limit) if given.race else [figure(*instance, given) for instance in instances]
    if given.out and given.race:
        draw(found, given.out)
    if given.out:
        given.out.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
