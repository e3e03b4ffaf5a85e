"""What lies in a run's folder, read and checked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convexprune.errors import DamagedFile
from convexprune.files.weights import StrPath, as_path
from convexprune.nettrim.goals import as_goal
from convexprune.report.page.extras import Extras, read_extras
from convexprune.report.page.numerals import number
from convexprune.runs.consistency import Checks, check_results
from convexprune.runs.journal import Journal, read_json, recipe_fingerprint
from convexprune.solvers.errors import InvalidInput


@dataclass(frozen=True)
class Trace:
    """How the solve of a layer went.

    Attributes:
        layer: Its name.
        group, groups: Which group this is, and how many there are; of several the one that took longest.
        solver: Its name.
        tol, feas_tol: What gap and violation had to reach.
        points: (iteration, seconds, gap, violation); None where a figure is not finite.
    """

    layer: str
    group: int
    groups: int
    solver: str
    tol: float | None
    feas_tol: float | None
    points: tuple[tuple[int, float, float | None, float | None], ...]


@dataclass(frozen=True)
class Curve:
    """A layer's measured path: points of (eps, error, nonzeros), errors relative."""

    layer: str
    points: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True)
class Saved:
    """A run's folder.

    Attributes:
        title: The folder's name.
        report: As ``Report.to_dict``, and what was added to it.
        fingerprints: Of model, data and recipe; None without a journal.
        traces, paths: By layer, from the journal.
        extras: As ``save_extras`` wrote them; None without.
    """

    title: str
    report: Mapping[str, Any]
    fingerprints: Mapping[str, str] | None
    traces: Mapping[str, Trace]
    paths: Mapping[str, Curve]
    checks: Checks
    extras: Extras | None

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The layers' rows."""
        rows: Sequence[Mapping[str, Any]] = self.report["layers"]
        return rows

    @property
    def coreset(self) -> bool:
        """Whether a coreset was taken; else it is a run of Net-Trim."""
        return "method" in self.report["provenance"]


def read_saved(folder: StrPath) -> Saved:
    """Read a run's folder.

    Raises:
        InvalidInput: It holds no report.json.
        OtherRun: Its journal is of another format.
        DamagedFile: A file in it is not what convexprune writes, or report.json is not what the others say.
    """
    place = as_path(folder)
    path = place / "report.json"
    if not path.is_file():
        found = "no such folder" if not place.is_dir() else "no report.json in it"
        raise InvalidInput(f"{folder}: {found}; give the folder of a run that ended, or save_json(report.to_dict(), …)")
    report = _checked(read_json(path, "write it again"), path)
    journal, run, records = None, None, []
    if (place / "run.json").exists():
        journal, run = Journal.existing(place)
        # One at a time: multipliers are as large as the calibration data, and none is kept here.
        records = [record.data for record in journal.entries()]
    try:
        goals = {row["name"]: str(row.get("goal", "")) for row in report["layers"]}
        return Saved(
            title=place.resolve().name,
            report=report,
            fingerprints=None if run is None else _fingerprints(run),
            traces=_traces(records, goals),
            paths=_paths(records),
            checks=check_results(place, report, journal, run and run["recipe"]),
            extras=read_extras(place),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"report.json or an entry of the journal is not as convexprune writes it ({error!r})"
        raise DamagedFile(f"{place}: {found}; restore it, or prune again") from error


def _fingerprints(run: Mapping[str, Any]) -> dict[str, str]:
    own = {name: str(run[name]) for name in ("model", "data")}
    return own | {"recipe": recipe_fingerprint(run["recipe"])}


def _checked(report: dict[str, Any], path: Path) -> dict[str, Any]:
    """With all that every report has."""
    kinds = {"layers": list, "skipped": list, "provenance": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(report.get(name), kind)]
    needed = ("name", "shape", "nonzeros", "nonzeros_before", "status")
    rows = [] if "layers" in wrong else report["layers"]
    wrong += [f"layers[{i}]" for i, row in enumerate(rows) if not isinstance(row, dict) or not {*needed} <= {*row}]
    if wrong:
        raise DamagedFile(f"{path}: {', '.join(wrong[:4])} is not as Report.to_dict() writes it; write it again")
    return report


def _traces(records: Sequence[Mapping[str, Any]], goals: Mapping[str, str]) -> dict[str, Trace]:
    """Of each layer's last solve: that of the goal in its row."""
    found: dict[str, Trace] = {}
    for data in records:
        name, groups = data["layer"], data["groups"]
        if name not in goals or not groups or any(group.get("path") for group in groups):
            continue
        if name not in found or str(as_goal(data["goal"])) == goals[name]:
            found[name] = _trace(name, groups)
    return found


def _trace(name: str, groups: Sequence[Mapping[str, Any]]) -> Trace:
    times = [sum(float(part) for part in group["solution"]["seconds"].values()) for group in groups]
    longest = max(range(len(groups)), key=times.__getitem__)
    solution = groups[longest]["solution"]
    limits = solution["provenance"].get("limits", {})
    points = tuple(
        (int(point["iteration"]), float(point["seconds"]), number(point["gap"]), number(point["violation"]))
        for point in solution["trace"]
    )
    solver = str(solution["provenance"].get("solver", ""))
    tolerances = number(limits.get("tol")), number(limits.get("feas_tol"))
    return Trace(name, longest, len(groups), solver, *tolerances, points)


def _paths(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Groups of a layer added up."""
    found = {}
    for data in records:
        groups = [group for group in data["groups"] if group.get("path")]
        if not groups:
            continue
        size = math.hypot(*(float(group["size"]) for group in groups)) or 1.0
        points = []
        for step in zip(*(group["path"] for group in groups), strict=True):
            missed = math.hypot(
                *(float(point[1]) * float(group["size"]) for point, group in zip(step, groups, strict=True))
            )
            points.append((float(step[0][0]), missed / size, sum(int(point[2]) for point in step)))
        found[data["layer"]] = Curve(data["layer"], tuple(points))
    return found
