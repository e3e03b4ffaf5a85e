"""Targets for the network as a whole: an error of its outputs, or a number of weights, split over the layers."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from convexprune.nettrim.goals import Answer, Goal, Keep, KeepByPath, Measure, Within
from convexprune.nettrim.measuring import check_measured
from convexprune.nettrim.outcome import bound_of, check_known, radii_of
from convexprune.nettrim.run import Run
from convexprune.nettrim.targets import Each
from convexprune.network.ties import layer_uses
from convexprune.pruners.allocation import allocate_eps, allocate_nonzeros
from convexprune.solvers.errors import Infeasible

_ROOM = 1 - 2e-4  # of the total: violations within the tolerance, and rounding to the model's dtype
_HALVINGS = 16
LEAST_EPS = 1e-3  # an eps below which tolerances count for more than it: the layer is left as trained
_MOST = 0.999  # an eps at which nothing is left; what it costs is finite, for counts that are small as well
_WORTH_MORE = "left as trained: the weights that are allowed are worth more here than in other layers"
_TOO_LITTLE = (
    f"left as trained: its share of the network's error is an eps below {LEAST_EPS:g} by the bound; "
    "guarantee='measured' allows for more"
)


@dataclass(frozen=True)
class NetworkEps:
    """‖f̂(x) − f(x)‖_F ≤ eps·‖f(x)‖_F on the calibration data, by the bound Σ c_l r_l.

    Parallel: c_l depends on the pruned weights behind layer l alone, so layers are solved from the last to the first,
    each with its share of the total divided by the c_l that is then known. Cascade: only layers behind which no other
    is pruned count, and the others' eps are halved until the trained weights leave these enough room.
    """

    eps: float
    size: float
    nonzeros: bool

    def pursue(self, run: Run) -> dict[str, Goal]:
        """Solve and write.

        Raises:
            InvalidInput: No bound is known for the network. Infeasible: It cannot be met.
        """
        found = bound_of(run)
        check_known(found)
        total = self.eps * self.size * _ROOM
        sizes = run.sizes()
        relative = self._relative(run, found.coefficients, sizes, total)
        if relative is None:  # stopped while measuring
            return {}
        if run.how.cascade:
            return _cascaded(run, sizes, relative, total)
        shares = {name: found.coefficients[name] * relative[name] * sizes[name] for name in run.sites}
        return _backwards(run, shares, sizes, total, dict(found.norms))

    def _relative(
        self, run: Run, coefficients: Mapping[str, float], sizes: Mapping[str, float], total: float
    ) -> dict[str, float] | None:
        """Each layer's eps, as far as is known with the trained weights' norms."""
        prices = {name: coefficients[name] * sizes[name] for name in run.sites}
        if not self.nonzeros:
            equal = min(1.0, total / (math.fsum(prices.values()) or math.inf))
            return dict.fromkeys(run.sites, equal)
        found = measured(run, run.sites)
        if found is None:
            return None
        curves = {name: _curve(run, name, answers) for name, answers in found.items()}
        return dict(allocate_eps(curves, prices, total).values)


@dataclass(frozen=True)
class NetworkSparsity:
    """Numbers of weights that layers share, split so that the outputs keep their correlation with the old ones.

    Least squares leave ‖Y‖² = ‖Ŷ‖² + ‖Ŷ − Y‖², so a layer of relative error eps keeps the squared correlation 1 − eps².
    Those of the layers are taken to multiply: this maximises Π (1 − eps_l(n_l)²), where eps_l is the layer's path. No
    layer is given up: its factor would be 0.

    Attributes:
        counts: What layers keep at most together, by their names.
        kind: The goal of each with its share.
        own: Goals of the others, which share nothing.
    """

    counts: Mapping[tuple[str, ...], int]
    kind: type[Keep] | type[KeepByPath]
    own: Mapping[str, Goal]

    def pursue(self, run: Run) -> dict[str, Goal]:
        """Measure, split, solve and write."""
        found = measured(run, [name for names in self.counts for name in names])
        if found is None:
            return {}
        goals = dict(self.own)
        for names, count in self.counts.items():
            split = _split(run, {name: found[name] for name in names}, count)
            goals |= {name: self.kind(share) for name, share in split.items()}
            run.left |= {name: _WORTH_MORE for name, share in split.items() if share >= _nonzeros(run, name)}
        return Each({name: goals[name] for name in run.sites if name not in run.left}).pursue(run)


def _split(run: Run, found: Mapping[str, tuple[Answer, ...]], count: int) -> dict[str, int]:
    """How many of so many weights each layer keeps."""
    least = {name: run.sites[name].groups for name in found}
    lost = {
        name: [(_lost(eps), max(n, least[name])) for eps, n in _curve(run, name, answers)]
        for name, answers in found.items()
    }
    split = allocate_nonzeros(lost, dict.fromkeys(lost, 1.0), count).values
    return {name: max(least[name], int(split[name] + 1e-9)) for name in found}


def measured(run: Run, names: Collection[str]) -> dict[str, tuple[Answer, ...]] | None:
    """The paths of these layers on the trained network's inputs; None if the run was stopped."""
    found = dict(run.answers({name: Measure() for name in run.sites if name in names}))
    if run.stopped is not None:
        return None
    check_measured(found)
    return {name: found[name] for name in run.sites if name in names}


def fewest_weights(run: Run) -> Callable[[float], Mapping[str, float]] | None:
    """From a level to each layer's eps: those that leave the fewest weights on the layers' measured paths.

    Together they lose as much correlation, Σ −log(1 − eps²), as the level in each layer would. None if the run was
    stopped.
    """
    found = measured(run, run.sites)
    if found is None:
        return None
    curves = {name: [(_lost(eps), n) for eps, n in _curve(run, name, answers)] for name, answers in found.items()}

    def shares(level: float) -> Mapping[str, float]:
        split = allocate_eps(curves, dict.fromkeys(curves, 1.0), len(curves) * _lost(level)).values
        return {name: math.sqrt(-math.expm1(-lost)) for name, lost in split.items()}

    return shares


def _lost(eps: float) -> float:
    """−log of the squared correlation with the old outputs that an error of eps leaves."""
    return -math.log1p(-(min(eps, _MOST) ** 2))


def _curve(run: Run, name: str, answers: tuple[Answer, ...]) -> list[tuple[float, float]]:
    """Points (eps, nonzeros of all groups), from nothing removed to everything."""
    points = [
        (float(group[0][0]), float(sum(int(point[2]) for point in group)))
        for group in zip(*(answer.path for answer in answers), strict=True)
    ]
    return [(0.0, float(_nonzeros(run, name))), *points, (1.0, 0.0)]


def _nonzeros(run: Run, name: str) -> int:
    """Trained weights of a layer that are not zero, biases not counted."""
    biased = run.sites[name].biased
    return sum(int(W[: len(W) - biased].count_nonzero()) for W in run.trained[name])


def _backwards(
    run: Run, shares: Mapping[str, float], sizes: Mapping[str, float], total: float, norms: dict[str, float]
) -> dict[str, Goal]:
    goals: dict[str, Goal] = {}
    waiting = dict(shares)
    for number, name in enumerate(reversed(list(run.sites))):
        run.tell(name, number, len(run.sites))
        found = bound_of(run, norms)
        left = total - math.fsum(found.coefficients[done] * radii for done, radii in _errors(run).items())
        price = found.coefficients[name] * sizes[name]
        part = left * waiting[name] / (math.fsum(waiting.values()) or 1.0)
        del waiting[name]
        eps = min(1.0, part / price) if price > 0 else 1.0
        if eps < LEAST_EPS:
            run.left[name] = _TOO_LITTLE
            continue
        goal = Within(eps)
        answers = run.answer(name, goal)
        if answers is None:
            break
        run.write_(name, answers)
        changed = layer_uses(run.model, name)
        norms = {known: value for known, value in found.norms.items() if known not in changed}
        goals[name] = goal
    return {name: goals[name] for name in run.sites if name in goals}


def _errors(run: Run) -> dict[str, float]:
    return {name: radius for name, radius in radii_of(run).items() if name in run.written}


def _cascaded(run: Run, sizes: Mapping[str, float], relative: Mapping[str, float], total: float) -> dict[str, Goal]:
    for halvings in range(_HALVINGS):
        eps = _cascade_eps(run, sizes, {name: value / 2**halvings for name, value in relative.items()}, total)
        run.left = {name: _TOO_LITTLE for name in run.sites if name not in eps}
        goals = Each({name: Within(value) for name, value in eps.items()}).pursue(run)
        if bound_of(run, pruned=run.written).at(radii_of(run)) <= total / _ROOM:
            return goals
        run.versions.restore_()
        run.written.clear()
        if run.stopped:  # what was reached allows for layers behind it that were not
            return {}
    raise Infeasible(
        f"network_eps: after {_HALVINGS} halvings of the eps of earlier layers the bound is still above what was asked "
        "for; give a larger network_eps, or mode='parallel'"
    )


def _cascade_eps(run: Run, sizes: Mapping[str, float], relative: Mapping[str, float], total: float) -> dict[str, float]:
    """Each layer's eps: those that count share the total, and no layer's is too small for it to be pruned at all."""
    eps, norms = dict(relative), dict[str, float]()
    while eps:
        found = bound_of(run, norms, pruned=eps)
        norms = dict(found.norms)
        shares = {name: c * relative[name] * sizes[name] for name in eps if (c := found.coefficients[name]) > 0}
        scale = total / (math.fsum(shares.values()) or math.inf)
        eps = {name: min(1.0, relative[name] * scale) if name in shares else relative[name] for name in eps}
        if min(eps.values()) >= LEAST_EPS:
            break
        eps = {name: value for name, value in eps.items() if value >= LEAST_EPS}
    return eps
