"""The page about a run: what the report says is on it, and nothing comes from elsewhere."""

import base64
import copy
import hashlib
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from convexprune import prune_
from convexprune.coresets import Guarantee, coreset_prune_
from convexprune.errors import DamagedFile
from convexprune.files.weights import save_json
from convexprune.report.page import sections
from convexprune.report.page.extras import read_extras, save_extras
from convexprune.report.page.maps import SIDE, picture, pooled
from convexprune.report.page.numerals import change, data, duration, number, part, small
from convexprune.report.page.saved import Trace, read_saved
from convexprune.report.page.words import _network
from convexprune.report.page.write import write_page
from convexprune.report.report import Report, SkippedModule
from convexprune.solvers.errors import InvalidInput, MissingExtra

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def mlp() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4))
    return model, torch.rand(90, 12)


@dataclass(frozen=True)
class Ran:
    folder: Path
    report: Report


def ran(folder: Path, prune: Callable[..., Report], model: nn.Module, x: Tensor, **recipe: Any) -> Ran:
    """Prune, and leave in the folder what the command line leaves there."""
    dense = copy.deepcopy(model)
    report = prune(model, x, **recipe)
    save_json(report.to_dict() | {"accuracy": {"before": 0.98, "after": 0.9}}, folder / "report.json")
    save_extras(folder, dense, model, x, report)
    return Ran(folder, report)


RECIPES: dict[str, dict[str, Any]] = {
    "parallel": {"eps": 0.1, "tol": 1e-2},
    "cascade": {"eps": 0.15, "mode": "cascade", "tol": 1e-2},
    "budget": {"sparsity": 0.6, "search": "path"},
    "network": {"network_eps": 0.5, "guarantee": "bound", "objective": "nonzeros"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    place = tmp_path_factory.mktemp("runs")
    found = {}
    for name, recipe in RECIPES.items():
        model, x = mlp()
        model = model if name != "network" else model[:5]  # no bound behind a LayerNorm
        found[name] = ran(place / name, prune_, model, x, run=place / name, **recipe)
    model, x = mlp()
    found["coreset"] = ran(place / "coreset", coreset_prune_, model[:5], x, method="uniform", size=0.5)
    return found


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """Elements in their order, each with all the text below it."""

    elements: list[Element] = field(default_factory=list)

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.elements, self._open = html, [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in ("meta", "img"):
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag, "elements are nested"

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]

    @property
    def text(self) -> str:
        return " ".join(self.all("main")[0].text.replace("\u00a0", " ").split())

    def rows(self, heading: str) -> dict[str, dict[str, Element]]:
        """Of the sortable table with that caption: by the first cell, by heading."""
        start = next(
            i for i, e in enumerate(self.elements) if e.tag == "div" and e.attributes.get("aria-label") == heading
        )
        cells = []
        for element in self.elements[start + 1 :]:
            if element.tag == "div":
                break
            if element.tag in ("th", "td"):
                cells.append(element)
        headings = [cell.text.strip() for cell in cells if cell.attributes.get("scope") == "col"]
        body = [cells[i : i + len(headings)] for i in range(len(headings), len(cells), len(headings))]
        return {row[0].text: dict(zip(headings, row, strict=True)) for row in body}


def page_of(folder: Path, tmp_path: Path) -> Page:
    return Page(write_page(folder, tmp_path / "page.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pages(runs: dict[str, Ran], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    return {name: page_of(run.folder, tmp_path_factory.mktemp("pages")) for name, run in runs.items()}


@pytest.mark.parametrize("name", [*RECIPES, "coreset"])
def test_every_layer_has_a_row_with_the_figures_of_the_report(
    runs: dict[str, Ran], pages: dict[str, Page], name: str
) -> None:
    page, report = pages[name], runs[name].report
    rows = page.rows("Pruned layers")
    assert list(rows) == [row.name for row in report.layers]
    for row in report.layers:
        cells = rows[row.name]
        assert float(cells["weights"].attributes["data-value"]) == row.nonzeros
        assert cells["weights"].text == f"{row.nonzeros:,}"
        if math.isnan(row.output_error):
            assert cells["error"].text == "–"
        else:
            assert float(cells["error"].attributes["data-value"]) == pytest.approx(row.output_error)
        assert cells["status"].text == row.status
    share = f"{100 * report.nonzeros / report.nonzeros_before:.1f} %"
    assert f"{share} of the weights left" in page.text
    assert f"{report.nonzeros:,} of {report.nonzeros_before:,} in the pruned layers" in page.text
    assert f"Network error{report.output_error:.4f}" in page.text
    assert "90.00 %98.00 % before, −8.00 points" in page.text
    for module in report.skipped:
        assert module.reason in page.text


def test_the_summary_says_what_was_asked_and_what_is_certified(runs: dict[str, Ran], pages: dict[str, Page]) -> None:
    told = {name: page.text for name, page in pages.items()}
    assert "within 0.1 of what they were" in told["parallel"]
    assert "in the original network" in told["parallel"]
    assert "All 3 layers: certified." in told["parallel"]
    largest = max(row.gap for row in runs["parallel"].report.layers)  # type: ignore[attr-defined]
    assert f"smaller by more than {100 * largest:.2f} %" in told["parallel"]
    assert "the network pruned so far" in told["cascade"]
    assert "60 % of the weights of each layer" in told["budget"]
    assert "nothing is proven of how near" in told["budget"]
    assert "measured, not certified" in told["budget"]
    bound = runs["network"].report.to_dict()["network"]["bound"]
    assert f"miss by at most {bound:.4f}, relative to their norm, within the 0.5 asked for" in told["network"]
    assert f"at most {bound:.4f}, proven" in told["network"]
    assert "A coreset of each layer by the method “uniform”, of size 0.5" in told["coreset"]
    assert "nothing is promised" in told["coreset"]


def test_exceptions_are_named(runs: dict[str, Ran], tmp_path: Path) -> None:
    report, reason = runs["parallel"].report, "time_limit of 3 s"
    layers = [*report.layers]
    layers[1] = replace(layers[1], status="iteration limit")
    left = SkippedModule("9", "Linear", f"not reached: {reason}")
    stopped = replace(
        report,
        layers=tuple(layers),
        skipped=(*report.skipped, left),
        provenance={**report.provenance, "stopped": reason},
    )
    save_json(stopped.to_dict(), tmp_path / "report.json")
    page = page_of(tmp_path, tmp_path)
    assert "0, 4: certified." in page.text
    assert "Not certified: 2 (iteration limit). The iterations ran out" in page.text
    assert "The run ended early (time_limit of 3 s): 9 stay as they were." in page.text
    assert "with exceptions" in page.text


def test_charts_are_there_for_what_the_journal_holds(pages: dict[str, Page]) -> None:
    labels = {name: [svg.attributes["aria-label"] for svg in page.all("svg")] for name, page in pages.items()}
    bars = ["Weights left by layer", "Output error by layer"]
    traces = [f"Convergence of {name}" for name in "024"]
    assert labels["parallel"] == labels["cascade"] == bars + traces
    assert labels["network"] == [*bars, "Measured paths", *traces]
    assert labels["budget"] == bars + traces  # of the ℓ1 programs whose supports it took
    assert labels["coreset"] == bars
    assert "the folder has no journal" in pages["coreset"].text


def test_a_bar_is_as_long_as_the_layer_is_dense(runs: dict[str, Ran], pages: dict[str, Page]) -> None:
    svg = pages["coreset"].html.split("Weights left by layer")[1].split("</svg>")[0]
    lengths = []
    for path in re.findall(r'd="M ([^"]+)" [^>]*style="fill: var\(--one\)', svg):
        abscissas = [float(x) for x in re.findall(r"(-?[\d.]+) -?[\d.]+", path)]
        lengths.append(max(abscissas) - min(abscissas))
    kept = [row.nonzeros / row.nonzeros_before for row in runs["coreset"].report.layers]
    assert [length / lengths[0] for length in lengths] == pytest.approx([part / kept[0] for part in kept], rel=1e-3)


def test_the_same_folder_gives_the_same_page(runs: dict[str, Ran], pages: dict[str, Page]) -> None:
    folder = runs["network"].folder
    assert write_page(folder) == folder / "report.html"
    assert (folder / "report.html").read_text(encoding="utf-8") == pages["network"].html


@pytest.mark.parametrize("name", ["network", "coreset"])
def test_nothing_is_loaded_from_anywhere(pages: dict[str, Page], name: str) -> None:
    page = pages[name]
    given = [
        value
        for element in page.elements
        for key, value in element.attributes.items()
        if key.split(":")[-1] in ("src", "href", "srcset", "action", "data", "poster", "background")
    ]
    assert given
    assert not [value for value in given if not value.startswith(("#", "data:image/png;base64,"))]
    assert not re.search(
        r"@import|https?:|url\((?!#)|//\w", re.sub(r"base64,[\w+/=]+", "", page.html.split("<script>")[0])
    )
    ids = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in given if value[0] == "#"} <= set(ids)
    policy = next(e for e in page.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.all("script")[0].text.encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        in (policy.attributes["content"])
    )


def test_a_layer_may_have_any_name(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", '" onload="x', "$\\frac$ & 层"]
    model, x = nn.Sequential(), torch.rand(40, 5)
    torch.manual_seed(0)
    for name in names:
        model.add_module(name, nn.Linear(5, 5))
    ran(tmp_path, prune_, model, x, eps=0.2, run=tmp_path)
    page = page_of(tmp_path, tmp_path)
    assert list(page.rows("Pruned layers")) == names
    assert len(page.all("script")) == 1
    assert "alert" not in page.all("script")[0].text
    assert not [element for element in page.elements if "onload" in element.attributes]
    assert {svg.attributes["aria-label"] for svg in page.all("svg")} >= {f"Convergence of {name}" for name in names}


def test_what_sparsity_buys_is_said_plainly(runs: dict[str, Ran], pages: dict[str, Page]) -> None:
    for name in ("parallel", "coreset"):
        extras = read_extras(runs[name].folder)
        assert extras is not None
        before, after = (extras.data["storage"][when] for when in ("before", "after"))
        assert before["nonzeros"] == runs[name].report.nonzeros_before
        rows = pages[name].rows("What it buys")
        assert rows["All weights, dense"]["change"].text == change(before["dense"], after["dense"])
        skipped = extras.data["flops"]["after"]["remaining"] / extras.data["flops"]["before"]["remaining"] - 1
        assert f"−{-100 * skipped:.0f}" in rows["FLOPs, batch of 90, zeros skipped"]["change"].text
    rows = pages["parallel"].rows("What it buys")
    assert rows["All weights, dense"]["change"].text == "no change"
    assert rows["FLOPs, batch of 90, dense kernels"]["change"].text == "no change"
    # With as many operations as before a shorter time is luck, and never called a gain.
    assert rows["Forward, dense kernels, batch of 90"]["change"].text == "no gain"
    gone = pages["coreset"].rows("What it buys")
    assert gone["All weights, dense"]["change"].text.startswith("−")
    assert gone["FLOPs, batch of 90, dense kernels"]["change"].text.startswith("−")


def test_guarantees_of_coresets_are_told_with_what_they_rest_on(tmp_path: Path) -> None:
    model, x = mlp()
    report = coreset_prune_(model[:5], x, "lowner", Guarantee(0.9, 0.1))
    save_json(report.to_dict(), tmp_path / "report.json")
    page = page_of(tmp_path, tmp_path)
    given = [row for row in report.layers if row.guarantee]  # type: ignore[attr-defined]
    assert given
    assert all(row.nonzeros == row.nonzeros_before for row in report.layers)  # too few points for this method
    assert "Nothing was pruned" in page.text
    assert "at eps 0.9, each of 8 outputs within" in page.text
    assert "a size was asked for" not in page.text
    for row in given:
        assert row.promise in page.text  # type: ignore[attr-defined]
        for assumption in row.assumptions:  # type: ignore[attr-defined]
            assert f"{row.name}: {assumption.text}" in page.text


def test_a_report_alone_is_enough(runs: dict[str, Ran], tmp_path: Path) -> None:
    save_json(json.loads(runs["parallel"].report.to_json()), tmp_path / "report.json")
    page = page_of(tmp_path, tmp_path)
    assert len(page.rows("Pruned layers")) == 3
    assert "no labelled samples were given" in page.text
    assert "no extras.json" in page.text
    assert "no convergence traces" in page.text


def test_of_large_runs_the_page_says_what_it_leaves_out(
    runs: dict[str, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = runs["parallel"].report
    layers = [replace(report.layers[0], name=f"block.{i}", nonzeros_before=1000 - i) for i in range(100)]
    save_json(replace(report, layers=tuple(layers)).to_dict(), tmp_path / "report.json")
    page = page_of(tmp_path, tmp_path)
    assert len(page.rows("Pruned layers")) == 100
    assert "bars of 40 of 100 layers; shown are the layers with most weights" in page.text
    assert len(page.html) < 500_000

    monkeypatch.setattr(sections, "MOST_TRACES", 2)
    points = tuple((i, i / 10, 0.5**i, 0.1**i) for i in range(1000))
    drawn = {f"block.{i}": Trace(f"block.{i}", 0, 1, "admm", 1e-3, 1e-4, points[: 400 + i]) for i in range(3)}
    drawn["block.9"] = Trace("block.9", 0, 1, "continuation", None, None, ((300, 1.0, None, 0.0),))
    left_out: list[str] = []
    charts = sections.traces(replace(read_saved(tmp_path), traces=drawn), left_out)
    assert [chart.title for chart in charts] == ["block.1", "block.2"]
    assert left_out == [
        "convergence traces of 1 of 3 layers; shown are the layers that took longest",
        "convergence traces of 1 layer: a budget has no gap to trace",
    ]
    assert all(len(chart.svg) < 60_000 for chart in charts)


def test_without_a_report_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no report\.json in it"):
        write_page(tmp_path)
    with pytest.raises(InvalidInput, match="no such folder"):
        write_page(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("report.json", b'{"layers": ['),
        ("report.json", b"[]"),
        ("report.json", b'{"layers": [{"name": "0"}], "skipped": [], "provenance": {}}'),
        ("report.json", b'{"layers": [], "skipped": [{"name": "0"}], "provenance": {}}'),
        ("extras.json", b'{"format": 1}'),
        ("extras.json", b'{"format": 2}'),
        ("maps.safetensors", b"other"),
        ("run.json", b"{"),
    ],
)
def test_damaged_files_are_named(runs: dict[str, Ran], tmp_path: Path, file: str, content: bytes) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs["parallel"].folder, folder)
    (folder / file).write_bytes(content)
    with pytest.raises(DamagedFile, match=re.escape(file)):
        write_page(folder, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_changed_journal_entry_is_no_source(runs: dict[str, Ran], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs["parallel"].folder, folder)
    next((folder / "layers").glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(DamagedFile):
        write_page(folder)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_what_is_not_installed_is_named(
    runs: dict[str, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf'{package}.*pip install "convexprune\[report\]"'):
        write_page(runs["parallel"].folder, tmp_path / "page.html")


def test_extras_leave_the_model_alone_and_refuse_its_own_tensors(tmp_path: Path) -> None:
    model, x = mlp()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight[:, 3] = 0
    now = copy.deepcopy(model.state_dict())
    save_extras(tmp_path, dense, model, x)
    assert all(torch.equal(now[name], tensor) for name, tensor in model.state_dict().items())
    extras = read_extras(tmp_path)
    assert extras is not None
    assert [row["name"] for row in extras.data["maps"]] == ["0.weight"]  # the others are as they were
    assert bool((extras.maps["after.0"][:, 3] == 0).all())
    assert bool((extras.maps["before.0"] > 0).all())
    with pytest.raises(InvalidInput, match="the model's own tensor"):
        save_extras(tmp_path, model.state_dict(), model)
    with pytest.raises(InvalidInput, match=r"the model has no 'fc\.weight'"):
        save_extras(tmp_path, {"fc.weight": torch.ones(2, 2)}, model)


@given(st.integers(1, 3 * SIDE), st.integers(1, 3 * SIDE), st.floats(0, 1), st.floats(1e-6, 1e6), st.integers(0, 2**31))
def test_a_cell_is_empty_only_where_all_its_weights_are_zero(
    rows: int, columns: int, density: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) >= density] = 0
    peak = float(weight.abs().max())
    steps, (height, width) = pooled(weight, peak)
    assert max(steps.shape) <= SIDE
    assert steps.shape == (-(-rows // height), -(-columns // width))
    for i, j in ((0, 0), (steps.shape[0] - 1, steps.shape[1] - 1), (steps.shape[0] // 2, 0)):
        block = weight[i * height : (i + 1) * height, j * width : (j + 1) * width].abs()
        assert bool(steps[i, j] == 0) == bool((block == 0).all())
        if peak:
            assert abs(float(steps[i, j]) - 255 * float(block.max()) / peak) <= 1.01
    assert int(steps.max()) == (255 if peak else 0)


def test_a_picture_is_a_png_of_the_steps() -> None:
    steps = torch.arange(12, dtype=torch.uint8).reshape(3, 4) * 20
    png = base64.b64decode(picture(steps).partition(",")[2])
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        body = png[place + 4 : place + 8 + size]
        assert zlib.crc32(body) == struct.unpack(">I", png[place + 8 + size : place + 12 + size])[0]
        chunks[body[:4]] = body[4:]
        place += 12 + size
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (4, 3)
    lines = zlib.decompress(chunks[b"IDAT"])
    assert [list(lines[5 * i + 1 : 5 * i + 5]) for i in range(3)] == steps.tolist()
    alphas = list(chunks[b"tRNS"])
    assert alphas[0] == 0
    assert alphas == sorted(alphas)
    assert (alphas[1], alphas[255]) == (53, 255)


def test_numbers_are_written_as_people_read_them() -> None:
    assert [data(999), data(1e6), data(509_300), data(None)] == ["999\u00a0B", "1.00\u00a0MB", "509\u00a0kB", "–"]
    assert [duration(0.00179), duration(4000.0), duration(2e-6)] == ["1.79\u00a0ms", "4,000\u00a0s", "2.00\u00a0µs"]
    assert [small(0.0), small(8.7e-4), part(0.238), part(None)] == ["0", "8.7e-4", "23.8\u00a0%", "–"]
    assert [change(100, 48), change(100, 100.2), change(100, 95, 0.1), change(None, 1)] == [
        "−52\u00a0%",
        "no change",
        "no change",
        "–",
    ]
    assert [number("inf"), number("nan"), number(None), number("2"), number(True)] == [None, None, None, 2.0, None]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to run the page's script")
def test_headings_sort_the_table_in_a_browser_and_nothing_is_complained_about(
    runs: dict[str, Ran], tmp_path: Path
) -> None:
    script = """
    const table = document.querySelector("div[aria-label='Pruned layers'] table");
    const found = {};
    for (const name of ["layer", "weights", "promised"]) {
      const heading = [...table.tHead.rows[0].cells].find((cell) => cell.textContent === name);
      for (const turn of ["ascending", "descending"]) {
        heading.querySelector("button").click();
        found[`${name} ${turn}`] = [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
        if (heading.getAttribute("aria-sort") !== turn) throw new Error(turn);
      }
    }
    document.title = JSON.stringify(found);
    """
    folder = tmp_path / "run"
    folder.mkdir()
    report = runs["parallel"].report
    figures = {"fc10": (900, 0.2), "fc9": (10_000, math.inf), "fc1": (85, 1e-5)}
    layers = [
        replace(report.layers[0], name=name, nonzeros=left, promised=promised)  # type: ignore[call-arg]
        for name, (left, promised) in figures.items()
    ]
    save_json(replace(report, layers=tuple(layers)).to_dict(), folder / "report.json")
    html = write_page(folder).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = html.replace("script-src ", f"script-src 'sha256-{digest}' ").replace(
        "</body>", f"<script>{script}</script></body>"
    )
    (folder / "test.html").write_text(allowed, encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/own",
    ]
    command = [str(CHROMIUM), *options, "--virtual-time-budget=2000", "--dump-dom", (folder / "test.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)  # noqa: S603
    assert "CONSOLE" not in done.stderr
    assert json.loads(Page(done.stdout).all("title")[0].text) == {
        "layer ascending": ["fc1", "fc9", "fc10"],
        "layer descending": ["fc10", "fc9", "fc1"],
        "weights ascending": ["fc1", "fc10", "fc9"],
        "weights descending": ["fc9", "fc10", "fc1"],
        "promised ascending": ["fc1", "fc10", "fc9"],
        "promised descending": ["fc10", "fc1", "fc9"],
    }


@pytest.mark.parametrize(
    ("told", "kind", "says"),
    [
        (
            {"bound": 689.0, "error": 0.29, "asked": 0.3, "guarantee": "measured", "vacuous": True},
            "good",
            "miss by 0.2900, relative to their norm, within the 0.3 asked for. By its layers' errors and norms its "
            "outputs miss by at most 689.0000, relative to their norm, which is vacuous: far above what is measured.",
        ),
        (
            {"bound": None, "error": 0.29, "holdout_error": 0.4, "asked": 0.3, "guarantee": "measured", "reason": "…"},
            "bad",
            "and by 0.4000 on data held out, more than the 0.3 asked for. No bound on its error is known, as ….",
        ),
        ({"bound": 0.5, "error": 0.2, "asked": None, "guarantee": "measured"}, "note", "norm. By its layers"),
        ({"bound": 0.5, "error": 0.2, "asked": 0.4, "guarantee": "bound"}, "bad", "at most 0.5000, relative to their"),
    ],
)
def test_the_page_says_what_of_the_network_is_guaranteed(told: dict[str, Any], kind: str, says: str) -> None:
    (finding,) = _network(told)
    assert finding.kind == kind
    assert says in finding.text
