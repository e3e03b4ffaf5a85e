"""Which layers take a layer's outputs, and what happens to these on the way: all that changes with a removed neuron.

A neuron is an output of a Linear, or a filter of a convolution. It can be removed where every operation keeps it apart
from the others until the next layers, which then lose its columns. Where outputs of several layers are added, as in a
residual network, one neuron of each goes. The network's inputs have their samples first.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from convexprune.network.choosing import check_module
from convexprune.network.graph import LAYERS, Network
from convexprune.network.streams import Flow, Group
from convexprune.report.report import SkippedModule


@dataclass(frozen=True)
class Link:
    """A layer whose neurons can be removed, and the layers that take its outputs; modules by qualified name.

    Attributes:
        producer: The Linear or convolution.
        norms: BatchNorm modules on the way.
        activation: The elementwise nonlinearity on the way ("relu"), behind all norms; None if there is none; "own
            softplus" if it has other parameters than the default ones; "several: relu, identity" if ways differ, and
            "several: tanh then relu" or "several: relu then norm" if one has more to it, such as a norm without running
            statistics: "several: norm by the batch then relu". Behind a sum of several outputs it begins with "add".
        consumers: The Linear and convolution modules that take the outputs.
        repeat: For each consumer, how many of its inputs belong to one neuron: 1, or the positions of a flattened map.
            Neuron c owns inputs c·repeat to (c + 1)·repeat − 1.
        partners: The other layers whose outputs are added to the producer's, or multiplied with them: neuron c is
            removed from all of them.
        along: What else on the way has weights for each neuron: depthwise convolutions, and PReLUs with a slope for
            each channel.
    """

    producer: str
    norms: tuple[str, ...]
    activation: str | None
    consumers: tuple[str, ...]
    repeat: tuple[int, ...]
    partners: tuple[str, ...] = ()
    along: tuple[str, ...] = ()

    @property
    def producers(self) -> tuple[str, ...]:
        """All layers that lose neurons."""
        return (self.producer, *self.partners)


def find_links(model: nn.Module, *, residual: bool = False) -> tuple[dict[str, Link], list[SkippedModule]]:
    """The layers whose neurons can be removed, by name, and every other module that holds weights, with the reason.

    Both are in the order in which forward calls them; modules that it does not call come last. The model is traced in
    eval mode, with the defaults of forward's options; it is not run, and left as found. It is traced in train mode too:
    a layer whose outputs go to other modules or outputs there, such as a second classifier, has no link. What train
    mode alone does without weights (noise, dropped paths) is taken to fit any number of neurons.

    Args:
        model: Any module that torch.fx can trace.
        residual: False: Linear and Conv2d layers that can lose neurons alone, with nothing but batch norms,
            activations and pools on the way. True: also layers that are added to each other, or multiplied, as one link
            by the name of the first that is called; Conv1d and Conv3d; and on the way depthwise convolutions, PReLUs
            with a slope for each channel, arithmetic with numbers, and means, sums and maxima over positions.

    Raises:
        InvalidInput: The model is no module.
        UnsupportedModule: The model's forward cannot be traced, in eval or in train mode.
    """
    network = Network(check_module(model), LAYERS if residual else (nn.Linear, nn.Conv2d))
    groups, links = Flow(network, residual).groups, dict[str, Link]()
    skipped, linked = [], set[str]()
    for name in network.calls:
        module = network.modules[name]
        matrices = any(nn.parameter.is_lazy(p) or p.ndim >= 2 for p in module.parameters(recurse=False))
        if name in linked or not (matrices or isinstance(module, network.layers)):
            continue
        if reason := network.fault(name) or _reason(groups[name], name, module, residual):
            skipped.append(SkippedModule(name, type(module).__name__, reason))
        else:
            links[name] = _link(groups[name], list(network.calls))
            linked.update(links[name].producers, links[name].along)
    return links, skipped


def _reason(group: Group, name: str, layer: nn.Module, residual: bool) -> str | None:
    what, neurons = group.reason(name), "neurons" if isinstance(layer, nn.Linear) else "filters"
    if what:
        return f"its outputs {what}, so its {neurons} cannot be removed{'' if residual else ' alone'}"
    return None if group.repeat else "nothing uses its outputs"


def _link(group: Group, order: list[str]) -> Link:
    def called(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(names, key=order.index))

    producer, *partners = called(group.producers)
    consumers = called(group.repeat)
    repeat = tuple(group.repeat[name] for name in consumers)
    activation = _activation(list(group.ways))
    return Link(producer, called(group.norms), activation, consumers, repeat, tuple(partners), called(group.along))


def _activation(ways: list[tuple[str, ...]]) -> str | None:
    """What all ways have in common: norms, and then one activation at most; or that there is no such thing."""
    norms = [tuple(step for step in way if step.startswith("norm:")) for way in ways]
    first = all(way[: len(norms[0])] == before == norms[0] for way, before in zip(ways, norms, strict=True))
    rest = [way[len(norms[0]) :] if first else way for way in ways]
    if first and len(set(rest)) == 1 and len(rest[0]) <= 1:
        return rest[0][0] if rest[0] else None
    told = [" then ".join(step.split(":")[0] for step in way) or "identity" for way in rest]
    return f"several: {', '.join(dict.fromkeys(told))}"
