"""What will be pruned, and how, found out by one pass over the calibration data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from glob import escape

from torch import nn

from convexprune.errors import NothingToPrune
from convexprune.layers import weight_matrices
from convexprune.nettrim.claims import checked
from convexprune.nettrim.posed import FITS
from convexprune.nettrim.recipe import Recipe
from convexprune.nettrim.sites import Site
from convexprune.network.calibration import Calibration
from convexprune.network.choosing import choose_layers, layer_fits
from convexprune.network.forwards import Forward
from convexprune.network.padding import Counted
from convexprune.network.passes import Observed, observe
from convexprune.network.patterns import check_patterns, looked_up
from convexprune.network.sightings import Sightings, visible_size
from convexprune.network.taps import Tap, tap
from convexprune.network.ties import Ties, find_ties
from convexprune.report.report import SkippedModule

_UNCALLED = "its forward was not called on the calibration data, so its inputs are not known"
_NO_ROWS = "it is called with no rows of the calibration data that count, so its inputs are not known"
_THESE_BATCHES = "what is promised holds for the batches as they were given, and for no others"


@dataclass(frozen=True, eq=False)
class Plan:
    """What is known before anything is solved.

    Attributes:
        sites: By name, in the order of their first calls.
        order: Their names in the model's order.
        skipped: Modules that hold weights and are not pruned, each with the reason.
        samples: Calibration samples.
        size: ‖f(x)‖_F over them, of outputs that count.
        counted: Which rows count.
        rows: P of each group, of rows that count.
        notices: What limits the meaning of all figures.
        mixing: Whether samples of a batch see each other.
        mode: The recipe's, or the one that was chosen.
        tests: How much the plan was put to the test: forwards, and samples in each.
    """

    sites: Mapping[str, Site]
    order: tuple[str, ...]
    skipped: tuple[SkippedModule, ...]
    samples: int
    size: float
    counted: Counted
    rows: Mapping[str, tuple[int, ...]]
    notices: tuple[str, ...] = ()
    mixing: bool = False
    mode: str = "parallel"
    tests: Mapping[str, int] = field(default_factory=dict)

    def without(self, reasons: Mapping[str, str]) -> "Plan":
        """The same, but for layers that are left as trained, each with the reason."""
        sites = {name: site for name, site in self.sites.items() if name not in reasons}
        left = [SkippedModule(name, type(self.sites[name].layer).__name__, why) for name, why in reasons.items()]
        order = tuple(name for name in self.order if name in sites)
        return replace(self, sites=sites, order=order, skipped=(*self.skipped, *left))


def make_plan(
    model: nn.Module,
    calibration: Calibration,
    recipe: Recipe,
    forward: Forward | None,
    progress: Callable[[int, int], None],
    *,
    names: Sequence[str] | None = None,
) -> Plan:
    """The layers to prune, where their inputs are seen, and what follows them.

    Args:
        model: The trained network.
        calibration: Gone through once.
        recipe: What is asked.
        forward: As for ``prune_``.
        progress: Called as ``progress(done, total)``.
        names: Of the layers in the place of the recipe's patterns.

    Raises:
        NothingToPrune: No layer can be pruned, none is reached, or the patterns choose none.
        NonFinite: Weights, or what reaches a layer, hold NaN or infinity.
        InvalidInput: An unknown fit, a pattern of the recipe's tables that matches no layer, pruned or not, or a model
            that cannot be called on a batch.
    """
    chosen, skipped = choose_layers(model, recipe.layers if names is None else [escape(name) for name in names])
    for argument in ("activations", "fit", "eps", "sparsity"):
        check_patterns(argument, getattr(recipe, argument), [*chosen, *(module.name for module in skipped)])
    for layer in chosen.values():
        weight_matrices(layer)  # NaN in any layer is found first
    ties = find_ties(model)
    taps = {name: tuple(tap(model, use) for use in ties.uses_of(name)) for name in chosen}
    passing = Sightings(model, calibration.mask)
    found = observe(
        model,
        passing.over(calibration),
        taps,
        forward=forward,
        see=passing.see,
        progress=lambda done: progress(done, done),
    )
    counted = passing.counted(taps, forward)
    size = visible_size(model, calibration, counted, forward) if any(counted.outputs) else found.size
    seen = found.layers
    if not seen:
        raise NothingToPrune(f"the calibration data reaches none of {', '.join(chosen)}: check layers and forward")
    mode, chosen_for = _mode(recipe, seen)
    rows = {name: passing.rows(name, counted) for name in seen}
    reasons = _unusable(chosen, seen, rows, mode)
    norms = _folded(model, chosen, seen, recipe, ties)
    site = partial(_site, model, chosen, taps, seen, recipe)
    check = checked(
        model,
        {name: site(name, norms[name]) for name in seen if name not in reasons},
        found.examples,
        forward,
        without_norm=lambda planned: site(planned.name, None),
        given=lambda name: bool(looked_up(recipe.fit, name) if isinstance(recipe.fit, Mapping) else recipe.fit),
    )
    reasons |= check.left
    if not check.sites:
        raise NothingToPrune(f"no layer can be pruned: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}")
    left = [SkippedModule(name, type(chosen[name]).__name__, reason) for name, reason in reasons.items()]
    return Plan(
        sites=check.sites,
        order=tuple(name for name in chosen if name in check.sites),
        skipped=(*skipped, *left),
        samples=found.samples,
        size=size,
        counted=counted,
        rows={name: rows[name] for name in check.sites},
        notices=(*counted.notices(), *_mixed(check.mixing), *chosen_for, *_overruled(recipe, check.sites)),
        mixing=check.mixing is not None,
        mode=mode,
        tests={"forwards": check.forwards, "samples": check.samples},
    )


def _unusable(
    chosen: Mapping[str, nn.Module], seen: Mapping[str, Observed], rows: Mapping[str, tuple[int, ...]], mode: str
) -> dict[str, str]:
    """The layers that cannot be posed as programs, each with the reason."""
    reasons = {name: _UNCALLED for name in chosen if name not in seen}
    if mode == "cascade":
        reasons |= {name: _repeated(observed) for name, observed in seen.items() if observed.calls != 1}
    reasons |= {name: _read(found) for name, observed in seen.items() if (found := observed.follows.elsewhere)}
    return reasons | {name: _NO_ROWS for name in seen if not any(rows[name])}


def _mixed(mixing: str | None) -> list[str]:
    """Where samples see each other."""
    return [f"{mixing}: {_THESE_BATCHES}"] if mixing else []


def _overruled(recipe: Recipe, sites: Mapping[str, Site]) -> list[str]:
    """Where a ReLU that the caller named is not all that reads a layer, so that errors count before it."""
    names = [
        name
        for name, site in sites.items()
        if looked_up(recipe.activations, name) == "relu" and recipe.fit is None and site.fit == "ball"
    ]
    return [f"activations: more than the ReLU reads {', '.join(names)}: errors count before it there"] if names else []


def _site(
    model: nn.Module,
    chosen: Mapping[str, nn.Module],
    taps: Mapping[str, tuple[Tap, ...]],
    seen: Mapping[str, Observed],
    recipe: Recipe,
    name: str,
    norm: str | None,
) -> Site:
    """What is planned for a layer with this norm in its program, or without one."""
    follows = seen[name].follows
    activation = looked_up(recipe.activations, name) or (follows.activation if norm is None else follows.behind)
    fit = layer_fits(recipe.fit, {name: activation}, FITS)[name]
    module = None if norm is None else model.get_submodule(norm)
    return Site(name, chosen[name], taps[name], activation, norm, module, fit, seen[name].calls)


def _mode(recipe: Recipe, seen: Mapping[str, Observed]) -> tuple[str, tuple[str, ...]]:
    """The mode that was asked for, or the one that suits what was; and what to say of it.

    An eps of each layer is kept as it was asked for in parallel mode, while cascade may have to raise it. Where nothing
    is promised of single layers it is cascade, but where that would leave layers out.
    """
    if recipe.mode is not None:
        return recipe.mode, ()
    if recipe.eps is not None:
        return "parallel", ()
    repeated = [name for name, observed in seen.items() if observed.calls != 1]
    if not repeated:
        return "cascade", ()
    return "parallel", (
        f"parallel mode, since cascade would leave layers that are not called exactly once: {', '.join(repeated)}",
    )


def _repeated(observed: Observed) -> str:
    times = "a number of times that differs between batches" if observed.calls is None else f"{observed.calls} times"
    return (
        f"it is called {times} in one forward, so in cascade its inputs would depend on its own pruned weights: use "
        "mode='parallel'"
    )


def _read(operations: Sequence[str]) -> str:
    return (
        f"its weight or bias is also read by {', '.join(operations)} outside the layer's own call, and weights can be "
        "pruned for one use only: give that use a copy"
    )


def _folded(
    model: nn.Module, chosen: Mapping[str, nn.Module], seen: Mapping[str, Observed], recipe: Recipe, ties: Ties
) -> dict[str, str | None]:
    """The norm that is part of each layer's program."""
    found: dict[str, str | None] = {}
    for name, observed in seen.items():
        norm = observed.follows.norm if recipe.norms == "fold" and observed.calls == 1 else None
        if norm is not None:
            norm = None if norm in ties.refused else norm  # another module's shift would change with it
        if norm is not None:
            shift = model.get_submodule(norm).get_parameter("bias")
            weight = chosen[name].get_parameter("weight")
            norm = norm if (shift.dtype, shift.device) == (weight.dtype, weight.device) else None
        found[name] = norm
    return found
