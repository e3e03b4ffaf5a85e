"""What an evaluation in a run's folder adds to its page."""

import base64
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from pages import charts, page_of, table, text_of
from torch import nn

from convexprune import Sparsity, prune_
from convexprune.errors import DamagedFile
from convexprune.evaluation import CORRUPTIONS, Corruption, Evaluation, Noise, Series, evaluate, evaluate_series
from convexprune.files.weights import save_json
from convexprune.page.page import write_page


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That of a run."""
    report = prune_(classifier(1), target=Sparsity(0.5), method="magnitude")
    save_json(report.to_dict(), tmp_path / "report.json")
    return tmp_path


def classifier(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 81, 4))


def evaluation(kind: type[Evaluation] | type[Series], names: tuple[str, ...], *, labels: bool = True) -> Any:
    """Of random networks on random images, with a parent, a control, corruptions and noise."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(20, 3, 9, 9, generator=generator), torch.randint(3, (20,), generator=generator)
    own: dict[str, Any] = {"corruptions": names, "noise": Noise((0.0, 0.3), 10, 2), "control": classifier(9)}
    own |= {"parent": classifier(0)}
    data = (x, y) if labels else x
    if kind is Evaluation:
        return evaluate(classifier(1), data, **own)
    return evaluate_series([classifier(1), classifier(2)], data, ratios=(0.5, 0.25), name="method", **own)


OF_ONE = ["Scores by distribution", "Accuracy by class", "Likeness under noise"]
OF_SERIES = ["Scores against the ratio", "Prune potential", "Prune potential under noise", "Likeness under noise"]


def page_with(found: Any, folder: Path) -> str:
    found.save(folder / "evaluation.json")
    return page_of(folder, folder)


@pytest.mark.parametrize(("kind", "wanted"), [(Evaluation, OF_ONE), (Series, OF_SERIES)])
def test_an_evaluation_is_shown_with_a_table_and_charts(
    kind: type[Evaluation] | type[Series], wanted: list[str], folder: Path
) -> None:
    found = evaluation(kind, ("brightness", "saturate"))
    html = page_with(found, folder)
    assert charts(html) == wanted
    section = html.split("<h2>Beyond accuracy</h2>")[1].split("<h2>")[0]
    assert "Evaluated on 20 samples" in section
    rows = table(html, "Evaluation")
    if isinstance(found, Series):
        assert list(rows) == ["parent", "0.500", "0.250", "control"]
        assert rows["0.250"]["score"] == f"{found.evaluations[1].nominal.score:.1%}"
        assert rows["0.500"]["worst"] in ("brightness 3", "saturate 3")
        assert f"prune potential: mean {found.prune_potential().average}" in text_of(section)
    else:
        assert list(rows) == ["nominal", "brightness 3", "saturate 3", "noise ≤ 0", "noise ≤ 0.3"]
        assert rows["saturate 3"]["agreement"] == f"{found.rows[2].agreement:.1%}"
        assert rows["nominal"]["of parent"] == f"{found.parent.nominal.score:.1%}"
    for notice in (found.parent if isinstance(found, Series) else found).notices:
        assert notice in text_of(section)
    assert "class 3 has no sample" in text_of(section)
    assert "Not checked: the evaluation is as recorded" in text_of(html)
    assert page_with(found, folder) == html


def test_without_an_evaluation_nothing_is_said_of_one(folder: Path) -> None:
    assert "Beyond accuracy" not in page_of(folder, folder)


def test_without_labels_likeness_alone_is_shown(folder: Path) -> None:
    for kind in (Evaluation, Series):
        html = page_with(evaluation(kind, ("brightness",), labels=False), folder)
        assert charts(html) == ["Likeness under noise"]
    assert "there were no labels" in html


def test_of_many_classes_those_that_lost_most_are_shown(folder: Path) -> None:
    right = torch.eye(30)
    pruned, parent = nn.Linear(30, 30, bias=False), nn.Linear(30, 30, bias=False)
    parent.weight.data, pruned.weight.data = right.clone(), right.clone()
    pruned.weight.data[7:9, 7:9] = 1 - torch.eye(2)  # takes two classes for each other
    found = evaluate(pruned, (right, torch.arange(30)), parent=parent)
    html = page_with(found, folder)
    assert "Of 30 classes those that lost most." in html
    drawn = re.search(r'src="data:image/svg\+xml;base64,([^"]*)" alt="Accuracy by class"', html)
    assert drawn is not None
    shown = re.findall(r">class (\d+)<", base64.b64decode(drawn[1]).decode())
    assert len(shown) == 20
    assert {"7", "8"} <= set(shown)


@pytest.mark.parametrize("kind", [Evaluation, Series])
def test_names_in_an_evaluation_are_shown_as_they_are(
    kind: type[Evaluation] | type[Series], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "<script>alert(1)</script>[/red] $\\frac$ {{ 1 }} & 层"
    own = Corruption(name, "<b>bold</b>", (1, 1, 0.2), lambda x, part, _: x * part)  # type: ignore[arg-type]
    monkeypatch.setitem(CORRUPTIONS, name, own)
    monkeypatch.setenv("COLUMNS", "200")
    found = evaluation(kind, (name,))
    notices = ("<i>left out</i>",)
    if isinstance(found, Series):
        found = replace(found, name=name, parent=replace(found.parent, notices=notices))
    else:
        found = replace(found, notices=notices)
    assert name in str(found)
    html = page_with(found, folder)
    assert html.count("<script>") == 1
    assert not re.search("<b>bold|<i>left", html)
    assert "<li>&lt;i&gt;left out&lt;/i&gt;</li>" in html
    cells = [cell for title, row in table(html, "Evaluation").items() for cell in (title, *row.values())]
    assert f"{name} 3" in cells
    for chart in re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', html):
        ElementTree.fromstring(base64.b64decode(chart))  # noqa: S314 - of our own making


@pytest.mark.parametrize("how", ["cut", "changed", "of another kind", "no object"])
def test_a_damaged_evaluation_is_named(how: str, folder: Path) -> None:
    found = evaluation(Series, ("brightness",))
    page_with(found, folder)
    path = folder / "evaluation.json"
    text = path.read_text(encoding="utf-8")
    damaged = {"cut": text[:99], "changed": text.replace("0.25", "0.26"), "no object": "[1]"}
    path.write_text(damaged.get(how, text.replace("series", "evaluation", 1)), encoding="utf-8")
    with pytest.raises(DamagedFile, match=r"evaluation\.json is damaged"):
        write_page(folder, folder / "other.html")
    assert not (folder / "other.html").exists()


def test_figures_that_do_not_belong_together_are_refused(folder: Path) -> None:
    found = evaluation(Evaluation, ("brightness", "saturate"))
    with pytest.raises(DamagedFile, match=r"or evaluation\.json lacks something"):
        page_with(replace(found, parent=replace(found.parent, rows=found.parent.rows[:2])), folder)
