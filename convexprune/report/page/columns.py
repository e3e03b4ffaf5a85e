"""Tables: cells with what is shown and what is sorted by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convexprune.report.page.numerals import DASH, count, duration, figure, number, part, small
from convexprune.report.page.saved import Saved
from convexprune.report.page.words import NEURONS, layer_name

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is shown, and a number or text to sort by; None sorts last."""

    text: str
    value: float | str | None
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """Headings with what they mean, and rows of cells; the first column names the row."""

    caption: str
    headings: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]


def _number(show: Callable[[float | None], str], key: str) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        value = number(row.get(key))
        return Cell(show(value), value)

    return cell


def _text(key: str) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        value = row.get(key)
        return Cell(DASH, None) if value in (None, "") else Cell(str(value), str(value), "text")

    return cell


def _name(row: Row) -> Cell:
    return Cell(layer_name(str(row["name"])), layer_name(str(row["name"])), "text")


def _shape(row: Row) -> Cell:
    size = 1
    for side in row["shape"]:
        size *= int(side)
    return Cell("×".join(str(side) for side in row["shape"]), size)


def _kept(row: Row) -> Cell:
    value = int(row["nonzeros"]) / max(int(row["nonzeros_before"]), 1)
    return Cell(part(value), value)


def _items(row: Row) -> Cell:
    kept, whole = number(row.get("kept_items")), number(row.get("all_items"))
    return Cell(f"{count(kept)} of {count(whole)}", kept)


def _neurons(row: Row) -> Cell:
    kept, before = number(row["neurons"]), number(row["before"][0])
    return Cell(f"{count(kept)} of {count(before)}", kept)


def _status(row: Row) -> Cell:
    good = {"solved", "refitted"} if "gap" in row else {"sampled", "largest kept", "inputs only", "kept whole"}
    status = str(row["status"])
    kind = "good" if status in good else "text" if status in ("no bound", *NEURONS) else "bad"
    return Cell(status, status, f"text {kind}")


Column = tuple[str, str, Callable[[Row], Cell]]

_FIRST: tuple[Column, ...] = (
    ("layer", "name of the module", _name),
    ("status", "how it ended", _status),
)
_SIZES: tuple[Column, ...] = (
    ("left", "weights left, of those before", _kept),
    ("weights", "that are not zero; biases are not counted", _number(count, "nonzeros")),
    ("before", "weights that were not zero", _number(count, "nonzeros_before")),
)
_LAST: tuple[Column, ...] = (
    ("time", "for the layer", _number(duration, "seconds")),
    ("shape", "of the weight as it is now; sorted by its size", _shape),
)
_NET_TRIM: tuple[Column, ...] = (
    *_FIRST,
    *_SIZES,
    ("error", "‖ŷ − Y‖/‖Y‖ of the layer on the calibration data", _number(figure, "output_error")),
    ("promised", "what the error is promised to be at most", _number(figure, "promised")),
    ("gap", "how far the ℓ1 norm may be above the least one, relative", _number(small, "gap")),
    (
        "violation",
        "how far the outputs are outside the promised set, relative to its radius",
        _number(small, "violation"),
    ),
    ("share of bound", "the layer's part of the bound on the network's error", _number(part, "share")),
    ("iterations", "of the solver", _number(count, "iterations")),
    *_LAST,
    ("asked", "eps, or a budget", _text("goal")),
    ("fit", "what was kept: the outputs behind a ReLU, or before whatever follows", _text("fit")),
    ("solver", "from the journal", _text("solver")),
)
_NEURONS: tuple[Column, ...] = (
    *_FIRST,
    ("neurons", "that are left", _neurons),
    *_SIZES,
    ("error", "‖ŷ − Y‖/‖Y‖ of the layer on the calibration data", _number(figure, "output_error")),
    *_LAST,
    ("fit", "what was kept: the outputs behind a ReLU, or before whatever follows", _text("fit")),
)
_CORESET: tuple[Column, ...] = (
    *_FIRST,
    ("of", "what was chosen from", _text("items")),
    ("kept", "items kept", _items),
    *_SIZES,
    ("error", "‖XÛ − XU‖/‖XU‖ on the calibration data", _number(figure, "output_error")),
    ("uniform", "the same error for uniform sampling at the same size", _number(figure, "uniform_error")),
    ("draws", "asked for", _number(count, "draws")),
    ("chosen", "how items were chosen", _text("sampling")),
    *_LAST,
)

_RETURNED: Column = ("came back", "weights that were zero before and are not any more", _number(count, "returned"))


def layer_table(saved: Saved) -> Table:
    """A row a pruned layer."""
    shares = _shares(saved.report.get("network") or {})
    solvers = {name: trace.solver for name, trace in saved.traces.items()}
    rows = [{**row, "solver": solvers.get(row["name"]), "share": shares.get(row["name"])} for row in saved.rows]
    neurons = any(row.get("neurons") is not None for row in rows)
    columns = _CORESET if saved.coreset else _NEURONS if neurons else _NET_TRIM
    returned = (_RETURNED,) if any(row.get("returned") for row in rows) else ()
    return _table("Pruned layers", (*columns, *returned), rows)


def _shares(network: Row) -> dict[str, float]:
    """Each layer's part c_l r_l of Σ c_l r_l."""
    radii = network.get("radii") or {}
    factors = {name: number(value) for name, value in (network.get("coefficients") or {}).items()}
    parts = {name: value * float(radii[name]) for name, value in factors.items() if value is not None and name in radii}
    total = sum(parts.values())
    return {name: value / total for name, value in parts.items()} if total else {}


def latency_table(saved: Saved) -> Table | None:
    """A row a layer whose products were timed."""
    told = (saved.extras.data.get("latency") if saved.extras else None) or {}
    rows = [{**row, "ratio": row["csr"] / row["dense"]} for row in told.get("layers", ()) if row["dense"]]
    return _table("Products of single layers", _LATENCY, rows) if rows else None


def _ratio(row: Row) -> Cell:
    ratio = float(row["ratio"])
    kind = "good" if ratio < 0.9 else ""
    return Cell(f"{ratio:.2f}×" + ("" if kind else ", no gain"), ratio, kind)


_LATENCY: tuple[Column, ...] = (
    ("layer", "name of the module", _name),
    ("density", "the part of the matrix that is not zero", _number(part, "density")),
    ("dense", "median of the dense product", _number(duration, "dense")),
    ("CSR", "median of the product with a CSR matrix", _number(duration, "csr")),
    ("CSR takes", "of the dense time; differences below a tenth count as none", _ratio),
)


def _table(caption: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    cells = [[make(row) for _, _, make in columns] for row in rows]
    return Table(caption, [(heading, meaning) for heading, meaning, _ in columns], cells)
