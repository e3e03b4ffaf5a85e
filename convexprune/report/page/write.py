"""From a run's folder to its page."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from convexprune.errors import DamagedFile
from convexprune.files.texts import visible
from convexprune.files.weights import StrPath, write_atomically
from convexprune.report.page.columns import latency_table, layer_table
from convexprune.report.page.facts import provenance, remarks
from convexprune.report.page.gains import cards, gains
from convexprune.report.page.saved import Saved, read_saved
from convexprune.report.page.sections import layer_bars, measured_paths, traces, weight_maps
from convexprune.report.page.words import asked, badge, findings, layer_name
from convexprune.solvers.errors import MissingExtra

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
        OtherRun: Its journal is of another format.
        DamagedFile: A file in it is not what convexprune writes, or report.json is not what the others say.
        MissingExtra: jinja2 or matplotlib is not installed.
        OSError: The page cannot be written; what was there before still is.
    """
    environment = _environment()
    saved = read_saved(folder)
    try:
        view = _view(saved)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(
            f"{folder}: report.json or extras.json lacks something ({error!r}); write it again"
        ) from error
    script = _own("sort.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # the only script that may run
    text = environment.get_template("page.html").render(view, script=script, digest=digest, style=_own("style.css"))
    return write_atomically(visible(text).encode(), Path(folder) / "report.html" if out is None else Path(out))


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
    told = findings(saved)
    left_out: list[str] = []
    timed = (saved.extras.data.get("latency") if saved.extras else None) or {}
    return {
        "title": saved.title,
        "asked": asked(saved),
        "findings": told,
        "badge": badge(told, saved.coreset),
        "cards": cards(saved),
        "gains": gains(saved),
        "latency": latency_table(saved),
        "untimed": timed.get("skipped", []),
        "bars": layer_bars(saved, left_out),
        "layers": layer_table(saved),
        "remarks": remarks(saved),
        "paths": measured_paths(saved, left_out),
        "traces": traces(saved, left_out),
        "maps": weight_maps(saved, left_out),
        "skipped": saved.report["skipped"],
        "provenance": provenance(saved),
        "checks": saved.checks,
        "left_out": left_out,
        "layer_name": layer_name,
    }


def _own(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")
