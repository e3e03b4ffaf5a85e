"""Whole neurons of a network: chosen where their outputs are used, and really removed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from convexprune.errors import NothingToPrune
from convexprune.nettrim.goals import Goal, KeepInputs, RankInputs
from convexprune.nettrim.measuring import check_measured
from convexprune.nettrim.rows import answer_notes
from convexprune.nettrim.run import Run
from convexprune.nettrim.sites import Site
from convexprune.nettrim.targets import Each
from convexprune.network.graph import LAYERS, inputs_of
from convexprune.network.links import Link, find_links
from convexprune.network.patterns import is_chosen, unmatched
from convexprune.network.shrink import mask_neurons_, remove_neurons_
from convexprune.report.report import LayerReport, SkippedModule


def chosen_links(model: nn.Module, patterns: Sequence[str] | None) -> tuple[dict[str, Link], list[SkippedModule]]:
    """The links of which a producer's name matches and none is left out, and the other modules that hold weights.

    Raises:
        NothingToPrune: No neurons can be removed, or a pattern matches none that can.
        UnsupportedModule: The model cannot be traced.
    """
    links, skipped = find_links(model, residual=True)
    wanted = ["*"] if patterns is None else list(patterns)
    names = [name for link in links.values() for name in link.producers]
    idle = unmatched(wanted, names, (module.name for module in skipped))
    chosen = {name: link for name, link in links.items() if is_chosen(link.producers, wanted)}
    if idle or not chosen:
        reasons = "; ".join(f"{module.name}: {module.reason}" for module in skipped) or "it has no layers"
        raise NothingToPrune(f"layers: {idle or wanted} match no layer of which neurons can be removed: {reasons}")
    left = [name for name in links if name not in chosen]
    return chosen, [*skipped, *(SkippedModule(n, type(model.get_submodule(n)).__name__, _UNWANTED) for n in left)]


def reachable(links: Mapping[str, Link], sites: Mapping[str, Site]) -> tuple[dict[str, Link], list[SkippedModule]]:
    """The links whose consumers are all fitted in this run, and the first producers of the others, with the reason.

    Raises:
        NothingToPrune: There are none.
    """
    open_ends = {name: [user for user in link.consumers if user not in sites] for name, link in links.items()}
    left = [
        SkippedModule(name, "link", f"its outputs go to {', '.join(users)}, which cannot be fitted in this run")
        for name, users in open_ends.items()
        if users
    ]
    if len(left) == len(links):
        raise NothingToPrune(f"no neurons can be removed: {'; '.join(f'{m.name}: {m.reason}' for m in left)}")
    return {name: link for name, link in links.items() if not open_ends[name]}, left


_UNWANTED = "not chosen by the name patterns"


@dataclass
class NeuronSparsity:
    """All but a part of the neurons of each link, or of the network, removed.

    A neuron is ranked by the eps at which it vanishes along the paths of the layers that take it, the last of them.

    Attributes:
        links: By name of the first producer.
        part: To remove.
        network: Whether it is a part of all neurons, rather than of each link's.
        kept: Once pursued, the neurons that stay, by link.
    """

    links: Mapping[str, Link]
    part: float
    network: bool

    def __post_init__(self) -> None:
        self.kept: dict[str, list[int]] = {}
        self._before: dict[str, tuple[tuple[int, ...], int]] = {}

    def pursue(self, run: Run) -> dict[str, Goal]:
        """Rank, choose, and fit the consumers to what stays; nothing is removed yet."""
        layers = [(name, module) for name, module in run.model.named_modules() if isinstance(module, LAYERS)]
        weights = {
            name: module.get_parameter("weight")
            for name, module in layers
            if module._parameters.get("weight") is not None
        }
        self._before = {name: (tuple(w.shape), int(w.count_nonzero())) for name, w in weights.items()}
        widths = {name: _width(run.model, link) for name, link in self.links.items()}
        goals = {user: RankInputs(widths[name]) for name, link in self.links.items() for user in link.consumers}
        found = dict(run.answers({name: goals[name] for name in run.sites}))
        if run.stopped is not None:
            return {}
        check_measured(found)
        ranks = {user: [(eps, share) for eps, share, _ in answers[0].path] for user, answers in found.items()}
        worth = {
            name: [max(values) for values in zip(*(ranks[user] for user in link.consumers), strict=True)]
            for name, link in self.links.items()
        }
        chosen = self._chosen(worth)
        kept = {user: tuple(chosen[name]) for name, link in self.links.items() for user in link.consumers}
        wanted = Each({user: KeepInputs(goals[user].neurons, kept[user]) for user in run.sites}).pursue(run)
        if run.stopped is not None:  # neurons go from all layers that take them, or from none
            run.versions.restore_()
            run.written.clear()
            return {}
        self.kept = chosen
        return wanted

    def _chosen(self, worth: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, list[int]]:
        """The neurons that stay, ascending; at least one of each link."""
        if not self.network:
            return {name: _best(values, round((1 - self.part) * len(values))) for name, values in worth.items()}
        every = sorted(
            ((value, name, c) for name, values in worth.items() for c, value in enumerate(values)),
            key=lambda entry: entry[0],
            reverse=True,
        )
        counts = dict.fromkeys(worth, 0)
        for _, name, _ in every[: round((1 - self.part) * len(every))]:
            counts[name] += 1
        return {name: _best(values, counts[name]) for name, values in worth.items()}

    def rows(self, run: Run) -> list[LayerReport]:
        """A row for each layer that changed, once it was shrunk."""
        if not self.kept:
            return []
        touched = {name for link in self.links.values() for name in (*link.producers, *link.consumers)}
        return [self._row(run, name) for name in self._before if name in touched]

    def _row(self, run: Run, name: str) -> LayerReport:
        weight = run.model.get_submodule(name).get_parameter("weight")
        site, answers = run.sites.get(name), run.written.get(name, ())
        before, nonzeros = self._before[name]
        link = next((link for link in self.links.values() if name in link.producers), None)
        size = math.hypot(*(answer.size for answer in answers)) or 1.0
        return LayerReport(
            name=name,
            shape=tuple(weight.shape),
            samples=answers[0].samples if answers else 0,
            nonzeros_before=nonzeros,
            nonzeros=int(weight.count_nonzero()),
            output_error=math.hypot(*(answer.error for answer in answers)) / size if answers else math.nan,
            seconds=sum(answer.solution.seconds.total for answer in answers),
            status="inputs and neurons" if link and answers else "inputs" if answers else "neurons",
            before=before,
            neurons=len(self.kept[link.producer]) if link and self.kept else before[0],
            fit=site.fit if site else "",
            norm=site.norm_name if site else None,
            notes=(
                *(site.notes if site else ()),
                *dict.fromkeys(note for each in answers for note in answer_notes(each)),
            ),
            returned=sum(answer.returned for answer in answers),
        )

    def shrink_(self, model: nn.Module, remove: bool) -> None:
        """Remove the other neurons, or leave zeros where they were."""
        apply_ = remove_neurons_ if remove else mask_neurons_
        for name, kept in self.kept.items():
            if len(kept) < _width(model, self.links[name]):
                apply_(model, self.links[name], torch.tensor(kept))


def _width(model: nn.Module, link: Link) -> int:
    """Neurons of a link."""
    return inputs_of(model.get_submodule(link.consumers[0])) // link.repeat[0]


def _best(values: Sequence[tuple[float, float]], count: int) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    return sorted(order[: max(1, count)])
