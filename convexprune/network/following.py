"""What follows each layer, and where else its parameters go, from one watched forward."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from convexprune.network.forwards import Forward, run_model
from convexprune.network.taps import Tap
from convexprune.network.watch import Watch, summary, tensors_in


@dataclass(frozen=True)
class Followed:
    """What a forward shows of one layer.

    Attributes:
        activation: What consumes the layer's output: "relu" if only ReLUs do, "output" if nothing does,
            "several: relu, add" if different operations do; None where it cannot be seen.
        norm: The BatchNorm module that alone consumes the layer's output, in the form of running statistics, and whose
            shift nothing else reads; or None.
        behind: What consumes the norm's output; None without one.
        elsewhere: The operations that read the layer's parameters outside the calls of its modules.
    """

    activation: str | None = None
    norm: str | None = None
    behind: str | None = None
    elsewhere: tuple[str, ...] = ()


def followed(
    model: nn.Module, batch: Any, taps: Mapping[str, Sequence[Tap]], forward: Forward | None = None
) -> tuple[dict[str, Followed], Any]:
    """Each layer that the forward reaches, by name, and what the model returned; it must be in eval mode.

    Args:
        model: The network.
        batch: A checked batch.
        taps: For each layer one for each module that uses its weight.
        forward: As for ``capture``.
    """
    readers = {
        name: _Readers(model.get_submodule(name), [tap.module for tap in several]) for name, several in taps.items()
    }
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _NORMS)}
    shifts = {name: _Readers(module, [module]) for name, module in norms.items()}
    every = [*readers.values(), *shifts.values()]
    watch = Watch([(parameter, one.names) for one in every for parameter in one.layer.parameters(recurse=False)])
    calls: dict[str, list[list[str]]] = {}
    behind: dict[int, tuple[str, list[str]]] = {}  # by the id of the consumers of a layer's output
    times: dict[str, int] = {}  # calls of norms

    def follow(name: str, plain: bool, _module: nn.Module, _args: Any, output: Any) -> None:
        consumers: list[str] = []
        calls.setdefault(name, []).append(consumers)
        for tensor in tensors_in(output) if plain else ():
            watch.follow(tensor, consumers)

    def pass_norm(name: str, _module: nn.Module, args: Any, output: Any) -> None:
        times[name] = times.get(name, 0) + 1
        after: list[str] = []
        for consumers in watch.followers(args[0]) if args else ():
            behind[id(consumers)] = (name, after)
        watch.follow(output, after)

    with ExitStack() as stack:
        for one in every:
            one.hook(stack)
        for name, several in taps.items():
            for tap in several:
                hook = partial(follow, name, tap.plain)
                stack.enter_context(tap.module.register_forward_hook(hook, prepend=True))
        for name, module in norms.items():
            stack.enter_context(module.register_forward_hook(partial(pass_norm, name), prepend=True))
        with watch:
            outputs = run_model(model, batch, forward)
    watch.note(tensors_in(outputs), "output")
    found = {}
    for name, consumers in calls.items():
        norm, after = behind.get(id(consumers[0]), ("", []))
        alone = len(consumers) == 1 and consumers[0] == ["batch_norm"] and times.get(norm) == 1
        found[name] = Followed(
            activation=summary(consumers) if all(tap.plain for tap in taps[name]) else None,
            elsewhere=tuple(dict.fromkeys(readers[name].names)),
        )
        if alone and _running(norms[norm]) and not shifts[norm].names:
            found[name] = replace(found[name], norm=norm, behind=summary([after]))
    return found, outputs


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _running(module: nn.Module) -> bool:
    """Whether the norm is a fixed affine map in eval mode, with a shift of its own."""
    own = dict(module.named_parameters(recurse=False))
    return module.running_var is not None and set(own) == {"weight", "bias"}


@dataclass(frozen=True, eq=False)
class _Readers:
    """What reads a layer's parameters; what happens in a call of one of its modules is taken off again."""

    layer: nn.Module
    modules: Sequence[nn.Module]
    names: list[str] = field(default_factory=list)

    def hook(self, stack: ExitStack) -> None:
        begun: list[int] = []

        def begin(_module: nn.Module, _args: Any) -> None:
            begun.append(len(self.names))

        def end(_module: nn.Module, _args: Any, _output: Any) -> None:
            del self.names[begun.pop() :]

        for module in self.modules:
            stack.enter_context(module.register_forward_pre_hook(begin))
            stack.enter_context(module.register_forward_hook(end, prepend=True))
