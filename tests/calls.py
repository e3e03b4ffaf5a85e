"""``prune_`` with options, targets and data as keywords, so that a test says in one line what it is about."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

import convexprune.preview
from convexprune import Data, Eps, Guarantee, NetworkEps, Neurons, Options, Report, Sparsity
from convexprune.preview import Preview
from convexprune.pruners import PRUNERS, Pruner
from convexprune.targets import Target

_OPTIONS = {field.name for field in fields(Options)}
_DATA = {field.name for field in fields(Data)} - {"inputs"}
_CALL = {"run", "jobs", "progress", "callback", "stop"}


def prune_(
    model: nn.Module, data: Any = None, target: Any = None, *, method: str | Pruner | None = None, **keywords: Any
) -> Report:
    """As ``convexprune.prune_``; what is no option of the run is one of the solver.

    A number, a list or a table as target is an eps. ``network_eps``, ``guarantee``, ``objective``, ``scope``, ``unit``
    and ``search`` make up the other targets.
    """
    call = {name: keywords.pop(name) for name in _CALL & keywords.keys()}
    return convexprune.prune_(model, **_arguments(data, target, method, keywords), **call)


def preview(
    model: nn.Module, data: Any = None, target: Any = None, *, method: str | Pruner | None = None, **keywords: Any
) -> Preview:
    """As ``convexprune.preview.preview``, with the keywords of ``prune_`` above."""
    call = {name: keywords.pop(name) for name in {"jobs"} & keywords.keys()}
    return convexprune.preview.preview(model, **_arguments(data, target, method, keywords), **call)


def _arguments(data: Any, target: Any, method: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    read = {name: keywords.pop(name) for name in _DATA & keywords.keys()}
    target, method = _target(target, method, keywords)
    options = {name: keywords.pop(name) for name in _OPTIONS & keywords.keys()}
    if keywords:
        options["solver_options"] = keywords
    how = data if data is None else Data(data, **read)
    return {"data": how, "target": target, "method": method, "options": Options(**options)}


def _target(target: Any, method: Any, keywords: dict[str, Any]) -> tuple[Any, Any]:
    eps, sparsity, network = (keywords.pop(name, None) for name in ("eps", "sparsity", "network_eps"))
    own = {name: keywords.pop(name) for name in ("guarantee", "objective") if name in keywords}
    scope, unit, search = (
        keywords.pop(n, d) for n, d in (("scope", "layer"), ("unit", "weights"), ("search", "budget"))
    )
    if isinstance(target, str | Target):
        return target, method
    if network is not None:
        return NetworkEps(network, **own), method
    if sparsity is not None:
        kind = Neurons if unit == "neurons" else Sparsity
        return kind(sparsity, scope), method or ("net-trim" if search == "path" else None)
    eps = target if eps is None else eps
    return (None if eps is None else Eps(eps)), method


def coreset_prune_(
    model: nn.Module, data: Any = None, method: Any = "lowner", size: Any = 0.5, **keywords: Any
) -> Report:
    """A coreset of a model by the ``size`` that stays: a part, a count, a ``Guarantee``, or a table of these."""
    known = {*_OPTIONS, *_DATA, *_CALL, "scope"}
    own = {name: keywords.pop(name) for name in list(keywords) if name not in known}
    pruner = PRUNERS.make(method, own)[1]
    scope = keywords.pop("scope", "layer")
    kind = Neurons if getattr(pruner, "items", "weights") == "neurons" else Sparsity
    values = size if isinstance(size, Mapping) else {"": size}
    if any(isinstance(value, Guarantee) for value in values.values()):
        deltas = {value.delta for value in values.values()}
        eps = {name: value.eps for name, value in values.items()}
        target: Target = Guarantee(eps if isinstance(size, Mapping) else eps[""], *deltas)
    else:
        gone = {name: value if isinstance(value, int) else 1 - value for name, value in values.items()}
        target = kind(gone if isinstance(size, Mapping) else gone[""], scope)
    return prune_(model, data, target, method=pruner, **keywords)
