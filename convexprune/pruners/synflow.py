"""SynFlow: scores that a network passes on from input to output, without data.

Source: Tanaka, Kunin, Yamins and Ganguli, Pruning neural networks without any data by iteratively conserving synaptic
flow, NeurIPS 2020, algorithm 1.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from convexprune.layers import weight_matrices, write_back_
from convexprune.layers.support import supported
from convexprune.network.forwards import call_model, copy_for, evaluating
from convexprune.network.graph import NORMS
from convexprune.network.memory import samples_at, tensors_in
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.scoring import Scores, Scoring
from convexprune.pruners.sizes import count_of, shared_counts, wanted_of
from convexprune.runs.run import Run
from convexprune.solvers.arrays import checked_count
from convexprune.solvers.errors import InvalidInput, NonFinite
from convexprune.targets import Sparsity, Target


@register_pruner("synflow")
@dataclass(frozen=True)
class SynFlow(Scoring):
    """Iterative synaptic flow: |w·∂R/∂w| for R = Σf(1) with all weights |w|, in rounds with fewer and fewer weights.

    Needs no data; works at initialisation and on trained networks, in float64, on a copy of the model. Batch norms
    become what they multiply by, |γ|/σ, without a shift ("scale"), or nothing at all ("identity").

    Args:
        rounds: How often weights are scored anew.
        schedule: Of the density ρ over rounds e of n: "exponential", ρ^(e/n), or "linear", 1 − (1 − ρ)e/n.
        norms_as: "scale" or "identity".
        shape: Of one input, without the samples; () takes it from the calibration data.
    """

    rounds: int = 100
    schedule: str = "exponential"
    norms_as: str = "scale"
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checked_count("rounds", self.rounds)
        for name, words in (("schedule", ("exponential", "linear")), ("norms_as", ("scale", "identity"))):
            if getattr(self, name) not in words:
                raise InvalidInput(f"{name}: expected {' or '.join(map(repr, words))}, found {getattr(self, name)!r}")

    def score_network(self, run: Run, target: Target) -> Mapping[str, Scores]:
        """Scores of the last round for the weights that stay, −1 for those that went before."""
        model = linearised(run.model, self.norms_as)
        layers, ones = {name: model.get_submodule(name) for name in run.layers}, self._ones(run)
        pools = self._pools(run, target)
        scores, alive = flow(model, layers, ones, run), torch.ones(sum(run.layers[n].weights for n in layers)).bool()
        for number in range(1, self.rounds + 1 if pools else 1):
            scores = scores if number == 1 else torch.where(alive, flow(model, layers, ones, run), -1.0)
            alive = torch.zeros_like(alive)
            for places, final in pools:
                rho, e = final / len(places), number / self.rounds
                density = rho**e if self.schedule == "exponential" else 1 - (1 - rho) * e
                count = final if number == self.rounds else max(final, round(density * len(places)))
                alive[places[scores[places].argsort(descending=True, stable=True)[:count]]] = True
            for name, masks in _apart(alive, layers).items():
                write_back_(
                    layers[name], [_times(W, m) for W, m in zip(weight_matrices(layers[name]), masks, strict=True)]
                )
        return _apart(torch.where(alive, scores, -1.0), layers)

    def _pools(self, run: Run, target: Target) -> list[tuple[Tensor, int]]:
        """Places of weights that are compared, and how many of them stay; none for neurons and patterns."""
        if not isinstance(target, Sparsity) or any(isinstance(wanted_of(target, name), tuple) for name in run.layers):
            return []
        sizes = {name: layer.weights for name, layer in run.layers.items()}
        places = dict(zip(sizes, torch.split(torch.arange(sum(sizes.values())), list(sizes.values())), strict=True))
        counts: dict[tuple[str, ...], int] = {
            (name,): count_of(wanted_of(target, name), layer)
            for name, layer in run.layers.items()  # type: ignore[arg-type]
        }
        shared = shared_counts(run.layers, target) if target.scope == "network" else counts
        return [(torch.cat([places[name] for name in names]), count) for names, count in shared.items()]

    def _ones(self, run: Run) -> object:
        """One input of ones, of the shape that the network takes; whole numbers such as tokens stay as they are."""
        if self.shape:
            return torch.ones(1, *self.shape, dtype=torch.float64)
        if run.data is None:
            raise InvalidInput("synflow: give calibration data, or the shape of an input: SynFlow(shape=(3, 32, 32))")
        batch = samples_at(next(iter(run.data)), slice(1))
        return tree_map(lambda v: torch.ones_like(v).double() if _is_real(v) else v, batch)


def linearised(model: nn.Module, norms_as: str = "scale") -> nn.Module:
    """A copy in float64 and eval mode with |w| for all parameters and buffers, and batch norms without a shift."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.abs_()
        for norm in (module for module in model.modules() if isinstance(module, NORMS)):
            for tensor, value in ((norm.running_mean, 0.0), (norm.bias, 0.0)):
                if tensor is not None:
                    tensor.fill_(value)
            if norms_as == "identity" and norm.running_var is not None:
                norm.running_var.fill_(1.0)
                norm.eps = 0.0
                if norm.weight is not None:
                    norm.weight.fill_(1.0)
    return model


def flow(model: nn.Module, layers: Mapping[str, nn.Module], ones: object, run: Run | None = None) -> Tensor:
    """w·∂R/∂w [weights of all layers], flat, group after group, biases left out; R is the sum of all outputs.

    Raises:
        NonFinite: R is not finite: the network is too deep or too wide for float64.
    """
    parameters = {p: None for layer in layers.values() for p in layer.parameters(recurse=False)}
    with evaluating(model), torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        returned = call_model(model, copy_for(model, ones), None if run is None else run.forward)
        R = torch.stack([tensor.sum() for tensor in tensors_in(returned) if tensor.is_floating_point()]).sum()
        if not bool(R.isfinite()):
            raise NonFinite(f"synflow: the sum of the network's outputs is {float(R)}: scale its weights down")
        gradients = torch.autograd.grad(R, list(parameters), allow_unused=True)
    scores = {
        p: torch.zeros_like(p) if g is None else p.detach() * g for p, g in zip(parameters, gradients, strict=True)
    }
    found = []
    for layer in layers.values():
        held = {p: p.data for p in layer.parameters(recurse=False)}
        for parameter in held:
            parameter.data = scores[parameter]
        found += [S[: _rows(layer, S)].flatten().cpu() for S in weight_matrices(layer)]
        for parameter, values in held.items():
            parameter.data = values
    return torch.cat(found)


def _rows(layer: nn.Module, W: Tensor) -> int:
    """N without the bias."""
    biased = any(bias is not None for _, bias in supported(layer).groups(layer))
    return len(W) - biased


def _apart(flat: Tensor, layers: Mapping[str, nn.Module]) -> dict[str, Scores]:
    """The entries of each layer's groups as matrices [N, M]."""
    found, at = dict[str, Scores](), 0
    for name, layer in layers.items():
        groups = []
        for W in weight_matrices(layer):
            rows = _rows(layer, W)
            groups.append(flat[at : at + rows * W.shape[1]].reshape(rows, W.shape[1]))
            at += rows * W.shape[1]
        found[name] = tuple(groups)
    return found


def _times(W: Tensor, mask: Tensor) -> Tensor:
    """The weights under a mask; the bias stays."""
    W[: len(mask)] *= mask.to(W)
    return W


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
