"""From a run's folder to its page."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convexprune.errors import DamagedFile
from convexprune.files import StrPath, write_atomically
from convexprune.journal import recipe_fingerprint
from convexprune.page.charts import SERIES, bars, convergence, curves
from convexprune.page.columns import latency_table, layer_table
from convexprune.page.gains import cards, gains
from convexprune.page.maps import picture
from convexprune.page.numerals import DASH, figure, number, part
from convexprune.page.saved import Saved, read_saved
from convexprune.page.words import asked, badge, findings, layer_name
from convexprune.solvers.errors import MissingExtra

__all__ = ["MOST_BARS", "MOST_MAPS", "MOST_TRACES", "write_page"]

MOST_BARS, MOST_TRACES, MOST_MAPS = 60, 24, 24
"""The most layers that a chart of bars, the traces and the pictures show: the largest ones; the page names how many."""

_TEMPLATES = Path(__file__).parent / "templates"


def write_page(folder: StrPath, out: StrPath | None = None) -> Path:
    """Write one HTML file about a run, that needs nothing else: no script, font or picture from anywhere.

    The same folder gives the same page, byte for byte.

    Args:
        folder: Of the run, with report.json; the journal and extras.json are shown where they are.
        out: Where to write it; None: report.html in the folder.

    Returns:
        Where it was written.

    Raises:
        InvalidInput: The folder holds no report.json.
        DamagedFile: A file in it is not what convexprune writes.
        MissingExtra: jinja2 or matplotlib is not installed.
        OSError: The page cannot be written; what was there before still is.
    """
    environment = _environment()
    saved = read_saved(folder)
    try:
        view = _view(saved)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{folder}: report.json or extras.json lacks something ({error!r}); write it again") from error
    text = environment.get_template("page.html").render(view)
    return write_atomically(text.encode(), Path(folder) / "report.html" if out is None else Path(out))


def _environment() -> Any:
    try:
        import jinja2
        import matplotlib  # noqa: F401 - for the charts, before anything is read
    except ImportError as error:
        raise MissingExtra(
            f'the page needs {error.name}, which is not installed: pip install "convexprune[report]"'
        ) from error
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _view(saved: Saved) -> dict[str, Any]:
    """All that the template shows."""
    from markupsafe import Markup

    told = findings(saved)
    left_out: list[str] = []
    script = (_TEMPLATES / "sort.js").read_text(encoding="utf-8")
    svg = Markup  # noqa: S704 - charts escape what they are given, and the script is our own
    return {
        "title": saved.title,
        "script": svg(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "style": svg((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
        "asked": asked(saved),
        "findings": told,
        "badge": badge(told),
        "cards": cards(saved),
        "gains": gains(saved),
        "bars": [(title, svg(chart)) for title, chart in _bars(saved, left_out)],
        "tables": {"layers": layer_table(saved), "latency": latency_table(saved)},
        "untimed": ((saved.extras.data.get("latency") if saved.extras else None) or {}).get("skipped", []),
        "remarks": _remarks(saved),
        "paths": _paths(saved, left_out),
        "traces": [(*told, svg(chart)) for *told, chart in _traces(saved, left_out)],
        "maps": _maps(saved, left_out),
        "skipped": saved.report["skipped"],
        "provenance": _provenance(saved),
        "left_out": left_out,
        "layer_name": layer_name,
    }
