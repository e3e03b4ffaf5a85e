"""Names and paths that no one expects: a row or an error of ours, and nothing that moves the cursor or turns lines."""

import copy
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
import torch
from calls import prune_
from torch import Tensor, nn
from typer.testing import CliRunner

import convexprune
from convexprune import Eps, Options, save_weights, verify
from convexprune.cli.app import app
from convexprune.cli.live import VisibleFormatter
from convexprune.errors import DamagedFile
from convexprune.files.arrays import load_array
from convexprune.files.texts import utf8, visible
from convexprune.files.weights import load_weights, save_json
from convexprune.page.extras import save_extras
from convexprune.page.page import write_page
from convexprune.preview import preview
from convexprune.runs.fingerprints import data_fingerprint
from convexprune.runs.journal import Journal, read_json
from convexprune.solvers.errors import InvalidInput

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
NAMES = ["a\u202eb", "x\x1b[2J", "two\nlines", "[red]x[/red]", "<b>&", "é\u2067", "*", "s p%s{0}"]
UNWRITABLE = ["\ud800", "\udcff"]


class Named(nn.Module):
    """A chain of layers of these names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x).relu()
        return x


def inputs() -> Tensor:
    return torch.rand(30, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("names", [NAMES, UNWRITABLE], ids=["controls", "lone surrogates"])
@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_a_run_with_strange_names_is_kept_resumed_verified_and_shown(
    names: list[str], mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "convexprune")
    dense, x = Named(names), inputs()
    assert not HIDDEN.search(str(preview(dense, x, Eps(0.3), options=Options(mode=mode))).replace("\n", ""))
    model, again = copy.deepcopy(dense), copy.deepcopy(dense)
    report = prune_(model, x, 0.3, mode=mode, run=tmp_path)
    resumed = prune_(again, x, 0.3, mode=mode, run=tmp_path)
    assert [row.name for row in report.layers] == [row.name for row in resumed.layers] == names
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert caplog.messages
    assert not HIDDEN.search("".join(caplog.messages))
    assert sorted(entry.data["layer"] for entry in Journal.existing(tmp_path)[0].entries()) == sorted(names)
    assert not HIDDEN.search(str(report))
    found = verify(dense, x, tmp_path)
    assert found.ok
    assert not HIDDEN.search(str(found))
    if mode == "cascade":
        return  # its page is no other
    save_json(report.to_dict(), tmp_path / "report.json")
    assert [row["name"] for row in read_json(tmp_path / "report.json")["layers"]] == names
    page = write_page(tmp_path).read_text(encoding="utf-8")
    assert not HIDDEN.search(unescape(page).replace("\n", ""))
    for name in names:
        assert f"<bdi>{visible(name, line=True)}</bdi>" in unescape(page)


def test_batches_with_strange_keys_and_texts_have_fingerprints() -> None:
    batches = [[{"\ud800": torch.ones(2), "text": text}] for text in ("\udfff", "\udffe")]
    one, other = map(data_fingerprint, batches)
    assert one == data_fingerprint(copy.deepcopy(batches[0])) != other


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_a_file_of_weights_cannot_name_is_said(name: str, tmp_path: Path) -> None:
    model = Named([name])
    with pytest.raises(InvalidInput, match="a name that no file can hold"):
        save_weights(model, tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidInput, match="a name that no file can hold"):
        save_extras(tmp_path, {key: value.clone() for key, value in model.state_dict().items()}, model)


def test_escapes_are_read_as_what_they_stand_for(tmp_path: Path) -> None:
    data = {"\ud800\n": ["\udfff", "a\u202eb", "\x00", "ü😀"]}
    assert read_json(save_json(data, tmp_path / "x.json")) == data
    assert json.loads(utf8(json.dumps(data, ensure_ascii=False))) == data


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("fc1.weight", "fc1.weight"),
        ("ünï 😀 שלום", "ünï 😀 שלום"),
        ("a\u202eb\u2066", "a\\u202eb\\u2066"),
        ("\x1b[2J\x07\x9b", "\\x1b[2J\\x07\\x9b"),
        ("\ud800", "\\ud800"),
        ("two\n\tlines", "two\n\tlines"),
    ],
)
def test_what_cannot_be_seen_is_written_as_an_escape(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert "\n" not in visible(text, line=True)


def test_the_log_shows_names_as_they_can_be_seen() -> None:
    record = logging.makeLogRecord({"msg": "layer %s", "args": ("\x1b[2J\ud800",), "levelname": "INFO"})
    assert VisibleFormatter("%(message)s").format(record) == "layer \\x1b[2J\\ud800"


def test_paths_that_are_no_text_are_shown_by_the_command_line(tmp_path: Path) -> None:
    """Of bytes, as Linux has them; and a terminal that has ASCII alone."""
    command = [sys.executable, "-m", "convexprune", "report", b"no\xff\x1b[2Jfolder"]
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin", "PYTHONSAFEPATH": "1"}
    environment["PYTHONPATH"] = str(Path(convexprune.__file__).parents[1])
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, check=False)  # noqa: S603
    assert done.returncode == 1, done.stderr
    assert b"no\\udcff\\x1b[2Jfolder: no such folder" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["\ud800", "nul\0"])
def test_paths_that_no_file_can_have_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    calls: list[Callable[[], object]] = [
        lambda: save_json({}, path),
        lambda: save_json({}, path / "x.json"),
        lambda: save_weights(nn.Linear(2, 2), path.with_suffix(".safetensors")),
        lambda: load_weights(path.with_suffix(".pt")),
        lambda: load_array(path.with_suffix(".npy")),
        lambda: prune_(Named(["a"]), inputs(), 0.3, run=path),
        lambda: Journal.existing(path),
        lambda: write_page(path),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match="no file can have this name"):
            call()
    assert list(tmp_path.iterdir()) == []


# Links


@pytest.fixture(params=["circle", "nowhere"])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "link"
    path.symlink_to(path if request.param == "circle" else tmp_path / "gone")
    return path


@pytest.mark.parametrize("below", ["", "run"])
def test_folders_behind_a_link_that_leads_nowhere_are_refused(link: Path, below: str) -> None:
    says = "link: a symbolic link that leads nowhere, or in a circle"
    folder = link / below
    with pytest.raises(InvalidInput, match=says):
        prune_(Named(["a"]), inputs(), 0.3, run=folder)
    with pytest.raises(InvalidInput, match=says):
        save_json({}, folder / "x.json")
    arguments = ["prune", "lenet-5", "--weights", "w.pt", "--calibration", "x.npz", "--out", str(folder)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert re.search(says, " ".join(result.output.split()))


@pytest.mark.parametrize("name", ["w.pt", "x.npz"])
def test_files_behind_a_link_that_leads_nowhere_are_not_found(link: Path, name: str, tmp_path: Path) -> None:
    load = load_weights if name == "w.pt" else load_array
    (tmp_path / name).symlink_to(link)
    for path in (tmp_path / name, link / name):
        with pytest.raises(FileNotFoundError, match="is a symbolic link that leads nowhere, or in a circle"):
            load(path)
    with pytest.raises(FileNotFoundError, match="no run directory"):
        Journal.existing(link)
    with pytest.raises((InvalidInput, DamagedFile), match="no such folder"):
        write_page(link)
