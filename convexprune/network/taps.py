"""Where in a running model layers' inputs are seen and their outputs replaced, and what the model makes of it.

A claim such as "of this layer's outputs only the ReLU is read" says that the model's outputs stay as they are under an
intervention, here one that replaces negative outputs by others. What reads something else, by whatever means (compiled
functions, hooks, other libraries, attributes), is seen by its effect.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from zlib import crc32

import torch
from torch import Tensor, nn

from convexprune.errors import UnsupportedModule
from convexprune.layers.memory import Batch, samples_at, samples_of, tensors_in
from convexprune.layers.support import has_own_forward
from convexprune.network.forwards import Forward, run_model
from convexprune.solvers.arrays import norm
from convexprune.solvers.errors import InvalidInput, NonFinite

PROJECTED = ("query", "key", "value")
"""What a MultiheadAttention takes first, by name."""

Received = Tensor | tuple[Tensor, ...]
"""What ``input_matrices`` takes: a module's raw input, or a MultiheadAttention's (query, key, value)."""


def _first(args: Sequence[Batch], kwargs: Mapping[str, Batch], _output: object) -> Tensor:
    received: Tensor = args[0] if args else next(iter(kwargs.values()))
    return received


@dataclass(frozen=True, eq=False)
class Tap:
    """Where a layer's inputs are seen."""

    module: nn.Module  # to put a forward hook on
    # The layer's raw inputs, from the arguments and the output of one call of ``module``. It may run the module once
    # more, as it is now, without its hooks: call it in the hook.
    received: Callable[[Sequence[Batch], Mapping[str, Batch], object], Received] = _first
    plain: bool = True  # whether the module's output is the layer's output X U
    first: bool = False  # whether it is the first of what the module returns

    @property
    def returns_outputs(self) -> bool:
        """Whether the layer's outputs are among what the module returns."""
        return self.plain or self.first

    def outputs(self, returned: Batch) -> Tensor | None:
        """The layer's outputs among what the module returned; None where it does not return them."""
        found: Tensor | None = returned if self.plain else returned[0] if self.first else None
        return found

    def with_outputs(self, returned: Batch, outputs: Tensor) -> Batch:
        """What the module returned with others in their place."""
        return (outputs, *returned[1:]) if self.first else outputs


Taps = Mapping[str, Sequence[Tap]]
"""For each layer, by name, where its inputs are received: several places where modules share its weight."""


def tap(model: nn.Module, name: str) -> Tap:
    """Where the inputs of the layer of this qualified name are seen.

    A MultiheadAttention never calls its ``out_proj``: what that receives is seen at the MultiheadAttention itself.
    InvalidInput is raised if the model has no such module, UnsupportedModule if it is compiled by ``torch.jit``.
    """
    if isinstance(model, torch.jit.ScriptModule):
        kind = type(model).__name__
        raise UnsupportedModule(f"{kind} is compiled by torch.jit: prune the Python module, then script it")
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise InvalidInput(f"the model has no module {name!r}: take names from model.named_modules()") from error
    parent, _, child = name.rpartition(".")
    if child == "out_proj" and _is_attention(owner := model.get_submodule(parent)):
        return Tap(owner, partial(_attended, owner), plain=False, first=True)
    return Tap(layer, _projected, plain=False) if _is_attention(layer) else Tap(layer)


Hooks = Iterable[tuple[nn.Module, Callable[..., Batch]]]
"""Modules with what is called before their forward as ``hook(module, args, kwargs)``, after it with the output, too."""


@contextmanager
def hooked(after: Hooks, before: Hooks = ()) -> Iterator[None]:
    """Inside, modules have these hooks, between their forward and hooks of the caller's, in this order."""
    with ExitStack() as stack:
        for module, hook in before:
            stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        for module, hook in reversed(list(after)):
            stack.enter_context(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        yield


def at(taps: Taps, hook: Callable[..., Batch]) -> Hooks:
    """Where ``hook(name, tap, module, args, kwargs, output)`` is called after each call of a tapped module."""
    return [(tap.module, partial(hook, name, tap)) for name, several in taps.items() for tap in several]


def tapped(taps: Taps, see: Callable[[str, Received], None]) -> AbstractContextManager[None]:
    """Inside, ``see(name, inputs)`` is called after each call of a tapped module."""

    def hook(name: str, tap: Tap, _module: nn.Module, args: Batch, kwargs: Batch, output: object) -> None:
        see(name, tap.received(args, kwargs, output))

    return hooked(at(taps, hook))


def replaced(places: Taps, value: Callable[[str, Tensor], Tensor]) -> AbstractContextManager[None]:
    """Inside, layers' outputs are ``value(name, outputs)`` for all that comes after, hooks of the caller's as well."""

    def hook(name: str, tap: Tap, _module: nn.Module, _args: Batch, _kwargs: Batch, returned: Batch) -> Batch:
        outputs = tap.outputs(returned)
        return returned if outputs is None else tap.with_outputs(returned, value(name, outputs))

    return hooked(at(places, hook))


def check_received(name: str, received: Received) -> None:
    """What the layer of this name receives is finite, or NonFinite is raised.

    UnsupportedModule is raised inside a transform such as ``torch.vmap``, where entries cannot be looked at.
    """
    try:
        finite = all(bool(tensor.isfinite().all()) for tensor in tensors_in(received))
    except RuntimeError as error:
        if not any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors_in(received)):
            raise
        raise UnsupportedModule(
            f"layer {name!r} is called inside torch.vmap or another transform of torch.func, where no inputs can be "
            f"seen: call it on whole batches, or leave it out with layers='!{name}'"
        ) from error
    if not finite:
        raise NonFinite(f"NaN or infinity reaches layer {name!r}: check the layers before it and the data's scale")


def _is_attention(module: nn.Module) -> bool:
    """Whether it is a MultiheadAttention that computes as torch's own does; others may well call their modules."""
    return isinstance(module, nn.MultiheadAttention) and not has_own_forward(module)


def _projected(args: Sequence[Batch], kwargs: Mapping[str, Batch], _output: object) -> tuple[Tensor, ...]:
    given = {**dict(zip(PROJECTED, args, strict=False)), **kwargs}
    return tuple(given[name] for name in PROJECTED)


class _Unhooked(nn.Module):
    """A module's forward without the hooks on the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Batch, **kwargs: Batch) -> Batch:
        return self.module.forward(*args, **kwargs)


def without_hooks(
    module: nn.Module, parameters: Mapping[str, Tensor], args: Sequence[Batch], kwargs: Mapping[str, Batch]
) -> Batch:
    """What the module returns with these values of its parameters, and without the hooks on it."""
    values = {f"module.{name}": value for name, value in parameters.items()}
    # Without ties: a parameter elsewhere may be one of these too, and stays what it is.
    return torch.func.functional_call(_Unhooked(module), values, tuple(args), dict(kwargs), tie_weights=False)


def attention_of(
    owner: nn.MultiheadAttention, projections: Sequence[Tensor], args: Sequence[Batch], kwargs: Mapping[str, Batch]
) -> Tensor:
    """What a MultiheadAttention returns first where its queries, keys and values are these, each [..., embed_dim]."""
    same = torch.eye(owner.embed_dim, dtype=projections[0].dtype, device=projections[0].device)
    names = [name for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight") if getattr(owner, name) is not None]
    values = dict.fromkeys(names, same) if names else {"in_proj_weight": same.repeat(3, 1)}
    if owner.in_proj_bias is not None:
        values["in_proj_bias"] = owner.in_proj_bias.new_zeros(3 * owner.embed_dim)
    given = dict(zip(PROJECTED, projections, strict=True))
    rest = {name: value for name, value in kwargs.items() if name not in given}
    returned: tuple[Tensor, ...] = without_hooks(owner, values, (*given.values(), *args[3:]), rest)
    return returned[0]


def _attended(owner: nn.Module, args: Sequence[Batch], kwargs: Mapping[str, Batch], _output: object) -> Tensor:
    """What ``out_proj`` receives: the output of a MultiheadAttention whose out_proj changes nothing."""
    layer = owner.get_submodule("out_proj")
    size, weight = layer.get_parameter("weight").shape[1], layer.get_parameter("weight")
    same = {"out_proj.weight": torch.eye(size, dtype=weight.dtype, device=weight.device)}
    if isinstance(layer.bias, Tensor):
        same["out_proj.bias"] = layer.bias.new_zeros(size)
    with torch.no_grad():
        received: Tensor = without_hooks(owner, same, args, kwargs)[0]
    return received


_Context = AbstractContextManager[None]

Intervention = Callable[[Sequence[str]], _Context]
"""From names to a context in which what is claimed of them is put to the test."""


class Trial:
    """What a model returns for one checked batch, and whether interventions change it; it must be in eval mode.

    ``outputs`` are the floating-point tensors that it returns, ``forwards`` says how many were run, and ``watching`` is
    a context for the first, which changes nothing. InvalidInput is raised where the model cannot be called.
    """

    def __init__(
        self, model: nn.Module, batch: Batch, forward: Forward | None, watching: _Context | None = None
    ) -> None:
        self.model, self.batch, self.forward, self.forwards = model, batch, forward, 0
        self.outputs = self._run(batch, watching or nullcontext())
        # Of the coarsest dtype that takes part.
        self._eps = max(torch.finfo(t.dtype).eps for t in (*self.outputs, *_floating(model.parameters())))
        self._allowed = rounding(self._eps) / self._eps

    def settle(self, names: Sequence[str], identity: Intervention) -> list[str]:
        """Those of which the outputs show an intervention that changes nothing, beyond rounding.

        From then on four times what it moves the outputs by, of the others, is allowed.
        """
        moved, shown = self._moved(identity(names)), list[str]()
        if moved > self._allowed:
            shown = self.revealing(names, identity)
            moved = self._moved(identity([name for name in names if name not in shown]))
        if moved > self._allowed:  # together, though none alone
            return list(names)
        self._allowed = 1.0 + 4 * moved
        return shown

    def revealing(self, names: Sequence[str], intervene: Intervention) -> list[str]:
        """Those of which the outputs show the intervention, found by halving; a model that fails under it shows it."""
        return halved(names, lambda some: self._moved(intervene(some)) > self._allowed)

    def mixes_samples(self) -> str | None:
        """How the outputs of a sample depend on those that are in a batch with it; None if they do not.

        Found by its last and first samples, which are run alone, in this order; of three or fewer by the last.
        """
        samples = samples_of(self.batch)
        chosen = [samples - 1, 0] if samples > 3 else [samples - 1]
        part = samples_at(self.batch, chosen)
        if samples < 2 or samples_of(part) != len(chosen):
            return None
        try:
            alone = self._run(part, nullcontext())
        except Exception as error:  # noqa: BLE001 - whatever the model raises
            return f"the model fails on a part of a batch ({error.__cause__ or error})"
        among = [tensor[chosen] for tensor in self.outputs if tensor.dim() and len(tensor) == samples]
        pairs = [(one, other) for one, other in zip(alone, among, strict=False) if one.shape == other.shape]
        moved = max((_distance(one, other) for one, other in pairs), default=0.0)
        if moved <= rounding(self._eps):
            return None
        those = " and ".join("the last" if number else "the first" for number in chosen)
        alone_differ = f"along the first axis; those of {those} alone differ by {moved:.2g} of their size"
        return f"a sample's outputs depend on the others in its batch ({alone_differ})"

    def _moved(self, intervention: _Context) -> float:
        """The most that an output moves, in roundings of its size."""
        found = self.outputs_under(intervention)
        if found is None:
            return math.inf
        moved = [_distance(one, other) / self._eps for one, other in zip(found, self.outputs, strict=True)]
        return math.inf if any(map(math.isnan, moved)) else max(moved, default=0.0)

    def outputs_under(self, intervention: _Context) -> list[Tensor] | None:
        """What the model returns under an intervention; None where it fails, or returns other shapes."""
        try:
            found = self._run(self.batch, intervention)
        except (torch.cuda.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # noqa: BLE001 - whatever the model raises
            return None
        return found if [tensor.shape for tensor in found] == [tensor.shape for tensor in self.outputs] else None

    def _run(self, batch: Batch, within: _Context) -> list[Tensor]:
        self.forwards += 1
        with within:
            returned = run_model(self.model, batch, self.forward)
        return [tensor.detach().clone() for tensor in _floating(tensors_in(returned))]


def halved(names: Sequence[str], shows: Callable[[Sequence[str]], bool]) -> list[str]:
    """Those that are to be blamed for what all together show, found by halving; none where nothing is shown."""
    if not names or not shows(names):
        return []
    if len(names) == 1:
        return list(names)
    half = len(names) // 2
    # What only both halves together show may be of any of them.
    return [*halved(names[:half], shows), *halved(names[half:], shows)] or list(names)


def generator(name: str) -> torch.Generator:
    """Random numbers of a layer's own, the same each time."""
    return torch.Generator().manual_seed(crc32(name.encode()))


def rounding(eps: float) -> float:
    """What two ways to compute the same may differ by, relative, in a dtype of this eps."""
    return max(8 * eps, min(math.sqrt(eps), 1e-3))


def _floating(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _distance(one: Tensor, other: Tensor) -> float:
    """‖one − other‖/‖other‖, not relative where other is 0."""
    before = other.double()
    return float(norm(one.double() - before)) / (float(norm(before)) or 1.0)
