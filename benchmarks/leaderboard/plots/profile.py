"""The performance profile over the datasets of a run."""

import math
from typing import Any

from benchmark_utils import ratios, seconds_to_certificate
from benchopt import BasePlot


class Plot(BasePlot):
    """The share of datasets certified within τ times the best solver's time (Dolan and Moré, 2002)."""

    name = "performance_profile"
    type = "scatter"
    options = {"objective": ...}  # noqa: RUF012 - benchopt's way

    def plot(self, df: Any, objective: str) -> list[dict[str, Any]]:
        table = seconds_to_certificate(df[df.objective_name == objective])
        problems = df.dataset_name.nunique()
        curves = []
        for solver, row in ratios(table).items():
            finite = sorted(r for r in row.values() if math.isfinite(r))
            shares = [(number + 1) / problems for number in range(len(finite))]
            # Each step twice, before and after: the page joins points by straight lines.
            x = [1.0, *(r for r in finite for _ in range(2))]
            y = [0.0, *(share for pair in zip([0.0, *shares], shares, strict=False) for share in pair)]
            curves.append({"x": x, "y": y, "label": solver, **self.get_style(solver)})
        return curves

    def get_metadata(self, df: Any, objective: str) -> dict[str, Any]:
        labels = {"xlabel": "time relative to the best solver, τ", "ylabel": "share of datasets certified"}
        return {"title": f"{df.dataset_name.nunique()} datasets, {objective}", "scale": "semilog-x", **labels}
