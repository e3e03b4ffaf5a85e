"""What will be pruned, and how: the layers of a model, found out by one pass over the calibration data."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import escape

from torch import nn

from convexprune.errors import NothingToPrune
from convexprune.layers import weight_matrices
from convexprune.network.calibration import Calibration
from convexprune.network.choosing import Ties, by_first_names, check_patterns, choose_layers, find_ties, looked_up
from convexprune.network.following import Observed
from convexprune.network.forwards import Forward, check_module
from convexprune.network.padding import Counted
from convexprune.network.passes import Observation, observe
from convexprune.network.sightings import Sightings, visible_size
from convexprune.network.taps import Tap, tap
from convexprune.options import Options
from convexprune.report.report import SkippedModule
from convexprune.runs.checks import CheckedPlan
from convexprune.runs.fits import FITS, layer_fit
from convexprune.runs.layer import Layer
from convexprune.targets import Eps, Target

_UNCALLED = "its forward was not called on the calibration data, so its inputs are not known"
_NO_ROWS = "it is called with no rows of the calibration data that count, so its inputs are not known"
_REPEATED = (
    "it is called {} in one forward, so in cascade its inputs would depend on its own pruned weights: use "
    "mode='parallel'"
)
_READ = (
    "its weight or bias is also read by {} outside the layer's own call, and weights can be pruned for one use only: "
    "give that use a copy"
)
_THESE_BATCHES = "what is promised holds for the batches as they were given, and for no others"


@dataclass(frozen=True, eq=False)
class Plan:
    """What is known before anything is pruned.

    Attributes:
        layers: By name, in the order of their first calls; without data in the model's order.
        order: Their names in the model's order.
        skipped: Modules that hold weights and are not pruned, each with the reason.
        samples: Calibration samples.
        size: ‖f(x)‖_F over them, of outputs that count.
        counted: Which rows count.
        rows: P of each group, of rows that count.
        notices: What limits the meaning of all figures.
        mixing: Whether samples of a batch see each other.
        mode: "parallel" or "cascade".
        tests: How much the plan was put to the test: forwards, and samples in each.
    """

    layers: Mapping[str, Layer]
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
        left = [SkippedModule.of(name, self.layers[name].module, why) for name, why in reasons.items()]
        rest = self.only([name for name in self.order if name not in reasons])
        return replace(rest, skipped=(*self.skipped, *left))

    def only(self, names: Sequence[str]) -> "Plan":
        """The same with these layers alone."""
        layers = {name: layer for name, layer in self.layers.items() if name in names}
        return replace(self, layers=layers, order=tuple(name for name in self.order if name in layers))


def first_names(model: nn.Module, options: Options, target: Target) -> tuple[Options, Target]:
    """The same with tables in which a layer of several names goes by the first, as it does in a plan."""
    uses = dict.fromkeys(find_ties(check_module(model)).uses.values())
    tables = {name: by_first_names(name, getattr(options, name), uses) for name in ("fit", "activations")}
    options = replace(options, **tables)  # type: ignore[arg-type]
    value = by_first_names(target.kind, target.table, uses)
    return options, target if target.table is None else dataclasses.replace(target, value=value)  # type: ignore[type-var]


def make_plan(
    model: nn.Module,
    data: Calibration | None,
    options: Options,
    target: Target,
    forward: Forward | None,
    progress: Callable[[int, int], None],
    *,
    default_fit: str | None = None,
    names: Sequence[str] | None = None,
) -> Plan:
    """The layers to prune, where their inputs are seen, and what follows them.

    Args:
        model: The trained network.
        data: Gone through once; without any nothing is known of inputs and of what follows layers.
        options: How to prune.
        target: What its table says of layers must name some.
        forward: As in ``Data``.
        progress: Called as ``progress(done, total)``.
        default_fit: The fit of layers for which none is chosen; None: "relu-ball" before a ReLU, "ball" elsewhere.
        names: Of the layers, in the place of the options' patterns.

    Raises:
        NothingToPrune: No layer can be pruned, none is reached, or the patterns choose none.
        NonFinite: Weights, or what reaches a layer, hold NaN or infinity.
        InvalidInput: An unknown fit, a pattern of a table that matches no layer, pruned or not, or a model that cannot
            be called on a batch.
    """
    chosen, skipped = choose_layers(model, options.layers if names is None else [escape(name) for name in names])
    known = [*chosen, *(module.name for module in skipped)]
    for argument, table in (("activations", options.activations), ("fit", options.fit), (target.kind, target.table)):
        check_patterns(argument, table, known)
    for module in chosen.values():
        weight_matrices(module)  # NaN in any layer is found first
    ties = find_ties(model)
    taps = {name: tuple(tap(model, use) for use in ties.uses_of(name)) for name in chosen}
    making = _Making(model, options, chosen, taps, default_fit)
    if data is None:
        layers = {name: making.layer(name) for name in chosen}
        return Plan(layers, tuple(chosen), tuple(skipped), 0, 0.0, Counted(), {}, mode=options.mode or "parallel")
    found, counted, rows = _observed(model, data, taps, forward, progress)
    making.seen = found.layers
    mode, chosen_for = _mode(options, target, found.layers)
    reasons = _unusable(chosen, found.layers, rows, mode)
    check = CheckedPlan(
        {name: making.layer(name, making.norm(name, ties)) for name in found.layers if name not in reasons},
        without_norm=lambda planned: making.layer(planned.name),
        given=lambda name: making.given(name) is not None,
    )
    for batch, seen in found.examples:
        check.test(model, batch, seen, forward)
    reasons |= check.left
    if not check.layers:
        raise NothingToPrune(f"no layer can be pruned: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}")
    left = [SkippedModule.of(name, chosen[name], reason) for name, reason in reasons.items()]
    mixed = [f"{check.mixing}: {_THESE_BATCHES}"] if check.mixing else []
    return Plan(
        layers=check.layers,
        order=tuple(name for name in chosen if name in check.layers),
        skipped=(*skipped, *left),
        samples=found.samples,
        size=visible_size(model, data, counted, forward) if any(counted.outputs) else found.size,
        counted=counted,
        rows={name: rows[name] for name in check.layers},
        notices=(*counted.notices(), *mixed, *chosen_for, *making.overruled(check.layers)),
        mixing=check.mixing is not None,
        mode=mode,
        tests={"forwards": check.forwards, "samples": check.samples},
    )


def _observed(
    model: nn.Module,
    data: Calibration,
    taps: Mapping[str, tuple[Tap, ...]],
    forward: Forward | None,
    progress: Callable[[int, int], None],
) -> tuple[Observation, Counted, dict[str, tuple[int, ...]]]:
    """One pass over the data: what reaches layers, which positions count, and P of each group of a layer."""
    passing = Sightings(model, data.mask)
    found = observe(
        model, passing.over(data), taps, forward=forward, see=passing.see, progress=lambda done: progress(done, done)
    )
    if not found.layers:
        raise NothingToPrune(f"the calibration data reaches none of {', '.join(taps)}: check layers and forward")
    counted = passing.counted(taps, forward)
    return found, counted, {name: passing.rows(name, counted) for name in found.layers}


@dataclass(eq=False)
class _Making:
    """Layers made of what was chosen and seen."""

    model: nn.Module
    options: Options
    chosen: Mapping[str, nn.Module]
    taps: Mapping[str, tuple[Tap, ...]]
    default_fit: str | None
    seen: Mapping[str, Observed] = field(default_factory=dict)

    def layer(self, name: str, norm: str | None = None) -> Layer:
        """A layer with this norm in its program, or without one."""
        observed = self.seen.get(name)
        activation = looked_up(self.options.activations or {}, name)
        if activation is None and observed is not None:
            activation = observed.activation if norm is None else observed.behind
        default = self.default_fit or ("relu-ball" if activation == "relu" else "ball")
        given = self.given(name)
        fit = FITS[default] if given is None else layer_fit(given, f"fit of {name}")
        module = None if norm is None else self.model.get_submodule(norm)
        calls = None if observed is None else observed.calls
        return Layer(name, self.chosen[name], self.taps[name], activation, norm, module, fit, calls)

    def given(self, name: str) -> object:
        """The fit that the options choose for a layer; None if they leave it open."""
        fit = self.options.fit
        return looked_up(fit, name) if isinstance(fit, Mapping) else fit

    def norm(self, name: str, ties: Ties) -> str | None:
        """The norm that is part of a layer's program; none whose shift another module has, too, or lies elsewhere."""
        observed = self.seen[name]
        norm = None if observed.norm in ties.refused else observed.norm
        if norm is None or self.options.norms != "fold" or observed.calls != 1:
            return None
        shift = self.model.get_submodule(norm).get_parameter("bias")
        weight = self.chosen[name].get_parameter("weight")
        return norm if (shift.dtype, shift.device) == (weight.dtype, weight.device) else None

    def overruled(self, layers: Mapping[str, Layer]) -> list[str]:
        """Where a ReLU that the caller named is not all that reads a layer, so that errors count before it."""
        if self.options.fit is not None or self.default_fit is not None:
            return []
        named = [name for name in layers if looked_up(self.options.activations or {}, name) == "relu"]
        names = ", ".join(name for name in named if not layers[name].fit.relu)
        return [f"activations: more than the ReLU reads {names}: errors count before it there"] if names else []


def _mode(options: Options, target: Target, seen: Mapping[str, Observed]) -> tuple[str, tuple[str, ...]]:
    """The mode that was chosen, or the one that suits the target; and what to say of it.

    An eps of each layer is kept as it was given in parallel mode, while cascade may have to raise it. Where nothing is
    promised of single layers it is cascade, but where that would leave layers out.
    """
    if options.mode is not None:
        return options.mode, ()
    if isinstance(target, Eps):
        return "parallel", ()
    repeated = [name for name, observed in seen.items() if observed.calls != 1]
    if not repeated:
        return "cascade", ()
    return "parallel", (
        f"parallel mode, since cascade would leave layers that are not called exactly once: {', '.join(repeated)}",
    )


def _unusable(
    chosen: Mapping[str, nn.Module], seen: Mapping[str, Observed], rows: Mapping[str, tuple[int, ...]], mode: str
) -> dict[str, str]:
    """The layers of which no problems can be made, each with the reason."""
    reasons = {name: _UNCALLED for name in chosen if name not in seen}
    for name, observed in seen.items():
        if mode == "cascade" and observed.calls != 1:
            several = "a number of times that differs between batches"
            times = several if observed.calls is None else f"{observed.calls} times"
            reasons[name] = _REPEATED.format(times)
        if observed.elsewhere:
            reasons[name] = _READ.format(", ".join(observed.elsewhere))
        if not any(rows[name]):
            reasons[name] = _NO_ROWS
    return reasons
