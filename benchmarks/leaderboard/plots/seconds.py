"""Seconds to the certificate, a row a dataset, a column a solver."""

import math
from typing import Any

from benchmark_utils import seconds_to_certificate
from benchopt import BasePlot


class Plot(BasePlot):
    """Seconds of the fastest certified run; "no" where none was certified, nothing where the solver refuses."""

    name = "seconds_to_certificate"
    type = "table"
    options = {"objective": ...}  # noqa: RUF012 - benchopt's way

    def plot(self, df: Any, objective: str) -> list[list[str]]:
        table = seconds_to_certificate(df[df.objective_name == objective])
        return [
            [dataset, *(_told(row.get(dataset)) for row in table.values())] for dataset in sorted(set(df.dataset_name))
        ]

    def get_metadata(self, df: Any, objective: str) -> dict[str, Any]:
        solvers = list(seconds_to_certificate(df[df.objective_name == objective]))
        columns = ["dataset", *(solver.removeprefix("convexprune[").removesuffix("]") for solver in solvers)]
        return {"title": f"Seconds to the certificate, {objective}", "columns": columns}


def _told(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.4f}" if math.isfinite(seconds) else "no"
