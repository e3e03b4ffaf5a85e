"""What is to be pruned, and how: layers by name patterns, their fits, their eps."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from convexprune.errors import NothingToPrune
from convexprune.layers import unsupported
from convexprune.layers.support import kind_of
from convexprune.network.patterns import excluding, is_chosen, looked_up, name_patterns, unmatched
from convexprune.network.ties import Ties, find_ties, named_uses
from convexprune.report.report import SkippedModule
from convexprune.solvers.arrays import checked_radius
from convexprune.solvers.errors import InvalidInput


def choose_layers(
    model: nn.Module,
    patterns: str | Iterable[str] | None = None,
    kinds: tuple[type[nn.Module], ...] | None = None,
) -> tuple[dict[str, nn.Module], list[SkippedModule]]:
    """The layers to prune by qualified name, and every other module that holds weights, with the reason.

    Layers that share weight and bias are one layer with several uses (``convexprune.network.ties``). It goes by the
    name of its first use, and is chosen, or left out, by a pattern of any of them.

    Args:
        model: Any module.
        patterns: Shell patterns of qualified names ("features.*"), and of those to leave out ("!stem"); None: every
            layer.
        kinds: Only such modules, and none that share a parameter; None: every kind that can be pruned.

    Raises:
        NothingToPrune: No layer can be pruned, or a pattern matches none of them.
        InvalidInput: The model is no module, or a pattern no text.
    """
    wanted = None if patterns is None else name_patterns(patterns)
    holders = {name: module for name, module in named_uses(check_module(model)).items() if _holds_weights(module)}
    ties = find_ties(model, joint=kinds is None)
    reasons = {name: _reason(name, module, wanted, ties, kinds) for name, module in holders.items()}
    chosen = {name: module for name, module in holders.items() if reasons[name] is None}
    skipped = [SkippedModule(name, type(holders[name]).__name__, why) for name, why in reasons.items() if why]
    idle = unmatched(wanted or [], [use for name in chosen for use in ties.uses_of(name)], holders)
    if idle or not chosen:
        what = f"no layer that can be pruned matches {idle}" if idle else "the model has no layer that can be pruned"
        listing = "; ".join(f"{s.name or 'the model'} ({s.kind}): {s.reason}" for s in skipped) or "no weights at all"
        raise NothingToPrune(f"{what}. These can be: {', '.join(chosen) or 'none'}. These not: {listing}")
    return chosen, skipped


def layer_eps(eps: float | Sequence[float] | Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The eps of each layer: one for all, one a layer in order, or by name pattern.

    Raises:
        InvalidTolerance: A negative, NaN or infinite eps.
        InvalidInput: Their number is not that of the layers, or a layer has none.
    """
    if isinstance(eps, Mapping):
        values = {name: looked_up(eps, name) for name in names}
        missing = [name for name, value in values.items() if value is None]
        if missing:
            remedy = "add one, or '*', or leave them as trained with layers='!…'"
            raise InvalidInput(f"eps: no pattern among {list(eps)} matches {', '.join(missing)}; {remedy}")
        return {name: checked_radius(f"eps of {name}", value) for name, value in values.items() if value is not None}
    if isinstance(eps, Sequence) and not isinstance(eps, str):
        if len(eps) != len(names):
            raise InvalidInput(f"eps: expected {len(names)} numbers, one for each of {list(names)}; found {len(eps)}")
        return {name: checked_radius(f"eps of {name}", value) for name, value in zip(names, eps, strict=True)}
    return dict.fromkeys(names, checked_radius("eps", eps))


def layer_fits(
    fit: str | Mapping[str, str] | None, activations: Mapping[str, str | None], known: Iterable[str]
) -> dict[str, str]:
    """The fit of each layer; where none is given, "relu-ball" before a ReLU and "ball" elsewhere.

    Args:
        fit: A name for all layers, or names by pattern, or None.
        activations: What follows each layer, by its name.
        known: Fit names that exist.

    Raises:
        InvalidInput: An unknown fit.
    """
    fits = {}
    for name, activation in activations.items():
        given = looked_up(fit, name) if isinstance(fit, Mapping) else fit
        fits[name] = given or ("relu-ball" if activation == "relu" else "ball")
        if not isinstance(fits[name], str) or fits[name] not in known:
            raise InvalidInput(f"fit of {name}: expected one of {', '.join(known)}, found {fits[name]!r}")
    return fits


def check_module(model: nn.Module) -> nn.Module:
    """The model itself.

    Raises:
        InvalidInput: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model: expected a torch.nn.Module, found {model!r}")
    return model


def _holds_weights(module: nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return kind_of(module) is not None or any(nn.parameter.is_lazy(p) or p.ndim >= 2 for p in own)


def _reason(
    name: str, module: nn.Module, wanted: list[str] | None, ties: Ties, kinds: tuple[type[nn.Module], ...] | None
) -> str | None:
    first, *more = uses = ties.uses_of(name)
    if wanted is not None and not is_chosen(uses, wanted):
        left_out = excluding(uses, wanted)
        return "not chosen by the name patterns" if left_out is None else f"left out by the name pattern {left_out!r}"
    if reason := unsupported(module) or ties.refused.get(name):
        return reason
    if kinds is not None and not isinstance(module, kinds):
        names = " and ".join(kind.__name__ for kind in kinds)
        return f"{type(module).__name__} is not for this method, which prunes {names} modules: leave it out"
    if name == first:
        return None
    return f"its weight is that of {first!r}: solved there for {'all' if more[1:] else 'both'}"
