"""What follows each layer, and where else its parameters go, from one forward in which tensors are followed."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convexprune.layers.kinds import NORMS
from convexprune.network.forwards import Forward, run_model
from convexprune.network.memory import Batch, Holders, tensors_in
from convexprune.network.taps import Hook, Taps, hooked

# Operations that may copy but keep every entry: what follows them follows the layer. Views are recognised by storage.
_SAME_ENTRIES = {"bfloat16", "clone", "contiguous", "cpu", "cuda", "detach", "double", "flatten", "float", "half"}
_SAME_ENTRIES |= {"requires_grad", "reshape", "to"}
# Results that describe a tensor (shape, dtype, device ...) without using its entries.
_METADATA = (bool, int, str, tuple, torch.dtype, torch.device, torch.layout)


class Watch(TorchFunctionMode):
    """Follows tensors through views and copies, and notes the name of every operation that consumes their entries.

    Tensors that are ``held``, each with the list for its consumers, are followed by the memory they lie in, too: so
    what was made a view of them beforehand is followed as well.
    """

    def __init__(self, held: Sequence[tuple[Tensor, list[str]]] = ()) -> None:
        super().__init__()
        self._held = [consumers for _, consumers in held]
        self._holders = Holders((tensor, number) for number, (tensor, _) in enumerate(held))
        # Keyed by id, with the tensor: one that is held cannot hand its id on to another.
        self._followed: dict[int, tuple[Tensor, list[list[str]]]] = {}

    def follow(self, tensor: Tensor, consumers: list[str]) -> None:
        """Add to ``consumers`` the name of whatever consumes the tensor from now on."""
        self._followed.setdefault(id(tensor), (tensor, []))[1].append(consumers)

    def followers(self, tensor: Tensor) -> list[list[str]]:
        """The lists to which consumers of the tensor are added."""
        return list(self._followed.get(id(tensor), (tensor, []))[1])

    def note(self, tensors: Iterable[Tensor], name: str, result: object = None) -> None:
        """An operation of this name has consumed the tensors and given the result."""
        given = list(tensors)
        for tensor in given:
            for number in self._holders.of(tensor) if id(tensor) not in self._followed else ():
                self.follow(tensor, self._held[number])
        for tensor, consumers in [self._followed[id(t)] for t in given if id(t) in self._followed]:
            if _passes_on(name, tensor, result):
                if isinstance(result, Tensor) and result is not tensor:
                    for noted in consumers:
                        self.follow(result, noted)
                continue
            for noted in consumers:
                noted.append(name)
            if result is tensor:  # changed in place: its storage, under any view, no longer holds the layer's output
                self._followed = {key: kept for key, kept in self._followed.items() if not _share(kept[0], tensor)}

    def __torch_function__(self, func: Batch, types: object, args: Batch = (), kwargs: Batch = None) -> Batch:
        result = func(*args, **(kwargs or {}))
        name = _operation(func, args, kwargs or {})
        entries = any(True for _ in tensors_in(result)) or not (name == "get" or isinstance(result, _METADATA))
        if entries and not name.startswith("new_") and not name.endswith("_like"):  # zeros_like takes shape and dtype
            self.note({id(t): t for t in tensors_in((args, kwargs))}.values(), name, result)
        return result


def _operation(func: object, args: Batch, kwargs: Batch) -> str:
    """The operation's name without the marks of its variants; a clamp at zero from below is a ReLU."""
    name = str(getattr(func, "__name__", func)).strip("_").lower()
    if name in ("clamp", "clamp_min", "clip"):
        bounds = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
        lowest = bounds.get("min")
        if isinstance(lowest, int | float) and lowest == 0 and bounds.get("max") is None:
            return "relu"
    return name


def _passes_on(name: str, tensor: Tensor, result: object) -> bool:
    """Whether the result holds the tensor's entries, all and unchanged, in some shape."""
    if result is tensor:  # dropout returns its input in eval mode
        return name in _SAME_ENTRIES or "dropout" in name
    if not isinstance(result, Tensor) or result.numel() != tensor.numel():
        return False
    return name in _SAME_ENTRIES or _share(result, tensor)


def _share(one: Tensor, other: Tensor) -> bool:
    if one.layout != torch.strided or other.layout != torch.strided or one.dtype != other.dtype:
        return False
    try:
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # what torch.func wraps has no storage
        return False


def _summary(calls: list[list[str]]) -> str:
    """One name for what consumed a layer's output in each of its calls."""
    kinds = list(dict.fromkeys(kind for call in calls for kind in call or ["output"]))
    return kinds[0] if len(kinds) == 1 else f"several: {', '.join(kinds)}"


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


def followed(model: nn.Module, batch: Batch, taps: Taps, forward: Forward | None = None) -> dict[str, Followed]:
    """What one forward on a checked batch shows of each layer that it reaches; the model must be in eval mode."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, NORMS)}
    # What reads the parameters of layers, and of norms, outside the calls of their modules.
    readers: dict[str, list[str]] = {name: [] for name in taps}
    shifts: dict[str, list[str]] = {name: [] for name in norms}
    every = [(model.get_submodule(name), [tap.module for tap in taps[name]], names) for name, names in readers.items()]
    every += [(norms[name], [norms[name]], names) for name, names in shifts.items()]
    watch = Watch([(parameter, names) for one, _, names in every for parameter in one.parameters(recurse=False)])
    calls: dict[str, list[list[str]]] = {}
    behind: dict[int, tuple[str, list[str]]] = {}  # by the id of the consumers of a layer's output
    times: dict[str, int] = {}  # calls of norms

    def follow(name: str, plain: bool, _module: nn.Module, _args: object, output: object) -> None:
        consumers: list[str] = []
        calls.setdefault(name, []).append(consumers)
        for tensor in tensors_in(output) if plain else ():
            watch.follow(tensor, consumers)

    def pass_norm(name: str, _module: nn.Module, args: Batch, output: Tensor) -> None:
        times[name] = times.get(name, 0) + 1
        after: list[str] = []
        for consumers in watch.followers(args[0]) if args else ():
            behind[id(consumers)] = (name, after)
        watch.follow(output, after)

    hooks: list[tuple[nn.Module, Hook]] = [
        (tap.module, partial(follow, name, tap.plain)) for name, several in taps.items() for tap in several
    ]
    hooks += [(module, partial(pass_norm, name)) for name, module in norms.items()]
    with ExitStack() as stack:
        for _, modules, names in every:
            _leave_out(modules, names, stack)
        with hooked(hooks), watch:
            outputs = run_model(model, batch, forward)
    watch.note(tensors_in(outputs), "output")
    found = {}
    for name, consumers in calls.items():
        norm, after = behind.get(id(consumers[0]), ("", []))
        alone = len(consumers) == 1 and consumers[0] == ["batch_norm"] and times.get(norm) == 1
        found[name] = Followed(
            activation=_summary(consumers) if all(tap.plain for tap in taps[name]) else None,
            elsewhere=tuple(dict.fromkeys(readers[name])),
        )
        own = {key for key, _ in norms[norm].named_parameters(recurse=False)} if alone else set()
        # A fixed affine map in eval mode, with a shift of its own.
        if own == {"weight", "bias"} and norms[norm].running_var is not None and not shifts[norm]:
            found[name] = replace(found[name], norm=norm, behind=_summary([after]))
    return found


def _leave_out(modules: Iterable[nn.Module], names: list[str], stack: ExitStack) -> None:
    """What reads something in a call of one of these modules is taken off the names again."""
    begun: list[int] = []

    def begin(_module: nn.Module, _args: object) -> None:
        begun.append(len(names))

    def end(_module: nn.Module, _args: object, _output: object) -> None:
        del names[begun.pop() :]

    for module in modules:
        stack.enter_context(module.register_forward_pre_hook(begin))
        stack.enter_context(module.register_forward_hook(end, prepend=True))
