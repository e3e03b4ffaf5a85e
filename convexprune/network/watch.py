"""What happens to a tensor while a model runs: which operations consume it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convexprune.network.memory import Holders

# Operations that may copy but keep every entry: what follows them follows the layer. Views are recognised by storage.
_SAME_ENTRIES = {"bfloat16", "clone", "contiguous", "cpu", "cuda", "detach", "double", "flatten", "float", "half"}
_SAME_ENTRIES |= {"requires_grad", "reshape", "to"}
# Results that describe a tensor (shape, dtype, device ...) without using its entries.
_METADATA = (bool, int, str, tuple, torch.dtype, torch.device, torch.layout)


class Watch(TorchFunctionMode):
    """Follows tensors through views and copies, and notes the name of every operation that consumes their entries.

    Args:
        held: Tensors that are followed by the memory they lie in, too, each with the list for its consumers: so what
            was made a view of them beforehand is followed as well.
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

    def note(self, tensors: Iterable[Tensor], name: str, result: Any = None) -> None:
        """An operation of this name has consumed the tensors and given the result."""
        given = list(tensors)
        for tensor in given:
            for number in self._holders.of(tensor) if id(tensor) not in self._followed else ():
                self.follow(tensor, self._held[number])
        for tensor, consumers in [self._followed[id(t)] for t in given if id(t) in self._followed]:
            if _passes_on(name, tensor, result):
                for noted in consumers if result is not tensor else ():
                    self.follow(result, noted)
                continue
            for noted in consumers:
                noted.append(name)
            if result is tensor:  # changed in place: its storage, under any view, no longer holds the layer's output
                self._forget(tensor)

    def _forget(self, tensor: Tensor) -> None:
        self._followed = {key: kept for key, kept in self._followed.items() if not _share(kept[0], tensor)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = _operation(func, args, kwargs or {})
        entries = any(True for _ in tensors_in(result)) or not (name == "get" or isinstance(result, _METADATA))
        if entries and not name.startswith("new_") and not name.endswith("_like"):  # zeros_like takes shape and dtype
            self.note({id(t): t for t in tensors_in((args, kwargs))}.values(), name, result)
        return result


def _operation(func: Any, args: Any, kwargs: Any) -> str:
    """The operation's name without the marks of its variants; a clamp at zero from below is a ReLU."""
    name = str(getattr(func, "__name__", func)).strip("_").lower()
    if name in ("clamp", "clamp_min", "clip"):
        bounds = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
        lowest = bounds.get("min")
        if isinstance(lowest, int | float) and lowest == 0 and bounds.get("max") is None:
            return "relu"
    return name


def _passes_on(name: str, tensor: Tensor, result: Any) -> bool:
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


def summary(calls: list[list[str]]) -> str:
    """One name for what consumed a layer's output in each of its calls: "relu", "output", "several: relu, add"."""
    kinds = list(dict.fromkeys(kind for call in calls for kind in call or ["output"]))
    return kinds[0] if len(kinds) == 1 else f"several: {', '.join(kinds)}"


def tensors_in(tree: Any, _within: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """The tensors in nested mappings, sequences and dataclasses; what holds itself is looked into once."""
    if isinstance(tree, Tensor):
        yield tree
        return
    branches: Iterable[Any] = ()
    if isinstance(tree, Mapping):
        branches = tree.values()
    elif isinstance(tree, list | tuple):
        branches = tree
    elif is_dataclass(tree) and not isinstance(tree, type):
        branches = [getattr(tree, field.name) for field in fields(tree)]
    if id(tree) not in _within:
        for branch in branches:
            yield from tensors_in(branch, _within | {id(tree)})
