"""Which layers take a layer's outputs, and what happens to these on the way: all that changes with a removed neuron.

A neuron is an output of a Linear, or a filter of a convolution. It can be removed where every operation keeps it apart
from the others until the next layers, which then lose its columns. Where outputs of several layers are added, as in a
residual network, one neuron of each goes. The network's inputs have their samples first.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain

from torch import fx, nn

from convexprune.layers.kinds import LAYERS, NORMS
from convexprune.layers.support import altered
from convexprune.network import graph
from convexprune.network.choosing import holds_weights
from convexprune.network.forwards import check_module
from convexprune.network.graph import Network, inputs_of, operation_of, outputs_of
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
        pools: Pools on the way, modules by name, others as "maxpool2d", that torch has only for maps with channels:
            they keep a link from losing all its neurons.
        emptied: Layers that take the outputs, and have no neurons left: they lose inputs, too, and nothing changes.
    """

    producer: str
    norms: tuple[str, ...]
    activation: str | None
    consumers: tuple[str, ...]
    repeat: tuple[int, ...]
    partners: tuple[str, ...] = ()
    along: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()

    @property
    def producers(self) -> tuple[str, ...]:
        """All layers that lose neurons."""
        return (self.producer, *self.partners)


# Operations by name: small letters without underscores, the same for a module, a function and a method.
_ALIASES = {"alphadropout", "contiguous", "detach", "dropout", "dropout1d", "dropout2d", "dropout3d", "identity"}
_VIEWS = {*_ALIASES, "flatten", "reshape", "view"}
_POOLS = {"adaptiveavgpool", "adaptivemaxpool", "avgpool", "maxpool"}
_MEANS = {"adaptiveavgpool1d", "adaptiveavgpool2d"}  # the pools that take maps without channels
_ARITHMETIC = {*("add", "iadd", "isub", "rsub", "sub"), *("div", "imul", "itruediv", "mul", "truediv")}
_FATES = {
    "are the network's outputs": "output",
    "are added to others (residual connection)": "add iadd isub rsub sub",
    "are multiplied with others or scaled": "div imul itruediv mul truediv",
    "are concatenated with others": "cat concat concatenate hstack stack vstack",
    "are mixed with each other by a softmax": "logsoftmax softmax softmax2d softmin",
    "are normalised with each other": "groupnorm layernorm localresponsenorm normalize rmsnorm",
    "are taken apart, or reshaped otherwise than by flatten(x, 1)": "chunk flatten getitem reshape split unbind view",
    "are counted (by size or shape)": "shape size",
}
_FATE = {name: fate for fate, names in _FATES.items() for name in names.split()}

# Layouts of neurons: "last" is [samples, ..., neurons], "flat" [samples, neurons·positions], and "2d"
# [samples, neurons, rows, columns]; with the number of axes behind those of the neurons.
_AXES = {"last": 0, "flat": 0, "1d": 1, "2d": 2, "3d": 3}


class _Blocked(Exception):
    """What becomes of neurons, so that they cannot be removed."""


@dataclass(frozen=True)
class _Stream:
    """What a node of the graph holds of neurons."""

    producers: tuple[str, ...]  # the layers of which it is made; neuron c is computed of theirs of the same number
    neurons: int | None  # how many; None if the layer cannot lose any
    layout: str  # one of those above
    copies: int = 1  # channels that belong to one neuron, one after another
    way: tuple[str, ...] = ()  # activations and norms so far
    alone: bool = True  # whether no other node uses the tensor's memory


@dataclass
class _Group:
    """Layers that can lose neurons only together, and all that depends on these; names as in ``Link``."""

    producers: set[str]
    norms: set[str] = field(default_factory=set)
    along: set[str] = field(default_factory=set)
    pools: set[str] = field(default_factory=set)
    repeat: dict[str, int] = field(default_factory=dict)  # by consumer
    # The activations and norms before each consumer; a norm with running statistics as "norm:name".
    ways: dict[tuple[str, ...], None] = field(default_factory=dict)
    # Why neurons cannot be removed: of which producers, and what becomes of them.
    faults: list[tuple[tuple[str, ...], str]] = field(default_factory=list)

    def reason(self, producer: str, layer: nn.Module, residual: bool) -> str | None:
        """Why the producer cannot lose neurons; None if it can."""
        own = (what for producers, what in self.faults if producer in producers)
        others = (f"are combined with those of {names[0]!r}, which {what}" for names, what in self.faults)
        if what := next(chain(own, others), None):
            neurons = "neurons" if isinstance(layer, nn.Linear) else "filters"
            return f"its outputs {what}, so its {neurons} cannot be removed{'' if residual else ' alone'}"
        return None if self.repeat else "nothing uses its outputs"

    def absorb(self, other: "_Group") -> None:
        """Take over all that the other has."""
        for name in ("producers", "norms", "along", "pools", "repeat", "ways"):
            getattr(self, name).update(getattr(other, name))
        self.faults += other.faults


class _Flow:
    """Follows all neurons through the network, in one pass over its graph, into groups by producer."""

    def __init__(self, network: Network, residual: bool) -> None:
        self.network, self.residual = network, residual
        self.groups: dict[str, _Group] = {}
        self._streams: dict[fx.Node, _Stream] = {}
        for node in network.graph.nodes:
            stream = self._behind(node)
            if stream is not None:
                users = [user for user in node.users if not graph.reads_other_lengths(user, _AXES[stream.layout])]
                self._streams[node] = replace(stream, alone=stream.alone and len(users) == 1)

    def _behind(self, node: fx.Node) -> _Stream | None:
        """The neurons that the node holds, once those that reach it are accounted for."""
        taken = [self._streams[source] for source in node.all_input_nodes if source in self._streams]
        module, stream, name = self.network.called(node), None, str(node.target)
        layer = isinstance(module, LAYERS) and not (taken and self._is_carrier(module))
        try:
            if module and layer and taken:
                if taken[0].neurons is not None:
                    self._check(name, module, taken[0])
                    group = self.groups[taken[0].producers[0]]
                    group.repeat[name] = _each(inputs_of(module), taken[0].neurons)
                    group.ways[taken[0].way] = None
            elif taken and not graph.reads_other_lengths(node, _AXES[taken[0].layout]):
                stream = self._through(node, module, taken)
        except _Blocked as what:
            for blocked in taken:
                self.groups[blocked.producers[0]].faults.append((blocked.producers, str(what)))
        if not module or not layer:
            return stream
        self.groups.setdefault(name, _Group({name}))
        neurons = None if self.network.fault(name) else len(module.get_parameter("weight"))
        return _Stream((name,), neurons, _layouts(module)[0])

    def _is_carrier(self, module: nn.Module | None) -> bool:
        """Whether the module has weights for each neuron, and keeps neurons apart."""
        groups = getattr(module, "groups", 1)
        depthwise = isinstance(module, LAYERS) and groups != 1 and groups == getattr(module, "in_channels", 0)
        slopes = isinstance(module, nn.PReLU) and module.num_parameters != 1
        return isinstance(module, NORMS) or (self.residual and (depthwise or slopes))

    def _through(self, node: fx.Node, module: nn.Module | None, taken: list[_Stream]) -> _Stream:
        """Behind an operation that keeps neurons apart."""
        operation, stream = operation_of(node, module), taken[0]
        in_place = operation in {*graph.ACTIVATION, *_ARITHMETIC} and graph.changes_in_place(node, module)
        if module and self._is_carrier(module):
            self._check(str(node.target), module, stream, along=True)
            group = self.groups[stream.producers[0]]
            (group.norms if isinstance(module, NORMS) else group.along).add(str(node.target))
            behind = replace(stream, copies=stream.copies * _each(outputs_of(module), inputs_of(module)))
        elif self.residual and operation in _ARITHMETIC:
            behind = self._combined(node, operation, taken)
        else:
            behind = replace(stream, layout=self._layout(node, operation, module, stream.layout))
            if _is_pool(operation, stream.layout) and operation not in _MEANS:
                self.groups[stream.producers[0]].pools.add(str(node.target) if module else operation)
        if in_place and not stream.alone:
            raise _Blocked(
                f"are changed in place by {graph.ACTIVATION.get(operation, operation)} while others use them"
            )
        new = self.residual and operation not in _VIEWS and not in_place
        return replace(behind, way=(*behind.way, *_step(node, operation, module)), alone=new or stream.alone)

    def _layout(self, node: fx.Node, operation: str, module: nn.Module | None, layout: str) -> str:
        """The layout behind an operation without weights."""
        axes = _AXES[layout]
        if module and (fault := altered(module)):
            raise _Blocked(f"reach {node.target!r}, which {fault}")
        # Another tensor may decide what becomes of a neuron; so may a PReLU, if it has a slope for each.
        plain = len(node.all_input_nodes) == 1 and getattr(module, "num_parameters", 1) == 1
        if _is_pool(operation, layout) or (plain and operation in {*graph.ACTIVATION, *_ALIASES, "clone"}):
            return layout
        if graph.flattens(node, operation, module, axes):
            return "flat" if axes else layout
        gone = graph.reduced_axes(node, operation, axes) if self.residual else None
        if gone is not None:
            return f"{axes - gone}d" if axes > gone else "last"
        what = f"{node.target!r} ({type(module).__name__})" if module else operation
        raise _Blocked(_FATE.get(operation, f"reach {what}, which may mix them"))

    def _combined(self, node: fx.Node, operation: str, taken: list[_Stream]) -> _Stream:
        """Behind arithmetic, entry by entry: of neuron c with neuron c of other layers, or with numbers."""
        stream, name = taken[0], operation.removeprefix("i")
        for source in node.all_input_nodes:
            if source not in self._streams and not self.network.is_number(source):
                stranger = self.network.described(self._origin(source))
                raise _Blocked(f"{_FATE[operation]}, and {stranger} is no layer's neurons")
        if len(taken) == 1:
            return replace(stream, way=(*stream.way, f"own {name}"))
        for other in taken[1:]:
            first, second = stream.producers[0], other.producers[0]
            if fixed := [each.producers[0] for each in (stream, other) if each.neurons is None]:
                fault = self.network.fault(fixed[0])
                raise _Blocked(f"{_FATE[operation]}, and {fixed[0]!r} cannot lose any ({fault})")
            if (stream.neurons, stream.copies, stream.layout) != (other.neurons, other.copies, other.layout):
                raise _Blocked(f"{_FATE[operation]}, and those of {first!r} and {second!r} differ in number or layout")
        for other in taken[1:]:
            group, more = self.groups[stream.producers[0]], self.groups[other.producers[0]]
            if group is not more:
                group.absorb(more)
                self.groups |= dict.fromkeys(more.producers, group)
        producers = dict.fromkeys(producer for each in taken for producer in each.producers)
        return replace(stream, producers=tuple(producers), way=(name,))

    def _origin(self, node: fx.Node) -> fx.Node:
        """Where on its way a tensor stopped to be a layer's neurons, or began as something else."""
        keeping, others = {*graph.ACTIVATION, *_ALIASES, *_ARITHMETIC}, [node]
        while others:
            node, module = others[0], self.network.called(others[0])
            keeps = self._is_carrier(module) or operation_of(node, module) in keeping
            others = [source for source in node.all_input_nodes if source not in self._streams] if keeps else []
        return node

    def _check(self, name: str, module: nn.Module, stream: _Stream, along: bool = False) -> None:
        """Whether the module can lose the inputs that belong to a neuron."""
        fault = self.network.fault(name, along)
        if stream.neurons is not None and not fault:
            channels, inputs = stream.neurons * stream.copies, inputs_of(module)
            map_ = channels and stream.layout == "flat" and isinstance(module, nn.Linear)
            if (inputs % channels if map_ else inputs != channels) or stream.layout not in _layouts(module):
                fault = f"it takes {inputs} inputs along another axis: flatten(x, 1) may be missing"
        if fault:
            raise _Blocked(f"reach {name!r}, which cannot lose inputs ({fault})")


def _each(entries: int, neurons: int) -> int:
    """How many entries belong to one neuron; 1 where all are gone."""
    return entries // neurons if neurons else 1


def _is_pool(operation: str, layout: str) -> bool:
    return bool(_AXES[layout]) and operation.endswith(layout) and operation.removesuffix(layout) in _POOLS


def _layouts(module: nn.Module) -> tuple[str, ...]:
    """The layouts that a layer, a norm or a PReLU takes; outputs of a layer are laid out in the first way."""
    if isinstance(module, nn.PReLU):
        return tuple(_AXES)
    behind = [
        f"{axes}d" for axes, kinds in enumerate(zip(LAYERS[1:], NORMS, strict=True), 1) if isinstance(module, kinds)
    ]
    return (*(("last", "flat") if isinstance(module, nn.Linear | nn.BatchNorm1d) else ()), *behind)


def _step(node: fx.Node, operation: str, module: nn.Module | None) -> tuple[str, ...]:
    """The operation's part in the function that a neuron computes: a norm, an activation, or none."""
    if isinstance(module, NORMS):
        # What a norm without running statistics makes of a neuron depends on the other samples.
        return ("norm by the batch" if module.running_var is None else f"norm:{node.target}",)
    if isinstance(module, LAYERS):
        return ("depthwise",)
    if (name := graph.ACTIVATION.get(operation)) is None:
        return ()
    return (f"own {name}" if graph.has_own_settings(node, module) else name,)


def find_links(model: nn.Module, *, residual: bool = False) -> tuple[dict[str, Link], list[SkippedModule]]:
    """The layers whose neurons can be removed, by name, and every other module that holds weights, with the reason.

    Both are in the order in which forward calls them; modules that it does not call come last. The model is traced, not
    run, with the defaults of forward's options, and left as found: in eval mode and in train mode, too, for a layer
    whose outputs go to other modules or outputs there, such as a second classifier, has no link.

    Args:
        model: Any module that torch.fx can trace; UnsupportedModule is raised for others, InvalidInput for no module.
        residual: False: layers that can lose neurons alone, with nothing but batch norms, activations and pools on the
            way. True: also layers that are added to each other, or multiplied, as one link by the name of the first
            that is called; and on the way depthwise convolutions, PReLUs with a slope for each channel, arithmetic with
            numbers, and means, sums and maxima over positions.
    """
    network = Network(check_module(model))
    groups, links = _Flow(network, residual).groups, dict[str, Link]()
    skipped, linked = [], set[str]()
    for name in network.calls:
        module = network.modules[name]
        if name in linked or not holds_weights(module):
            continue
        if reason := network.fault(name) or groups[name].reason(name, module, residual):
            skipped.append(SkippedModule(name, type(module).__name__, reason))
        else:
            links[name] = _link(groups[name], network)
            linked.update(links[name].producers, links[name].along)
    return links, skipped


def _link(group: _Group, network: Network) -> Link:
    order = list(network.calls)

    def called(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(names, key=order.index))

    producer, *partners = called(group.producers)
    consumers = called(name for name in group.repeat if outputs_of(network.modules[name]))
    return Link(
        producer=producer,
        norms=called(group.norms),
        activation=_activation(list(group.ways)),
        consumers=consumers,
        repeat=tuple(group.repeat[name] for name in consumers),
        partners=tuple(partners),
        along=called(group.along),
        pools=tuple(sorted(group.pools)),
        emptied=called(group.repeat.keys() - set(consumers)),
    )


def _activation(ways: list[tuple[str, ...]]) -> str | None:
    """What all ways have in common: norms, and then one activation at most; or that there is no such thing."""
    norms = [tuple(step for step in way if step.startswith("norm:")) for way in ways]
    first = all(way[: len(norms[0])] == before == norms[0] for way, before in zip(ways, norms, strict=True))
    rest = [way[len(norms[0]) :] if first else way for way in ways]
    if first and len(set(rest)) == 1 and len(rest[0]) <= 1:
        return rest[0][0] if rest[0] else None
    described = [" then ".join(step.split(":")[0] for step in way) or "identity" for way in rest]
    return f"several: {', '.join(dict.fromkeys(described))}"
