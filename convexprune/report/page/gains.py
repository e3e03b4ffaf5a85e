"""What sparsity buys, and where it buys nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convexprune.report.page.numerals import DASH, change, count, data, duration, figure, number, operations, part
from convexprune.report.page.saved import Saved

_SCATTER = 0.1  # what medians of times differ by from one measurement to the next


@dataclass(frozen=True)
class Card:
    """One figure that matters, and what it is to be read with."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Gain:
    """One row: what, before, after, the change, a remark."""

    what: str
    before: str
    after: str
    change: str
    remark: str = ""

    @property
    def kind(self) -> str:
        """Whether it is one."""
        return "good" if self.change.startswith("−") else "bad" if self.change.startswith("+") else "plain"


def cards(saved: Saved) -> list[Card]:
    """The figures of the summary."""
    report = saved.report
    before, after = number(report.get("nonzeros_before")), number(report.get("nonzeros"))
    share = after / before if after is not None and before else None
    found = [Card("Weights left", part(share), f"{count(after)} of {count(before)} in the pruned layers")]
    return [*found, _accuracy(report), _network(report), *_costs(saved)]


def _accuracy(report: Mapping[str, Any]) -> Card:
    told = report.get("accuracy") or {}
    before, after = number(told.get("before")), number(told.get("after"))
    if before is None or after is None:
        return Card("Accuracy", DASH, "no labelled samples were given")
    points = 100 * (after - before)
    sign = "−" if points < 0 else "+"
    return Card("Accuracy", part(after, 2), f"{part(before, 2)} before, {sign}{abs(points):.2f} points")


def _network(report: Mapping[str, Any]) -> Card:
    told = report.get("network") or {}
    error = number(told.get("error"))
    error = number(report.get("output_error")) if error is None else error
    bound = number(told.get("bound"))
    if bound is not None:
        note = f"the bound of {figure(bound)} is vacuous" if told.get("vacuous") else f"at most {figure(bound)}, proven"
    else:
        note = f"no bound: {told['reason']}" if told.get("reason") else "measured; no bound was derived"
    return Card("Network error", figure(error), note if error is not None else "no calibration data")


def _costs(saved: Saved) -> list[Card]:
    extras = saved.extras
    if extras is None:
        return []
    before, after = extras.data["storage"]["before"], extras.data["storage"]["after"]
    formats = {"dense": after["dense"], "CSR": after["csr"], "2:4": after["two_four"]}
    best = min((name for name, size in formats.items() if size is not None), key=lambda name: formats[name])
    gain = change(before["dense"], formats[best])
    note = f"{best}; {data(before['dense'])} dense before, {gain}"
    found = [Card("Storage of weights", data(formats[best]), "no format is smaller" if gain == "no change" else note)]
    if extras.data.get("flops"):
        now = extras.data["flops"]["after"]
        old = extras.data["flops"]["before"] or {}
        base = number(old.get("dense")) or number(now["dense"])
        left = now["remaining"] / base if base else None
        found.append(Card("Operations", part(left), f"if zeros are skipped; {operations(base)} FLOPs a batch before"))
    if extras.data.get("latency"):
        taken = extras.data["latency"]
        old, now = number(taken["before"]), number(taken["model"])
        gain = _pace(extras.data)
        note = f"{duration(old)} before: {gain}" if old else "not timed before"
        found.append(Card("Forward, dense", duration(now), note))
    return found


def gains(saved: Saved) -> list[Gain]:
    """The table of costs; empty without extras."""
    if saved.extras is None:
        return []
    told = saved.extras.data
    found = _storage(told["storage"]["before"], told["storage"]["after"])
    if told.get("flops"):
        found += _flops(told["flops"]["before"] or {}, told["flops"]["after"])
    return found + (_times(told) if told.get("latency") else [])


def _storage(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Gain]:
    dense = before["dense"]
    rows = [
        Gain("All weights, dense", data(dense), data(after["dense"]), change(dense, after["dense"]), _ZEROS),
        Gain(
            f"All weights, CSR with {after['index_bits']}-bit indices",
            data(dense),
            data(after["csr"]),
            change(dense, after["csr"]),
            "before: dense",
        ),
        Gain(
            "All weights, 2:4 where it fits",
            data(dense),
            data(number(after["two_four"])),
            change(dense, number(after["two_four"])),
            "before: dense" if after["two_four"] is not None else "no layer has the pattern",
        ),
        Gain("File", data(before["file"]), data(after["file"]), change(before["file"], after["file"]), "safetensors"),
    ]
    if number(after["gzip"]) is not None:
        old, new = number(before["gzip"]), number(after["gzip"])
        rows.append(Gain("File, gzip", data(old), data(new), change(old, new)))
    return rows


def _flops(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Gain]:
    old = number(before.get("dense"))
    batch = f"FLOPs, batch of {count(after['samples'])}"
    remaining = number(before.get("remaining"))
    return [
        Gain(f"{batch}, dense kernels", operations(old), operations(after["dense"]), change(old, after["dense"]), _ALL),
        Gain(
            f"{batch}, zeros skipped",
            operations(remaining),
            operations(after["remaining"]),
            change(remaining, after["remaining"]),
            "for kernels that skip zeros",
        ),
    ]


def _pace(told: Mapping[str, Any]) -> str:
    """The change of the dense forward's time; with as many operations as before it is the machine's, and no gain."""
    taken, before, after = told["latency"], told["flops"]["before"], told["flops"]["after"]
    same = before is not None and before["dense"] == after["dense"]
    return "no gain" if same else change(number(taken["before"]), number(taken["model"]), _SCATTER)


def _times(costs: Mapping[str, Any]) -> list[Gain]:
    told = costs["latency"]
    old, batch = number(told["before"]), f"batch of {count(told['samples'])}"
    rows = [
        Gain(
            f"Forward, dense kernels, {batch}",
            duration(old),
            duration(told["model"]),
            _pace(costs) if old else DASH,
            f"median of {count(told['repeats'])}; {_SAME if _pace(costs) == 'no gain' else _NOISE}",
        )
    ]
    if told["layers"]:
        gain = change(told["dense"], told["csr"], _SCATTER)
        remark = "before: the dense products of the layers as pruned"
        rows.append(
            Gain(f"Products of the layers, CSR, {batch}", duration(told["dense"]), duration(told["csr"]), gain, remark)
        )
    return rows


_ZEROS = "a zero takes as much room as any number"
_ALL = "they multiply by zeros too"
_SAME = "as many operations as before, so a difference is scatter"
_NOISE = "differences below a tenth count as none"
