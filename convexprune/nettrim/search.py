"""An error allowed of the network's outputs, by what is measured of them: a search for the layers' eps."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from convexprune.nettrim.goals import Answer, Goal, Within
from convexprune.nettrim.network import LEAST_EPS, fewest_weights
from convexprune.nettrim.outcome import network_errors
from convexprune.nettrim.run import Run
from convexprune.nettrim.targets import Each

_log = logging.getLogger(__name__)
_NEAR = 0.95  # of the total: a trial whose error is this large ends the search
_AIM = 0.98
_TRIALS = 12
_CLOSE = 1.02  # a ratio of levels: below it the search ends


@dataclass(frozen=True)
class MeasuredEps:
    """‖f̂(x) − f(x)‖_F ≤ eps·‖f(x)‖_F as measured, on the calibration data and on what is held out.

    The layers' eps follow from one level: they are the level ("l1"), or those of the fewest weights on the measured
    paths that lose as much correlation in all as eps equal to the level would ("nonzeros"). The error grows with the
    level, so the level is searched for: each trial prunes all layers, and that with the fewest weights whose measured
    error is within the total stays. Nothing that was not measured is ever kept.
    """

    eps: float
    nonzeros: bool

    def pursue(self, run: Run) -> dict[str, Goal]:
        """Solve and write; without a trial within the total all layers stay as trained, with the reason."""
        levels = self._levels(run)
        if levels is None:  # stopped while measuring
            return {}
        search = _Search(self.eps, min(1.0, self.eps / (1.0 if run.how.cascade else math.sqrt(len(run.sites)))))
        best: _Trial | None = None
        while (level := search.next()) is not None:
            trial = _tried(run, levels(level))
            if trial is None:
                break
            _log.info("layers' eps of level %g: the network's error is %g", level, trial.error)
            search.learn(level, trial.error)
            if trial.error <= self.eps and (best is None or trial.nonzeros <= best.nonzeros):
                best = trial
        if best is None:
            least = "" if search.high is None else f" than {search.high[0]:g}, which moves them by {search.high[1]:.3g}"
            run.left |= {} if run.stopped else dict.fromkeys(run.sites, _TOO_LITTLE.format(self.eps, least))
            return {}
        for name, answers in best.written.items():
            run.write_(name, answers)
        run.left |= best.left
        return dict(best.goals)

    def _levels(self, run: Run) -> Callable[[float], Mapping[str, float]] | None:
        """Each layer's eps at a level."""
        if not self.nonzeros:
            return lambda level: dict.fromkeys(run.sites, level)
        return fewest_weights(run)


_TOO_LITTLE = "left as trained: an error of {:g} of the network's outputs asks for smaller eps of its layers{}"
_TOO_SMALL = f"left as trained: its eps is below {LEAST_EPS:g}"


@dataclass(frozen=True)
class _Trial:
    """All layers pruned at one level."""

    goals: Mapping[str, Goal]
    written: Mapping[str, tuple[Answer, ...]]
    left: Mapping[str, str]
    error: float

    @property
    def nonzeros(self) -> int:
        """Beside those of the trained network."""
        return sum(answer.nonzeros - answer.before for answers in self.written.values() for answer in answers)


def _tried(run: Run, eps: Mapping[str, float]) -> _Trial | None:
    """The model is as trained again afterwards; None where the run was stopped."""
    left = {name: _TOO_SMALL for name, value in eps.items() if value < LEAST_EPS}
    goals = Each({name: Within(value) for name, value in eps.items() if name not in left}).pursue(run)
    errors = [math.inf if math.isnan(error) else error for error in network_errors(run) if error is not None]
    trial = _Trial(goals, dict(run.written), left, max(errors))
    run.versions.restore_()
    run.written.clear()
    return None if run.stopped else trial


@dataclass
class _Search:
    """The largest level whose error is within the total, by the power law through what was tried.

    Attributes:
        low, high: (level, error) within the total and above it.
    """

    total: float
    first: float
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    trials: int = 0
    _tried: set[float] = field(default_factory=set)

    def learn(self, level: float, error: float) -> None:
        """Narrow the range."""
        self.trials += 1
        self._tried.add(level)
        if error <= self.total:
            self.low = max(self.low or (level, error), (level, error))
        else:
            self.high = min(self.high or (level, error), (level, error))

    def next(self) -> float | None:
        """The level to try; None at the end. Three digits, so that another machine's rounding leads to the same."""
        level = float(f"{min(1.0, max(LEAST_EPS, self._wanted())):.3g}")
        return None if self._ended() or level in self._tried else level

    def _ended(self) -> bool:
        if self.trials >= _TRIALS:
            return True
        if self.low is None:
            return False
        near = self.low[1] >= _NEAR * self.total or self.low[0] >= 1.0
        return near or (self.high is not None and self.high[0] <= _CLOSE * self.low[0])

    def _wanted(self) -> float:
        if self.low is None and self.high is None:
            return self.first
        if self.low is None or self.high is None:  # about linear at first; where it is not, by longer and longer steps
            level, error = self.low or self.high or (self.first, self.total)
            step = (_AIM * self.total / error) ** (2 ** (self.trials - 1)) if error > 0 else math.inf
            return level * min(8.0, max(1 / 8, step))
        (a, e), (b, f) = self.low, self.high
        part = math.log(_AIM * self.total / e) / math.log(f / e) if e > 0 and f > e else 0.5
        return float(a * (b / a) ** min(0.9, max(0.1, part)))
