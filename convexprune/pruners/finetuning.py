"""Fine-tuning in which neurons go one by one: stochastic gradient descent on the loss, in training mode.

What it is at is kept in the run's journal from time to time, and all that is random follows from the seed and the
number of the step, so that a run that was killed goes on and ends with the same weights.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count, islice

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from convexprune.errors import DamagedFile, PruningFailed
from convexprune.files.texts import visible
from convexprune.layers.memory import Batch, mapped, tensors_in
from convexprune.network.forwards import as_written, call_model, copy_for, evaluating, outputs_of, run_model, seeded
from convexprune.network.weights import mask_neurons_
from convexprune.pruners.gradients import source
from convexprune.pruners.information import Information, OperationCosts
from convexprune.pruners.sizes import kept_of, value_of
from convexprune.runs.journal import Record
from convexprune.runs.run import Run
from convexprune.solvers.errors import InvalidInput
from convexprune.targets import Neurons

_log = logging.getLogger(__name__)

Augment = Callable[[Batch, torch.Generator], Batch]

_NAME = "fine-tuning"
_EVERY = 20.0  # seconds between two states that are kept
_SHIFT = 4  # pixels


@dataclass(eq=False)
class FineTuning:
    """One training of a copy of the run's model, in which a neuron goes after every so many steps.

    Neurons that went are zeros in the copy, and stay such; they are removed from the model in the end.

    Attributes:
        run: With the model, the links and the data.
        target: How many neurons go.
        steps: Between two removals.
        make: An optimiser of parameters.
        augment: What changes the inputs of a step, or None.
        beta: What an operation a sample counts against Δ.
        step: How many steps were made.
        stays: Of each link which neurons are there.
        removed: (link, neuron, step, Δ, mean loss since the last removal) of those that went, in their order.
    """

    run: Run
    target: Neurons
    steps: int
    make: Callable[..., Optimizer]
    augment: Augment | None
    beta: float
    step: int = 0
    stays: dict[str, Tensor] = field(default_factory=dict)
    removed: list[tuple[str, int, int, float, float]] = field(default_factory=list)
    _loss: float = 0.0  # summed since the last removal
    _kept: int = -1  # the step of the last state that was kept
    _kept_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.model = deepcopy(self.run.model)
        weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not weights:
            raise InvalidInput("fisher: no parameter of the model requires a gradient, so that none can be fine-tuned")
        self._weights, self.optimiser = weights, self.make([*weights.values()])
        self.information = Information(self.model, self.run.links, self.run.widths())
        self.stays = {name: torch.ones(width, dtype=torch.bool) for name, width in self.run.widths().items()}
        self.checkpoints = self.run.checkpoints(_NAME)
        zeros = self.run.options.keep_zeros
        layers = [self.model.get_submodule(name).get_parameter("weight") for name in self.run.layers] if zeros else []
        self._zeros = [(weight, weight == 0) for weight in layers]

    def run_(self) -> None:
        """Train until enough neurons went, from where an earlier run was; then put the weights into the run's model."""
        self.checkpoints.restored(self._restore_)
        total = sum(map(len, self.stays.values()))
        self.run.progress(_NAME, len(self.removed), total - self._wanted)
        batches = self._batches()
        while self._left > self._wanted:
            if self.run.ended():
                self._keep()
                return
            self._step_(*next(batches))
            if self.step % self.steps == 0:
                self._remove_least_()
                self.run.progress(_NAME, len(self.removed), total - self._wanted)
                if time.monotonic() - self._kept_at > _EVERY:
                    self._keep()
        self._keep()
        self._finish_()

    @cached_property
    def _wanted(self) -> int:
        """How many neurons stay, all links together."""
        if self.target.scope == "network":
            return max(1, round((1 - float(self.target.value)) * sum(map(len, self.stays.values()))))  # type: ignore[arg-type]
        return sum(self._least.values())

    @cached_property
    def _least(self) -> dict[str, int]:
        """How many neurons of each link stay at least."""
        if self.target.scope == "network":
            return dict.fromkeys(self.stays, 0)
        return {name: kept_of(value_of(self.target, name), len(kept)) for name, kept in self.stays.items()}

    @property
    def _left(self) -> int:
        return sum(int(kept.sum()) for kept in self.stays.values())

    # Training

    def _batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """Labelled batches from the next step on, epoch after epoch."""
        seed, data = self.run.options.seed, source(self.run)
        epochs = (data.shuffled(_mixed(seed, epoch)) for epoch in count())
        return islice(chain.from_iterable(epochs), self.step, None)

    def _step_(self, batch: Batch, labels: Tensor) -> None:
        seed = _mixed(self.run.options.seed, self.step)  # of dropout and the like
        listening = self.information.gathered()
        with seeded(self.model, seed), as_written(self.model), torch.enable_grad(), listening:
            inputs = copy_for(self.model, batch)
            if self.augment is not None:
                inputs = self.augment(inputs, torch.Generator().manual_seed(seed))
            self.model.train()
            self.optimiser.zero_grad()
            loss = source(self.run).loss_of(call_model(self.model, inputs, self.run.forward), labels)
            if not bool(loss.isfinite()):
                raise PruningFailed(
                    f"the loss is {float(loss.detach())} after {self.step:,} steps of fine-tuning: give a smaller "
                    "learning_rate"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            self.information.add()
            self.optimiser.step()
        self._mask_(self.model)
        self._loss += float(loss.detach())
        self.step += 1

    def _mask_(self, model: nn.Module) -> None:
        """Zeros where neurons went, and where weights are to stay zero."""
        for name, kept in self.stays.items():
            if not bool(kept.all()):
                mask_neurons_(model, self.run.links[name], kept.nonzero()[:, 0])
            if not bool(kept.any()):
                self._silence_(model, name)
        with torch.no_grad():
            for weight, zeros in self._zeros if model is self.model else ():
                weight.masked_fill_(zeros, 0)

    def _silence_(self, model: nn.Module, name: str) -> None:
        """Nothing comes from the layers that took a link's neurons, of which none is left: no shift, and no bias."""
        for consumer in self.run.links[name].consumers:
            norm = self.run.layers[consumer].norm_name
            silent = [model.get_submodule(each) for each in (consumer, norm) if each]
            for tensor in (getattr(m, key, None) for m in silent for key in ("weight", "bias", "running_mean")):
                if isinstance(tensor, Tensor):
                    tensor.detach().zero_()

    # Removing

    def _remove_least_(self) -> None:
        """Remove the neuron of the least Δ − beta·C that can go, and gather anew."""
        deltas = {name: delta.cpu() for name, delta in self.information.mean().items()}
        costs = self._costs.of_neurons(self.stays) if self._costs else dict.fromkeys(deltas, 0.0)
        worths = {
            name: (delta - self.beta * costs[name]).masked_fill(~self.stays[name], math.inf)
            for name, delta in deltas.items()
        }
        closed = {name for name, kept in self.stays.items() if int(kept.sum()) <= self._least[name]}
        while open_ := [name for name in worths if name not in closed]:
            name = min(open_, key=lambda name: float(worths[name].min()))
            if int(self.stays[name].sum()) == 1 and not self._may_empty(name):
                closed.add(name)
                continue
            neuron = int(worths[name].argmin())
            self.stays[name][neuron] = False
            self._mask_(self.model)
            loss, self._loss = self._loss / self.steps, 0.0
            self.removed.append((name, neuron, self.step, float(deltas[name][neuron]), loss))
            self.information.reset()
            _log.info("step %d: neuron %d of %s goes, mean loss %.4g", self.step, neuron, visible(name), loss)
            return
        raise InvalidInput(
            f"neurons: {self._left:,} are the fewest that can be left, {self._wanted:,} were wanted: without another "
            "the outputs would not depend on the inputs"
        )

    @cached_property
    def _costs(self) -> OperationCosts | None:
        return OperationCosts.of(self.run) if self.beta else None

    def _may_empty(self, name: str) -> bool:
        """Whether the outputs of two samples still differ when no neuron of the link is left; pools need one."""
        if self.run.links[name].pools:
            return False
        before, self.stays[name] = self.stays[name], torch.zeros_like(self.stays[name])
        model = deepcopy(self.model)
        self._mask_(model)
        self.stays[name] = before
        batch: Batch = next(iter(self.run.data or ()))
        with evaluating(model):
            outputs = outputs_of(run_model(model, batch, self.run.forward))
        return bool((outputs != outputs[:1]).any())

    def _finish_(self) -> None:
        run = self.run
        run.tune_(self.model.state_dict())
        run.kept_neurons = {name: kept.nonzero()[:, 0].tolist() for name, kept in self.stays.items()}
        run.notices.append(
            f"all weights were fine-tuned while neurons went: {self.step:,} steps, a neuron after every {self.steps}"
        )

    # What it is at

    def _keep(self) -> None:
        if self.step == self._kept:
            return
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"sums.{name}": tensor for name, tensor in self.information.sums.items()}
        for name, parameter in self._weights.items():
            own = {f"optimiser.{key}.{name}": value for key, value in self.optimiser.state[parameter].items()}
            tensors |= {key: value for key, value in own.items() if isinstance(value, Tensor)}
        data = {"step": self.step, "samples": self.information.samples, "loss": self._loss, "removed": self.removed}
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.checkpoints.keep(self.step, data, copies)
        self._kept, self._kept_at = self.step, time.monotonic()

    def _restore_(self, record: Record) -> None:
        """Be where a record says.

        Raises:
            DamagedFile: It is none of this model.
        """
        try:
            data, device = record.data, next(self.model.parameters()).device
            parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("model", "sums", "optimiser")}
            for key, tensor in record.tensors.items():
                kind, _, name = key.partition(".")
                parts[kind][name] = tensor
            self.model.load_state_dict(parts["model"])
            for key, tensor in parts["optimiser"].items():
                kind, _, name = key.partition(".")
                self.optimiser.state[self._weights[name]][kind] = tensor.to(device)
            self.information.sums = {name: tensor.to(device) for name, tensor in parts["sums"].items()}
            self.step, self.information.samples = int(data["step"]), int(data["samples"])
            self._loss, self.removed = float(data["loss"]), [_removal(each) for each in data["removed"]]
            for name, neuron, *_ in self.removed:
                self.stays[name][neuron] = False
            self._kept = self.step
        except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DamagedFile(
                f"the checkpoint of the fine-tuning is not what was written ({error!r}): delete fine-tuning-* in "
                "layers/, or start in another folder"
            ) from error


def _removal(entry: Sequence[object]) -> tuple[str, int, int, float, float]:
    link, neuron, step, delta, loss = entry
    return str(link), int(neuron), int(step), float(delta), float(loss)  # type: ignore[call-overload, arg-type]


def _mixed(seed: int, number: int) -> int:
    """A seed of its own for each number."""
    return (seed * 1_000_003 + number * 7_919 + 1) % 2**62


def crop_and_flip(batch: Batch, generator: torch.Generator) -> Batch:
    """Images [samples, channels, height, width] moved by up to 4 pixels and mirrored half of the time, each by itself.

    Raises:
        InvalidInput: There are no images.
    """
    images = [tensor for tensor in tensors_in(batch) if tensor.is_floating_point() and tensor.dim() == 4]
    if len(images) != 1:
        raise InvalidInput(
            'augment: "crop and flip" moves images, and a batch holds '
            f"{len(images) or 'no'} floating-point tensors [samples, channels, height, width], expected one"
        )
    [x] = images
    n, _, height, width = x.shape
    moved = torch.randint(2 * _SHIFT + 1, (2, n), generator=generator)
    mirrored = torch.rand(n, generator=generator) < 0.5
    rows = (torch.arange(height) + moved[0][:, None]).to(x.device)
    columns = torch.arange(width).expand(n, -1)
    columns = (torch.where(mirrored[:, None], width - 1 - columns, columns) + moved[1][:, None]).to(x.device)
    padded = functional.pad(x, (_SHIFT,) * 4)
    samples = torch.arange(n, device=x.device)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return mapped(batch, lambda tensor: cropped if tensor is x else tensor)
