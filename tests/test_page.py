"""The page about a run: what the report says is on it, and nothing comes from elsewhere."""

import base64
import copy
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import prune_
from pages import charts, page_of, table, text_of
from torch import Tensor, nn

from convexprune.errors import DamagedFile
from convexprune.files.weights import save_json
from convexprune.page.extras import SIDE, picture, pooled, read_extras, save_extras
from convexprune.page.page import write_page
from convexprune.pruners.uniform import Uniform
from convexprune.report.report import Report
from convexprune.solvers.errors import InvalidInput, MissingExtra

NODE = shutil.which("node")


def mlp() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4))
    return model, torch.rand(90, 12)


Ran = tuple[Path, Report]


def ran(folder: Path, model: nn.Module, x: Tensor, **recipe: Any) -> Ran:
    """Prune, and leave in the folder what the command line leaves there."""
    dense, report = copy.deepcopy(model), prune_(model, x, **recipe)
    save_json(report.to_dict() | {"accuracy": {"before": 0.98, "after": 0.9}}, folder / "report.json")
    save_extras(folder, dense, model, x, report)
    return folder, report


RECIPES: dict[str, dict[str, Any]] = {
    "parallel": {"eps": 0.1, "tol": 1e-2},
    "cascade": {"eps": 0.15, "mode": "cascade", "tol": 1e-2},
    "budget": {"sparsity": 0.6, "search": "path", "tol": 1e-2},
    "network": {"network_eps": 0.5, "guarantee": "bound", "objective": "nonzeros", "tol": 1e-2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    place = tmp_path_factory.mktemp("runs")
    found = {}
    for name, recipe in RECIPES.items():
        model, x = mlp()
        model = model if name != "network" else model[:5]  # no bound behind a LayerNorm
        found[name] = ran(place / name, model, x, run=place / name, **recipe)
    model, x = mlp()
    found["coreset"] = ran(place / "coreset", model[:5], x, target="neurons 0.5", method=Uniform("neurons"))
    return found


@pytest.fixture(scope="module")
def pages(runs: dict[str, Ran], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: page_of(folder, tmp_path_factory.mktemp("pages")) for name, (folder, _) in runs.items()}


@pytest.mark.parametrize("name", [*RECIPES, "coreset"])
def test_every_layer_has_a_row_with_the_figures_of_the_report(
    runs: dict[str, Ran], pages: dict[str, str], name: str
) -> None:
    html, report = pages[name], runs[name][1]
    rows = table(html, "Pruned layers")
    assert list(rows) == [row.name for row in report.layers]
    for row in report.layers:
        cells = rows[row.name]
        assert (cells["nonzeros"], cells["kept"], cells["status"]) == (f"{row.nonzeros:,}", row.kept, row.status)
        assert cells["error"] in (f"{row.output_error:.4f}", "–")
        assert "promised" not in cells or float(cells["promised"]) == pytest.approx(row.promised, rel=1e-3)
        assert f"--bar: {row.kept}" in html
    text = text_of(html)
    assert f"{report.nonzeros / report.nonzeros_before:.1%} of the weights left {report.verdict}" in text
    assert f"{report.nonzeros:,} of {report.nonzeros_before:,} left" in text
    assert "90.00% (98.00% before, -8.00 points)" in text
    for line in (*report.head, *(module.reason for module in report.skipped)):
        assert line[1:] in text


def test_the_head_says_what_was_asked_and_the_network_keeps(runs: dict[str, Ran], pages: dict[str, str]) -> None:
    text = {name: text_of(html) for name, html in pages.items()}
    assert "Wanted eps 0.1; " in text["parallel"]
    assert "sparsity 0.6; " in text["budget"]
    assert "neurons 0.5; method uniform; " in text["coreset"]
    assert str(runs["network"][1].network) in text["network"]


def test_exceptions_are_named(runs: dict[str, Ran], tmp_path: Path) -> None:
    report = runs["parallel"][1]
    layers = [report.layers[0], replace(report.layers[1], status="iteration limit"), *report.layers[2:]]
    stopped = {**report.provenance, "stopped": "time_limit of 3 s"}
    save_json(replace(report, layers=tuple(layers), provenance=stopped).to_dict(), tmp_path / "report.json")
    html = page_of(tmp_path, tmp_path)
    assert "Not certified: 2 (iteration limit). The iterations ran out" in text_of(html)
    assert "not finished (time_limit of 3 s)" in html
    assert '<td class="bad">iteration limit</td>' in html


def test_charts_are_there_for_what_the_journal_holds(pages: dict[str, str]) -> None:
    traces = [f"Convergence of {name}" for name in "024"]
    assert {name: charts(html) for name, html in pages.items()} == {
        "parallel": traces,
        "cascade": traces,
        "network": ["Measured paths", *traces],
        "budget": traces,  # of the ℓ1 programs whose supports it took
        "coreset": [],
    }
    assert "the folder has no journal" in pages["coreset"]


@pytest.mark.parametrize("name", ["network", "coreset"])
def test_nothing_is_loaded_from_anywhere(pages: dict[str, str], name: str) -> None:
    html = pages[name]
    head, script = html.split("<script>")
    given = re.findall(r'\b(?:src|href|srcset|action|data|poster|background)="([^"]*)"', head)
    assert given
    assert not [value for value in given if not re.match(r"data:image/(png|svg\+xml);base64,", value)]
    assert not re.search(r"@import|https?:|url\((?!#)|//\w", re.sub(r"base64,[\w+/=]+", "", head))
    for chart in (base64.b64decode(value.partition(",")[2]).decode() for value in given if "svg+xml" in value):
        assert not re.findall(r'href="(?!#)|<(?:script|image|style>@import)|url\((?!#)', chart)
    digest = base64.b64encode(hashlib.sha256(script.split("</script>")[0].encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f'http-equiv="Content-Security-Policy" content="{policy}' in html


def test_a_layer_may_have_any_name(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", '" onload="x', "$\\frac$ & 层", "{{ 1 + 1 }}"]
    model, x = nn.Sequential(), torch.rand(40, 5)
    torch.manual_seed(0)
    for name in names:
        model.add_module(name, nn.Linear(5, 5))
    ran(tmp_path, model, x, eps=0.2, run=tmp_path)
    html = page_of(tmp_path, tmp_path)
    assert list(table(html, "Pruned layers")) == names
    assert html.count("<script>") == 1
    assert 'onload="' not in html
    assert charts(html) == [f"Convergence of {name}" for name in names]


def test_what_sparsity_buys_is_said_plainly(pages: dict[str, str]) -> None:
    rows = table(pages["parallel"], "Costs before and after")
    assert rows["Weights, dense"]["change"] == rows["FLOPs, dense kernels"]["change"] == "no change"
    assert rows["FLOPs, zeros skipped"]["change"].startswith("-")
    # With as many operations as before a shorter time is luck, and never called a gain.
    assert rows["Forward, dense kernels"]["change"] == "no gain"
    gone = table(pages["coreset"], "Costs before and after")
    assert gone["Weights, dense"]["change"].startswith("-")
    assert gone["FLOPs, dense kernels"]["change"].startswith("-")


def test_guarantees_of_coresets_are_told_with_what_they_rest_on(tmp_path: Path) -> None:
    model, x = mlp()
    report = prune_(model[:5], x, "guarantee 0.9 delta=0.1", method="lowner")
    save_json(report.to_dict(), tmp_path / "report.json")
    text = text_of(page_of(tmp_path, tmp_path))
    given = [row for row in report.layers if row.guarantee]
    assert given
    assert "Nothing was pruned" in text  # too few points for this method
    for row in given:
        for told in (f"eps = 0.9, delta = 0.1: {row.promise}", *(assumption.text for assumption in row.assumptions)):
            assert text.count(f"{row.name} : {told}") == 1


def test_of_large_runs_and_reports_alone_the_page_says_what_it_leaves_out(
    runs: dict[str, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_json(json.loads(runs["parallel"][1].to_json()), tmp_path / "report.json")
    html = page_of(tmp_path, tmp_path)
    for text in ("no labelled samples were given", "no extras.json", "no convergence traces", "no paths were measured"):
        assert text in html
    for name in ("MOST_TRACES", "MOST_MAPS", "MOST_PATHS"):
        monkeypatch.setattr(f"convexprune.page.page.{name}", 1)
    html = page_of(runs["network"][0], tmp_path)
    assert (len(charts(html)), html.count("<img")) == (2, 4)
    for what in ("traces", "weight maps", "measured paths"):
        assert f"{what} of 2 of 3 layers; shown are the largest" in html


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
    shutil.copytree(runs["parallel"][0], folder)
    (folder / file).write_bytes(content)
    with pytest.raises(DamagedFile, match=re.escape(file)):
        write_page(folder, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_what_is_not_installed_is_named(
    runs: dict[str, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf'{package}.*pip install "convexprune\[report\]"'):
        write_page(runs["parallel"][0], tmp_path / "page.html")


def test_extras_leave_the_model_alone_and_refuse_its_own_tensors(tmp_path: Path) -> None:
    model, x = mlp()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight[:, 3] = 0
    now = copy.deepcopy(model.state_dict())
    save_extras(tmp_path, dense, model, x)
    assert all(torch.equal(now[name], tensor) for name, tensor in model.state_dict().items())
    found = read_extras(tmp_path)
    assert found is not None
    extras, maps = found
    assert [row["name"] for row in extras["maps"]] == ["0.weight"]  # the others are as they were
    assert bool((maps["after.0"][:, 3] == 0).all())
    assert bool((maps["before.0"] > 0).all())
    with pytest.raises(InvalidInput, match="the model's own tensor"):
        save_extras(tmp_path, model.state_dict(), model)
    with pytest.raises(InvalidInput, match=r"the model has no 'fc\.weight'"):
        save_extras(tmp_path, {"fc.weight": torch.ones(2, 2)}, model)


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (SIDE, SIDE + 1), (3 * SIDE, 2 * SIDE - 1)])
def test_a_cell_is_empty_only_where_all_its_weights_are_zero(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = 1e-3 * torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) >= 0.3] = 0
    steps, (height, width) = pooled(weight, float(weight.abs().max()))
    assert max(steps.shape) <= SIDE
    assert steps.shape == (-(-rows // height), -(-columns // width))
    grown = steps.double().repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    assert (255 * weight.abs() / weight.abs().max() <= grown + 1.01).all()
    assert ((grown > 0) | (weight == 0)).all()
    assert (steps == 0)[0, 0] == (weight[:height, :width] == 0).all()


def test_a_picture_is_white_only_where_a_step_is_zero() -> None:
    from PIL import Image

    steps = torch.arange(12, dtype=torch.uint8).reshape(3, 4) * 20
    png = base64.b64decode(picture(steps).partition(",")[2])
    shades = torch.tensor(list(Image.open(io.BytesIO(png)).convert("L").tobytes())).reshape(3, 4)
    assert ((shades == 255) == (steps == 0)).all()
    assert (shades.flatten().diff() < 0).all()
    assert shades.max() == 255


@pytest.mark.skipif(NODE is None, reason="needs node to run the page's script")
def test_headings_sort_figures_as_numbers_names_as_texts_and_what_is_missing_last(pages: dict[str, str]) -> None:
    own = pages["coreset"].split("<script>")[1].split("for (const table")[0]
    lists = [
        ["fc10", "–", "fc9", "fc1"],
        ["900", "10,000", "85", "–"],
        ["1.2e-05", "0.2", "–"],
        ["10 of 12", "9 of 12"],
    ]
    script = f"{own}console.log(JSON.stringify({json.dumps(lists)}.map((l) => [1, -1].map((s) => "
    script += "[...l].sort((a, b) => compared(a, b, s))))))"
    done = subprocess.run([str(NODE), "-e", script], capture_output=True, text=True, check=True)  # noqa: S603
    ascending, descending = zip(*json.loads(done.stdout), strict=True)
    assert ascending[0] == ["fc1", "fc9", "fc10", "–"]
    assert ascending[1] == ["85", "900", "10,000", "–"]
    assert ascending[2][:2] == ["1.2e-05", "0.2"]
    assert ascending[3] == ["9 of 12", "10 of 12"]
    assert descending[:2] == (["fc10", "fc9", "fc1", "–"], ["10,000", "900", "85", "–"])
