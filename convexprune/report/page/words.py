"""What was asked of a run, and what is certified of it, in plain words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convexprune.files.texts import visible
from convexprune.nettrim.goals import KEPT, REFITTED
from convexprune.report.page.numerals import count, duration, figure, number, part, small
from convexprune.report.page.saved import Saved
from convexprune.solvers import Status

Row = Mapping[str, Any]

NEURONS = ("neurons", "inputs", "inputs and neurons")
"""The statuses of layers in a run that removes whole neurons."""

_SOLVED, _BUDGET = str(Status.SOLVED), str(Status.NO_BOUND)
_ADVICE = {str(status): status.advice for status in Status} | {
    "rounded": "Certified before the weights were rounded to the module's dtype; after it the gap or the violation is "
    "beyond its tolerance. Prune in float32, or loosen tol or feas_tol."
}


@dataclass(frozen=True)
class Finding:
    """A sentence or two; kind is "good", "plain" or "bad", or "note" where nothing was asked."""

    kind: str
    text: str


def layer_name(name: str) -> str:
    """As it is shown; a model that is a single layer has none."""
    return visible(name, line=True) or "(the model)"


def asked(saved: Saved) -> list[str]:
    """What was asked, as sentences."""
    recipe = saved.report["provenance"]
    sentences = _coreset(recipe) if saved.coreset else _net_trim(recipe)
    samples, seconds = number(saved.report.get("samples")), number(saved.report.get("seconds"))
    data = f"{count(samples)} calibration samples" if samples else "No calibration data"
    return [*sentences, f"{data}; {duration(seconds)} for everything."]


def _coreset(recipe: Row) -> list[str]:
    where = "of all layers together" if recipe.get("scope") == "network" else "of each layer"
    gone = "and what is left out is really removed" if recipe.get("removed") else "and what is left out is set to zero"
    return [f"A coreset {where} by the method “{recipe['method']}”, of size {_told(recipe.get('size'))}, {gone}."]


def _net_trim(recipe: Row) -> list[str]:
    order = {
        "parallel": "Every layer is solved from what reaches it in the original network.",
        "cascade": "Layer after layer is solved, each from what the network pruned so far computes.",
    }
    sentences = [_budget(recipe) if recipe.get("sparsity") is not None else _radius(recipe)]
    if recipe.get("refit"):
        sentences.append("Weights are fitted again on the support found.")
    if recipe.get("keep_zeros"):
        sentences.append("Weights that were zero stay zero.")
    return [*sentences, order.get(str(recipe.get("mode")), "")]


def _radius(recipe: Row) -> str:
    if recipe.get("network_eps") is not None:
        how = "so that few weights are left in all" if recipe.get("objective") == "nonzeros" else "the same for each"
        sure = "by a bound" if recipe.get("guarantee") == "bound" else "as measured"
        return (
            f"The network's outputs within {_told(recipe['network_eps'])} of what they were, relative to their norm, "
            f"{sure} on the calibration data; what each layer may miss follows from that, {how}."
        )
    return (
        f"The least ℓ1 norm of each layer's weights with outputs within {_told(recipe.get('eps'))} of what they were, "
        "relative to their norm."
    )


def _budget(recipe: Row) -> str:
    sparsity = recipe["sparsity"]
    if isinstance(sparsity, str):
        n, _, m = sparsity.partition(":")
        return (
            f"At most {n} of {m} consecutive inputs' weights not zero, and outputs as near to what they were as can be."
        )
    whose = "of all pruned layers together" if recipe.get("scope") == "network" else "of each layer"
    path = ", with the support that the least error leaves on its ℓ1 path" if recipe.get("search") == "path" else ""
    if isinstance(sparsity, dict):
        return (
            f"By the layer's name ({_told(sparsity)}): that part of the weights {whose} to be zero, or at most n of m "
            f"consecutive inputs' weights not zero; and outputs as near to what they were as can be{path}."
        )
    wanted = part(number(sparsity), 0)
    if recipe.get("unit") == "neurons":
        gone = "removed" if recipe.get("remove") else "set to zero"
        return f"{wanted} of the neurons {whose} to be {gone}: those that what comes after them needs least."
    return f"{wanted} of the weights {whose} to be zero, and outputs as near to what they were as can be{path}."


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{pattern}: {_told(item)}" for pattern, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_told, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def findings(saved: Saved) -> list[Finding]:
    """What is certified, with every exception named."""
    told = _guarantees(saved.rows) if saved.coreset else _certificates(saved.rows)
    told += _network(saved.report.get("network"))
    head, stopped = saved.report.get("head") or [], saved.report["provenance"].get("stopped")
    told += [Finding("note", f"{_capital(str(line))}.") for line in head[1:]]
    if not saved.report.get("pruned", True) and not stopped and head:
        told.insert(0, Finding("bad", f"{_capital(str(head[0]))}."))
    elif not saved.rows:
        told.append(Finding("bad", "No layer was pruned."))
    idle = [str(module["name"]) for module in saved.report["skipped"] if "not reached" in str(module["reason"])]
    if stopped:
        left = f": {', '.join(map(layer_name, idle))} stay as they were" if idle else ""
        told.append(Finding("bad", f"The run ended early ({stopped}){left}."))
    return told


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _certificates(rows: Sequence[Row]) -> list[Finding]:
    by_status: dict[str, list[Row]] = {}
    for row in rows:
        by_status.setdefault(str(row["status"]), []).append(row)
    told = []
    for status, group in by_status.items():
        who = _who(group, rows)
        if status == _SOLVED:
            told.append(Finding("good", f"{who}: certified. {_proof(group)}"))
        elif status == REFITTED:
            text = (
                "the error is within what is promised. The weights were fitted again for a smaller error, so their ℓ1 "
            )
            told.append(Finding("good", f"{who}: {text}norm is no longer the least."))
        elif status == KEPT:
            text = "no better weights were found that keep the promise, so those that were trained stay."
            told.append(Finding("plain", f"{who}: {text}"))
        elif status == _BUDGET:
            text = (
                "the budget is kept, which is counted. Budgets are not convex, so nothing is proven of how near to the "
            )
            told.append(Finding("plain", f"{who}: {text}best these weights are; their error is measured."))
        elif status in NEURONS:
            lost = status.replace("inputs", "inputs that were others' neurons")
            text = f"lost {lost}. Which are worth least is an estimate, so nothing is proven; errors are measured"
            told.append(Finding("plain", f"{who}: {text}."))
        else:
            named = ", ".join(layer_name(str(row["name"])) for row in group)
            told.append(Finding("bad", f"Not certified: {named} ({status}). {_ADVICE.get(status, '')}".strip()))
    return told


def _proof(group: Sequence[Row]) -> str:
    gap = max((number(row["gap"]) or 0.0 for row in group), default=0.0)
    outside = max((number(row["violation"]) or 0.0 for row in group), default=0.0)
    beyond = f", but for a violation of {small(outside)} of that" if outside else ""
    return (
        f"The error on the calibration data is within what is promised{beyond}, and no weights that keep the promise "
        f"have an ℓ1 norm smaller by more than {part(gap, 2)}."
    )


def _network(told: Row | None) -> list[Finding]:
    """What holds of the network's outputs: first what the total that was asked for is about, then the rest."""
    if not told:
        return []
    wanted, by_bound = number(told.get("asked")), told.get("guarantee") != "measured"
    about = ("bound",) if by_bound else ("error", "holdout_error")
    figures = [value for name in about if (value := number(told.get(name))) is not None]
    kept = wanted is None or (bool(figures) and max(figures) <= wanted)
    told_of = {"bound": _bounded(told), "error": _measured(told)}
    first, second = told_of.pop(about[0]), *told_of.values()
    verdict = "" if wanted is None else f", {'within' if kept else 'more than'} the {_told(wanted)} asked for"
    kind = "note" if wanted is None else "good" if kept else "bad"
    return [Finding(kind, f"The network: {first}{verdict}. {second[:1].upper()}{second[1:]}.")]


def _measured(told: Row) -> str:
    error, held = number(told.get("error")), number(told.get("holdout_error"))
    more = "" if held is None else f", and by {figure(held)} on data held out"
    return f"as measured on the calibration data its outputs miss by {figure(error)}, relative to their norm{more}"


def _bounded(told: Row) -> str:
    bound = number(told.get("bound"))
    if bound is None:
        return f"no bound on its error is known, as {told.get('reason')}"
    vacuous = ", which is vacuous: far above what is measured" if told.get("vacuous") else ""
    return (
        f"by its layers' errors and norms its outputs miss by at most {figure(bound)}, relative to their norm{vacuous}"
    )


def _guarantees(rows: Sequence[Row]) -> list[Finding]:
    told = []
    given = [row for row in rows if row.get("guarantee")]
    holds = [row for row in given if row["status"] != "assumption fails"]
    if holds:
        text = "; ".join(dict.fromkeys(_guarantee(row) for row in holds))
        rests = " What that rests on is listed below the table." if any(row.get("assumptions") for row in holds) else ""
        told.append(Finding("good", f"{_who(holds, rows)}: {text}.{rests}"))
    told += [
        Finding("bad", f"The guarantee does not hold: {layer_name(str(row['name']))}, as an assumption fails.")
        for row in given
        if row not in holds
    ]
    # Where a guarantee was asked for, layers that only lost inputs have none of their own.
    rest = [row for row in rows if row not in given and not (given and row["status"] == "inputs only")]
    if rest:
        text = "a size was asked for, not a guarantee, so nothing is promised"
        measured = any(number(row.get("output_error")) is not None for row in rest)
        tail = "; errors are measured on the calibration data" if measured else ", and nothing was measured"
        told.append(Finding("plain", f"{_who(rest, rows)}: {text}{tail}."))
    return told


def _guarantee(row: Row) -> str:
    eps, delta = row["guarantee"]
    return f"with probability {figure(1 - delta)} at eps {eps:g}, {row.get('promise', '')}"


def _who(group: Sequence[Row], rows: Sequence[Row]) -> str:
    if len(group) == len(rows):
        return "The layer" if len(rows) == 1 else f"All {len(rows)} layers"
    if len(group) <= 6:
        return ", ".join(layer_name(str(row["name"])) for row in group)
    return f"{len(group)} of {len(rows)} layers"


def badge(told: Sequence[Finding], coreset: bool) -> Finding:
    """All of it in a word."""
    kinds = {finding.kind for finding in told} - {"note"}
    if "bad" in kinds:
        return Finding("bad", "with exceptions")
    if kinds == {"good"}:
        return Finding("good", "guaranteed" if coreset else "certified")
    return Finding("plain", "partly certified" if "good" in kinds else "measured, not certified")
