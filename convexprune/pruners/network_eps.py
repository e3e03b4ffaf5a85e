"""An error allowed of the network's outputs, shared among its layers: by the bound on it, or by what is measured."""

import logging
import math
from collections.abc import Mapping

from convexprune.network.choosing import find_ties
from convexprune.pruners.allocation import allocate_eps
from convexprune.pruners.measuring import curves, fewest_weights
from convexprune.pruners.tolerance import Within
from convexprune.runs.outcome import bound_of, network_errors, radii_of
from convexprune.runs.run import Run
from convexprune.solvers.errors import Infeasible, InvalidInput
from convexprune.targets import NetworkEps

_log = logging.getLogger(__name__)
_ROOM = 1 - 2e-4  # of the total: violations within the tolerance, and rounding to the model's dtype
_HALVINGS = 16
_LEAST_EPS = 1e-3  # an eps below which tolerances count for more than it: the layer is left as trained
_TOO_LITTLE = (
    f"left as trained: its share of the network's error is an eps below {_LEAST_EPS:g} by the bound; "
    "guarantee='measured' allows for more"
)
_NOTHING_FITS = "left as trained: an error of {:g} of the network's outputs asks for smaller eps of its layers{}"
_TOO_SMALL = f"left as trained: its eps is below {_LEAST_EPS:g}"
_NEAR = 0.95  # of the total: a trial whose error is this large ends the search
_AIM = 0.98
_TRIALS = 12
_CLOSE = 1.02  # a ratio of levels: below it the search ends


# By the bound


def by_bound(run: Run, target: NetworkEps) -> None:
    """‖f̂(x) − f(x)‖_F ≤ eps·‖f(x)‖_F on the calibration data, by the bound Σ c_l r_l.

    Parallel: c_l depends on the pruned weights behind layer l alone, so layers are solved from the last to the first,
    each with its share of the total divided by the c_l that is then known. Cascade: only layers behind which no other
    is pruned count, and the others' eps are halved until the trained weights leave these enough room.

    Raises:
        InvalidInput: No bound is known for the network. Infeasible: It cannot be met.
    """
    found = bound_of(run)
    if found.reason is not None:
        raise InvalidInput(
            f"network_eps: no bound on this network's outputs is known: {found.reason}; give eps, or "
            "guarantee='measured'"
        )
    total = target.value * run.plan.size * _ROOM
    sizes = run.sizes()
    prices = {name: found.coefficients[name] * sizes[name] for name in run.layers}
    if target.objective == "l1":
        relative = dict.fromkeys(run.layers, min(1.0, total / (math.fsum(prices.values()) or math.inf)))
    else:
        relative = dict(allocate_eps(curves(run, run.layers), prices, total).values)
    if run.cascade:
        _cascaded(run, sizes, relative, total)
        return
    shares = {name: found.coefficients[name] * relative[name] * sizes[name] for name in run.layers}
    _backwards(run, shares, sizes, total, dict(found.norms))


def _backwards(
    run: Run, shares: Mapping[str, float], sizes: Mapping[str, float], total: float, norms: dict[str, float]
) -> None:
    waiting = dict(shares)
    for number, name in enumerate(reversed(list(run.layers))):
        run.progress(name, number, len(run.layers))
        found = bound_of(run, norms)
        radii = {done: radius for done, radius in radii_of(run).items() if done in run.written}
        left = total - math.fsum(found.coefficients[done] * radius for done, radius in radii.items())
        price = found.coefficients[name] * sizes[name]
        part = left * waiting[name] / (math.fsum(waiting.values()) or 1.0)
        del waiting[name]
        eps = min(1.0, part / price) if price > 0 else 1.0
        if eps < _LEAST_EPS:
            run.left[name] = _TOO_LITTLE
            continue
        goal = Within(eps)
        answers = run.answer(name, goal)
        if answers is None:
            break
        run.write_(name, answers, goal)
        changed = find_ties(run.model).uses_of(name)
        norms = {known: value for known, value in found.norms.items() if known not in changed}


def _cascaded(run: Run, sizes: Mapping[str, float], relative: Mapping[str, float], total: float) -> None:
    for halvings in range(_HALVINGS):
        eps = _cascade_eps(run, sizes, {name: value / 2**halvings for name, value in relative.items()}, total)
        run.left = {name: _TOO_LITTLE for name in run.layers if name not in eps}
        run.prune({name: Within(value) for name, value in eps.items()})
        if bound_of(run, pruned=run.written).at(radii_of(run)) <= total / _ROOM:
            return
        run.restore_()
        if run.stopped:  # what was reached allows for layers behind it that were not
            return
    raise Infeasible(
        f"network-eps: after {_HALVINGS} halvings of the eps of earlier layers the bound is still above what was "
        "allowed; give a larger one, or mode='parallel'"
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
        if min(eps.values()) >= _LEAST_EPS:
            break
        eps = {name: value for name, value in eps.items() if value >= _LEAST_EPS}
    return eps


# By what is measured


def by_measured_errors(run: Run, target: NetworkEps) -> None:
    """‖f̂(x) − f(x)‖_F ≤ eps·‖f(x)‖_F as measured, on the calibration data and on what is held out.

    The layers' eps follow from one level: they are the level ("l1"), or those of the fewest weights on the measured
    paths that lose as much correlation in all as eps equal to the level would ("nonzeros"). The error grows with the
    level, so the level is searched for: each trial prunes all layers, and that with the fewest weights whose measured
    error is within the total stays. Without one all layers stay as trained, with the reason. Nothing that was not
    measured is ever kept.
    """
    fewest = None if target.objective == "l1" else fewest_weights(run)
    first = min(1.0, target.value / (1.0 if run.cascade else math.sqrt(len(run.layers))))
    errors, written, goals, left = dict[float, float](), dict(run.written), dict(run.goals), dict[str, str]()
    best = math.inf  # the fewest nonzeros of a trial that keeps the promise, beside those of the trained network
    while (level := next_level(errors, target.value, first)) is not None:
        eps = dict.fromkeys(run.layers, level) if fewest is None else fewest(level)
        small = {name: _TOO_SMALL for name, value in eps.items() if value < _LEAST_EPS}
        run.prune({name: Within(value) for name, value in eps.items() if name not in small})
        if run.stopped:
            run.restore_()
            break
        errors[level] = max(math.inf if math.isnan(each) else each for each in network_errors(run) if each is not None)
        _log.info("layers' eps of level %g: the network's error is %g", level, errors[level])
        nonzeros = sum(answer.nonzeros - answer.before for answers in run.written.values() for answer in answers)
        if errors[level] <= target.value and nonzeros <= best:
            best, written, goals, left = nonzeros, dict(run.written), dict(run.goals), small
        run.restore_()  # as trained
    if best == math.inf and not run.stopped:
        least = f" than {min(errors):g}, which moves them by {errors[min(errors)]:.3g}" if errors else ""
        left = dict.fromkeys(run.layers, _NOTHING_FITS.format(target.value, least))
    for name, answers in written.items():
        run.write_(name, answers, goals[name])
    run.left |= left


def next_level(tried: Mapping[float, float], total: float, first: float) -> float | None:
    """The next level to try for the largest whose error is within the total; None at the end.

    By the power law through the errors of the levels that were tried on either side; three digits, so that another
    machine's rounding leads to the same.
    """
    low = max(((level, error) for level, error in tried.items() if error <= total), default=None)
    high = min(((level, error) for level, error in tried.items() if error > total), default=None)
    near = low is not None and (low[1] >= _NEAR * total or low[0] >= 1.0)
    if near or len(tried) >= _TRIALS or (low and high and high[0] <= _CLOSE * low[0]):
        return None
    if low and high:
        (a, e), (b, f) = low, high
        part = math.log(_AIM * total / e) / math.log(f / e) if e > 0 and f > e else 0.5
        guess = a * (b / a) ** min(0.9, max(0.1, part))
    else:  # about linear at first; where it is not, by longer and longer steps
        level, error = low or high or (first, _AIM * total)
        step = (_AIM * total / error) ** (2 ** (len(tried) - 1)) if error > 0 else math.inf
        guess = level * min(8.0, max(1 / 8, step))
    level = float(f"{min(1.0, max(_LEAST_EPS, guess)):.3g}")
    return None if level in tried else level
