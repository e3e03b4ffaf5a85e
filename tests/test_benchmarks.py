"""The arithmetic behind the benchmarks' figures, the files they pass on, and the leaderboard."""

import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tolerances
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convexprune import Options, layer_program
from convexprune.solvers import LayerProgram, certify
from convexprune.solvers.methods import IterativeSolver, Proposal
from convexprune.solvers.methods.interface import Limits, Solver, Start, Watch
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.testing import zoo

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # scripts, not a package

dump, measure, performance, profiles = map(importlib.import_module, ("dump", "measure", "performance", "profiles"))

INF = math.inf
TIMES = {
    "quick": {"p": 1.0, "q": 8.0, "r": INF, "s": INF},
    "steady": {"p": 2.0, "q": 4.0, "r": 3.0, "s": INF},
    "narrow": {"p": INF, "q": 2.0, "r": INF, "s": INF},
}
SECONDS = st.floats(1e-4, 1e4)


@pytest.mark.parametrize("script", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_script_imports_without_running(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(script)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("script", [dump, performance], ids=["dump", "performance"])
def test_help(script: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        script.main(["--help"])
    assert "usage" in capsys.readouterr().out


def test_synflow_makes_each_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    synflow = importlib.import_module("synflow")
    few = torch.rand(128, 3, 16, 16), torch.arange(128) % 10
    monkeypatch.setattr(synflow, "images", lambda *_: (few, few))
    monkeypatch.setitem(synflow.VGG, "narrow", (8, synflow.POOL, 8))
    small = ["--networks", "vgg-11", "--width", "0.05", "--alphas", "0", "3", "--no-published"]
    small += ["--compressions", "20", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]
    for _ in range(2):
        synflow.main(["collapse", "accuracy", *small])
        rows = [json.loads(line) for path in sorted(tmp_path.iterdir()) for line in path.read_text().splitlines()]
        assert len(rows) == 6 + 8
    trained, pruned = rows[:6], {row["method"]: row["densities"] for row in rows[6:] if row["compression"] > 1}
    total = trained[0]["weights"]
    assert [row["weights"] for row in trained] == [total, *[round(total / 20)] * 5]
    assert min(pruned["synflow"]) > 0
    assert "published" in capsys.readouterr().out


# Performance profiles (Dolan and Moré, 2002).


def test_ratios_and_profile_of_a_table_worked_by_hand() -> None:
    ratios = profiles.ratios(TIMES)
    assert ratios["quick"] == {"p": 1.0, "q": 4.0, "r": INF, "s": INF}
    assert ratios["steady"] == {"p": 2.0, "q": 2.0, "r": 1.0, "s": INF}
    assert ratios["narrow"] == {"p": INF, "q": 1.0, "r": INF, "s": INF}
    shares = {tau: [profiles.profile(row.values(), tau, 4) for row in ratios.values()] for tau in (1, 2, 4, 1e9)}
    assert shares == {1: [1 / 4, 1 / 4, 1 / 4], 2: [1 / 4, 3 / 4, 1 / 4], 4: [2 / 4, 3 / 4, 1 / 4], 1e9: shares[4]}


@given(
    st.lists(st.lists(st.one_of(SECONDS, st.just(INF)), min_size=5, max_size=5), min_size=2, max_size=4),
    st.lists(st.floats(0.1, 10), min_size=5, max_size=5),
)
def test_a_profile_rises_to_the_share_solved_and_is_blind_to_the_unit_of_each_problem(
    rows: list[list[float]], units: list[float]
) -> None:
    table = {str(number): dict(zip("abcde", row, strict=True)) for number, row in enumerate(rows)}
    scaled = {s: {p: t * u for (p, t), u in zip(row.items(), units, strict=True)} for s, row in table.items()}
    ratios, again = profiles.ratios(table), profiles.ratios(scaled)
    solvable = sum(math.isfinite(t) for t in profiles.best(table).values())
    assert sum(profiles.profile(row.values(), 1, 5) for row in ratios.values()) * 5 >= solvable - 1e-9
    for solver, row in ratios.items():
        values = [profiles.profile(row.values(), tau, 5) for tau in (1, 2, 10, 1e12)]
        assert values == sorted(values)
        assert values[-1] == sum(map(math.isfinite, table[solver].values())) / 5
        assert list(again[solver].values()) == pytest.approx(list(row.values()), rel=tolerances.EXACT)


def test_shifted_geometric_mean_by_hand() -> None:
    mean = profiles.shifted_geometric_mean
    assert mean([1.0, 4.0], 0) == pytest.approx(2, rel=tolerances.EXACT)
    assert mean([1.0, 7.0], 1.0) == pytest.approx(3, rel=tolerances.EXACT)  # √(2·8) − 1
    assert math.isnan(mean([], 1.0))


@given(st.lists(SECONDS, min_size=1, max_size=9), st.floats(0, 10))
def test_shifted_geometric_mean_lies_between_geometric_and_arithmetic(values: list[float], shift: float) -> None:
    found = profiles.shifted_geometric_mean(values, shift)
    slack = 1 + tolerances.ROUNDING
    # Differences of numbers near the shift lose what they have in common with it.
    rounding = tolerances.EXACT * (shift + max(values))
    assert profiles.shifted_geometric_mean(values, 0) <= found * slack + rounding
    assert found <= sum(values) / len(values) * slack + rounding


def test_standings_keep_failures_and_refusals_apart() -> None:
    blank = profiles.Answer("", "", 1e-4, "solved")
    good = replace(blank, certified=True, solved=True, claimed=True, true=True, seconds=1.0, setup=0.25, certify=0.5)
    answers = [
        replace(good, problem="p", solver="a"),
        replace(good, problem="q", solver="a", true=False, seconds=3.0),
        replace(good, problem="p", solver="b", seconds=2.0),
        replace(blank, problem="q", solver="b", claimed=True, status="uncertified", seconds=5.0),
        replace(blank, problem="p", solver="c", status="refused"),
        replace(blank, problem="q", solver="c", status="raised", seconds=0.0),
        replace(good, problem="p", solver="late", solved=False, seconds=11.0),
        replace(blank, problem="q", solver="late", status="refused"),
    ]
    a, b, c, late = profiles.standings(answers, limit=10.0, shift=0.0)
    assert [s.solver for s in (a, b, c, late)] == ["a", "b", "c", "late"]
    assert [(s.taken, s.solved, s.fastest) for s in (a, b, c, late)] == [(2, 2, 2), (2, 1, 0), (1, 0, 0), (1, 0, 0)]
    assert [(s.claims, s.true) for s in (a, b, c, late)] == [(2, 1), (2, 1), (0, 0), (1, 1)]
    assert [s.mean for s in (a, b, c, late)] == pytest.approx([3**0.5, 20**0.5, 10, 10], rel=tolerances.EXACT)
    # Against the best on what each takes: 1 s on p, 3 s on q.
    assert [s.ratio for s in (a, b, c, late)] == pytest.approx([1, (20 / 3) ** 0.5, 10 / 3, 10], rel=tolerances.EXACT)
    assert (a.setup, a.certify) == pytest.approx((0.5 / 4, 1 / 4), rel=tolerances.EXACT)


# What a solver says, and what is so.


@dataclass(frozen=True)
class Fake:
    """Zero weights, shown or returned, with any claim."""

    ended: str = "own rule"
    shown: tuple[str, ...] = ()
    reason: str | None = None
    error: Exception | None = None

    def refuses(self, program: LayerProgram) -> str | None:
        return self.reason

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        if self.error is not None:
            raise self.error
        program.inputs.zero_()  # whatever it does to its own data, the judge has others
        made = Proposal(program.inputs.new_zeros(program.shape), None, self.ended, 1, 0.0, "fine")
        for ended in self.shown:
            watch(1, lambda ended=ended: replace(made, ended=ended), {})
        return made


def at_zero(optimal: bool, solver: Solver) -> profiles.Answer:
    """Its answer where U = 0 is optimal, or is not even feasible."""
    member = zoo.member("ball eps 1.5, U = 0" if optimal else "ball plain 20x8x5")
    return measure.attempt(member.build, solver, 1e-4, 10.0)


def test_a_claim_is_true_only_if_certified_on_fresh_data() -> None:
    true, false = at_zero(True, Fake()), at_zero(False, Fake())
    assert (true.claimed, true.true, true.solved) == (True, True, True)
    assert (false.claimed, false.true, false.solved) == (True, False, False)
    assert false.violation > tolerances.FEASIBLE  # on zeroed data it would have been 0


def test_who_claims_nothing_cannot_be_wrong() -> None:
    for ended in ("watch", "time limit", "iteration limit"):
        answer = at_zero(False, Fake(ended, shown=("iteration limit",)))
        assert not answer.claimed
        assert at_zero(True, Fake(ended)).solved


def test_the_first_claim_counts_even_if_the_solver_goes_on() -> None:
    """A backend that says "solved" too early and is sent back by the certificate was wrong once."""
    program = zoo.member("squared-loss plain 20x8x5").build()
    answer = certify(program, program.inputs.new_zeros(program.shape))
    assert not answer.within(1e-4, 1e-5)

    @dataclass(frozen=True)
    class Corrected(Fake):
        def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
            zero = Proposal(program.inputs.new_zeros(program.shape), None, "own rule", 1, 0.0)
            assert max(watch(1, lambda: zero, {})) > 1
            return make_solver("admm", {})[1].run(program, limits, start, watch)

    answer = measure.attempt(zoo.member("squared-loss plain 20x8x5").build, Corrected(), 1e-4, 10.0)
    assert (answer.claimed, answer.true, answer.solved) == (True, False, True)


@pytest.mark.parametrize("optimal", [True, False])
def test_an_iterative_method_claims_by_its_own_rule_whether_or_not_it_is_right(optimal: bool) -> None:
    @dataclass(frozen=True)
    class Content(IterativeSolver[LayerProgram]):
        """Zero weights, and content with them at once."""

        def refuses(self, program: LayerProgram) -> str | None:
            return None

        def init(self, program: LayerProgram, start: Start | None) -> LayerProgram:
            return program

        def step(self, state: LayerProgram) -> None:
            pass

        def residuals(self, state: LayerProgram) -> dict[str, float]:
            return {}

        def done(self, state: LayerProgram) -> bool:
            return True

        def finish(self, state: LayerProgram) -> tuple[torch.Tensor, torch.Tensor]:
            return state.inputs.new_zeros(state.shape), torch.zeros_like(state.fit.Y)

    answer = at_zero(optimal, Content())
    assert (answer.claimed, answer.true) == (True, optimal)


def test_refusals_and_exceptions_are_kept_with_their_words() -> None:
    refused, raised = at_zero(True, Fake(reason="not mine")), at_zero(True, Fake(error=ValueError("broken")))
    assert (refused.status, refused.message, refused.taken) == ("refused", "not mine", False)
    assert (raised.status, raised.message, raised.taken) == ("raised", "ValueError: broken", True)
    assert not refused.solved
    assert not raised.solved


def test_a_run_writes_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    members = ("ball plain 20x8x5", "relu-ball plain 20x8x5")
    picture, data = tmp_path / "profile.png", tmp_path / "profile.json"
    files = ["--plot", str(picture), "--json", str(data)]
    options = ["--solvers", "admm", "published", "--tol", "1e-1", "1e-2", "--time-limit", "2", "--threads", "1"]
    threads = torch.get_num_threads()
    performance.main([*options, "--members", *members, *files])
    torch.set_num_threads(threads)
    assert picture.read_bytes().startswith(b"\x89PNG")
    answers = json.loads(data.read_text(encoding="utf-8"))["answers"]
    assert len(answers) == 2 * 2 * 2
    admm = [answer for answer in answers if answer["solver"] == "admm"]
    assert all(answer["solved"] and answer["gap"] <= answer["tol"] for answer in admm)
    refused = {answer["problem"] for answer in answers if answer["status"] == "refused"}
    assert refused == {"relu-ball plain 20x8x5"}
    assert "2 problems, gap ≤ 0.01" in capsys.readouterr().out


# Dumped layers.


def test_dumped_layers_are_the_programs_of_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5, bias=False))
    inputs = torch.rand(30, 4, 4, 4)
    dumped = {layer.name: layer for layer in dump.layers(model, inputs)}
    assert {name: layer.fit for name, layer in dumped.items()} == {
        "0 group 0": "relu-ball",
        "0 group 1": "relu-ball",
        "3": "ball",
    }
    expected = {
        "0 group 1": layer_program(model[0], inputs, 0.2, group=1),
        "3": layer_program(model[3], model[:3](inputs).detach(), 0.2, options=Options(fit="ball")),
    }
    for name, wanted in expected.items():
        found = dump.read_layer(dump.write_layer(tmp_path / f"{name}.npz", dumped[name], 0.2))
        assert type(found.fit) is type(wanted.fit)
        assert torch.equal(found.inputs, wanted.inputs)
        assert torch.equal(found.fit.Y, wanted.fit.Y)
        assert found.fit.scale == pytest.approx(wanted.fit.scale, rel=1e-6)  # float32 norms, two ways
        assert torch.equal(found.penalty.cost(found.shape), wanted.penalty.cost(wanted.shape))
        assert certify(found, dumped[name].W).violation == 0


def test_dumped_rows_are_drawn_from_the_layer_and_repeat() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 2)), torch.rand(50, 3)
    (few,), (again,) = dump.layers(model, inputs, rows=10), dump.layers(model, inputs, rows=10)
    assert torch.equal(few.X, again.X)
    assert len(few.X) == 10
    assert all(any(torch.equal(row[:3], sample) for sample in inputs) for row in few.X)


# The leaderboard.


def own_solver() -> str:
    """The README's own example of a solver in a file."""
    text = (BENCHMARKS / "leaderboard" / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


def test_the_readme_shows_a_short_solver() -> None:
    code = own_solver()
    compile(code, "proximal_gradient.py", "exec")
    assert len(code.split("def ")) > 3
    assert len(code.splitlines()) <= 30


@pytest.mark.skipif(importlib.util.find_spec("benchopt") is None, reason='benchopt: pip install "convexprune[bench]"')
def test_the_leaderboard_runs_the_registry_and_a_solver_of_ones_own(tmp_path: Path) -> None:
    import pandas as pd

    mine, output = tmp_path / "proximal_gradient.py", tmp_path / "results.parquet"
    mine.write_text(own_solver(), encoding="utf-8")
    datasets = "zoo[member=['squared-loss plain 20x8x5','ball plain 20x8x5']]"
    choice = ["-d", datasets, "-s", str(mine), "-s", "convexprune[method=[admm,published]]"]
    quiet = ["--no-cache", "--no-plot", "--no-display", "--max-runs", "60", "--output", str(output)]
    command = [sys.executable, "-m", "benchopt", "run", str(BENCHMARKS / "leaderboard"), *choice, *quiet]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    results = pd.read_parquet(output)
    runs = {(solver, dataset): rows for (solver, dataset), rows in results.groupby(["solver_name", "dataset_name"])}
    assert set(runs) == {
        ("proximal gradient", "zoo[squared-loss plain 20x8x5]"),
        ("convexprune[admm]", "zoo[squared-loss plain 20x8x5]"),
        ("convexprune[admm]", "zoo[ball plain 20x8x5]"),
        ("convexprune[published]", "zoo[ball plain 20x8x5]"),
    }
    for (solver, dataset), rows in runs.items():
        reference = zoo.member(dataset[4:-1]).reference
        assert (rows.objective_bound <= reference * (1 + tolerances.OPTIMUM)).all()
        if solver != "convexprune[published]":
            assert rows.objective_certified.iloc[-1] == 1
            assert rows.objective_value.iloc[-1] == pytest.approx(reference, rel=tolerances.AGREEMENT)
    assert "it takes the squared loss only" in done.stdout
