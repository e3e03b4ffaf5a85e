"""What follows each layer, and where else its parameters go, from one forward in which tensors are followed."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convexprune.layers.kinds import NORMS
from convexprune.layers.memory import Batch, Holders, tensors_in
from convexprune.network.forwards import Forward, run_model
from convexprune.network.taps import Hooks, Tap, Taps, at, hooked

# Operations that may copy but keep every entry: what follows them follows the layer. Views are recognised by storage.
_SAME_ENTRIES = {"bfloat16", "clone", "contiguous", "cpu", "cuda", "detach", "double", "flatten", "float", "half"}
_SAME_ENTRIES |= {"requires_grad", "reshape", "to"}
# Results that describe a tensor (shape, dtype, device ...) without using its entries.
_METADATA = (bool, int, str, tuple, torch.dtype, torch.device, torch.layout)


class Follower(TorchFunctionMode):
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
class Observed:
    """What forwards show of one layer.

    Attributes:
        activation: What consumes the layer's output: "relu" if only ReLUs do, "output" if nothing does,
            "several: relu, add" if different operations do; None where it cannot be seen.
        norm: The BatchNorm module that alone consumes the layer's output, in the form of running statistics, and whose
            shift nothing else reads; or None.
        behind: What consumes the norm's output; None without one.
        elsewhere: The operations that read the layer's parameters outside the calls of its modules.
        calls: How often a forward calls it; None where batches differ in that.
    """

    activation: str | None = None
    norm: str | None = None
    behind: str | None = None
    elsewhere: tuple[str, ...] = ()
    calls: int | None = None


def followed(model: nn.Module, batch: Batch, taps: Taps, forward: Forward | None = None) -> dict[str, Observed]:
    """What one forward on a checked batch shows of each layer that it reaches; the model must be in eval mode."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, NORMS)}
    owners = {name: [tap.module for tap in several] for name, several in taps.items()}
    owners |= {name: [norm] for name, norm in norms.items()}
    # What reads the parameters of layers, and of norms, outside the calls of their modules.
    readers: dict[str, list[str]] = {name: [] for name in owners}
    held = [(p, read) for name, read in readers.items() for p in model.get_submodule(name).parameters(recurse=False)]
    begun: dict[str, list[int]] = {name: [] for name in owners}  # how many had read before each call that runs
    follower = Follower(held)
    calls: dict[str, list[list[str]]] = {}
    behind: dict[int, tuple[str, list[str]]] = {}  # by the id of the consumers of a layer's output
    times = Counter[str]()  # calls of norms

    def begin(name: str, *_: object) -> None:
        begun[name].append(len(readers[name]))

    def end(name: str, *_: object) -> None:
        del readers[name][begun[name].pop() :]

    def follow(name: str, tap: Tap, _module: nn.Module, _args: object, _kwargs: object, output: object) -> None:
        consumers: list[str] = []
        calls.setdefault(name, []).append(consumers)
        for tensor in tensors_in(output) if tap.plain else ():
            follower.follow(tensor, consumers)

    def pass_norm(name: str, _module: nn.Module, args: Batch, _kwargs: object, output: Tensor) -> None:
        times[name] += 1
        after: list[str] = []
        for consumers in follower.followers(args[0]) if args else ():
            behind[id(consumers)] = (name, after)
        follower.follow(output, after)

    modules = [(name, module) for name, several in owners.items() for module in several]
    passing = [(module, partial(pass_norm, name)) for name, module in norms.items()]
    after: Hooks = [*at(taps, follow), *passing, *((module, partial(end, name)) for name, module in modules)]
    before: Hooks = [(module, partial(begin, name)) for name, module in modules]
    with hooked(after, before), follower:
        outputs = run_model(model, batch, forward)
    follower.note(tensors_in(outputs), "output")
    found = {}
    for name, consumers in calls.items():
        norm, then = behind.get(id(consumers[0]), ("", []))
        alone = len(consumers) == 1 and consumers[0] == ["batch_norm"] and times[norm] == 1
        own = {key for key, _ in norms[norm].named_parameters(recurse=False)} if alone else set()
        # A fixed affine map in eval mode, with a shift of its own.
        foldable = own == {"weight", "bias"} and norms[norm].running_var is not None and not readers[norm]
        found[name] = Observed(
            activation=_summary(consumers) if all(tap.plain for tap in taps[name]) else None,
            norm=norm if foldable else None,
            behind=_summary([then]) if foldable else None,
            elsewhere=tuple(dict.fromkeys(readers[name])),
        )
    return found
