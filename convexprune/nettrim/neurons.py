"""Whole neurons: which of a layer's inputs are worth least, and the best weights on those that stay.

An input of a layer is a neuron of the layer before: all its rows of U, the positions of a kernel or of a flattened
map. The group penalty Σ_c ‖X_c‖_F ‖U_c‖_F lets whole neurons vanish as eps grows; its weights ‖X_c‖_F make it blind to
a rescaling of neurons.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.nettrim.answers import Answer, Plain, answered
from convexprune.nettrim.measuring import Measurement
from convexprune.nettrim.posed import How, Posed
from convexprune.nettrim.stopping import Until
from convexprune.solvers import LayerProgram, Solution, Status, TopK, certify
from convexprune.solvers.arrays import norm
from convexprune.solvers.certificate.solution import Seconds
from convexprune.solvers.methods import EpsPath
from convexprune.solvers.methods.refit import refit_told
from convexprune.solvers.methods.solve import environment
from convexprune.solvers.programs import GroupL2


@dataclass(frozen=True)
class RankInputs(Measurement):
    """For each neuron that feeds the layer the relative eps at which it vanishes along the path.

    ``path`` of the answer has a point (eps, share, neuron) for each: the last eps of the grid at which it is there, and
    its part of what the neurons that are last there add to the outputs, to tell them apart.
    """

    neurons: int
    eps: tuple[float, ...] = (0.03, 0.06, 0.1, 0.15, 0.2, 0.27, 0.35, 0.45, 0.55, 0.7, 0.85)
    rows: int = 4
    kind: ClassVar[str] = "rank-inputs"

    def programs(self, posed: Posed, how: How) -> LayerProgram:
        """The group program of the loosest eps."""
        fit, _ = posed.within(max(self.eps), replace(how, cascade=False))
        X = posed.inputs[:, : posed.rows]
        squares = X.double().square().sum(0).reshape(self.neurons, -1).sum(1)
        labels, weights = self._labels(posed), squares.sqrt()
        if posed.biased:  # the bias is a group of its own, and free
            weights = torch.cat([weights, weights.new_zeros(1)])
        # A neuron that never speaks costs nothing; it must not be free, for its weights would be arbitrary.
        weights[: self.neurons].clamp_(min=float(weights.max()) * 1e-6 or 1.0)
        return posed.program(fit, posed.restricted(GroupL2(labels, weights.to(posed.dtype)), how))

    def _labels(self, posed: Posed) -> Tensor:
        neuron = torch.arange(posed.rows, device=posed.stored.device) // (posed.rows // self.neurons)
        if posed.biased:
            neuron = torch.cat([neuron, neuron.new_full((1,), self.neurons)])
        return neuron[:, None].expand(-1, posed.stored.shape[1]).contiguous()

    def read(self, posed: Posed, path: EpsPath) -> tuple[tuple[float, float, int], ...]:
        """The last eps of each neuron, and its part of what those that are last there add."""
        last, size = torch.full((self.neurons,), -1), torch.zeros(self.neurons, dtype=torch.float64)
        for number, point in enumerate(path):
            added = self._added(posed, point.solution.weights)
            last[added > 0], size = number, torch.where(added > 0, added, size)
        return tuple((0.0 if last[c] < 0 else self.eps[int(last[c])], float(size[c]), c) for c in range(self.neurons))

    def _added(self, posed: Posed, U: Tensor) -> Tensor:
        """‖X_c U_c‖_F of each neuron [neurons], on the CPU."""
        X = posed.inputs[:, : posed.rows].to(U).reshape(len(posed.inputs), self.neurons, -1)
        rows = U[: posed.rows].reshape(self.neurons, -1, U.shape[1])
        alive = rows.abs().sum((1, 2)) > 0
        added = [float(norm(X[:, c] @ rows[c])) if alive[c] else 0.0 for c in range(self.neurons)]
        return torch.tensor(added, dtype=torch.float64)

    def __str__(self) -> str:
        return f"rank {self.neurons} inputs"


@dataclass(frozen=True)
class KeepInputs(Plain):
    """The best weights on the rows of the neurons that stay."""

    neurons: int
    kept: tuple[int, ...]
    kind: ClassVar[str] = "keep-inputs"

    def programs(self, posed: Posed, how: How) -> LayerProgram:
        """The loss, within as many weights as stay."""
        count = len(self.kept) * (posed.rows // self.neurons) * posed.stored.shape[1]
        return posed.program(posed.loss(), TopK(count, rows=posed.rows, within=posed.support(how)))

    def support(self, posed: Posed, how: How) -> Tensor:
        """Boolean [N, M]; inputs that are nothing but rounding get no weights, which would have to be huge."""
        rows = torch.zeros(self.neurons, dtype=torch.bool, device=posed.stored.device)
        rows[list(self.kept)] = True
        sizes = posed.inputs[:, : posed.rows].double().norm(dim=0)
        least = 16 * torch.finfo(posed.dtype).eps * sizes.max()
        rows = rows.repeat_interleave(posed.rows // self.neurons) & (sizes > least)
        if posed.biased:
            rows = torch.cat([rows, rows.new_ones(1)])
        support, allowed = rows[:, None].expand_as(posed.stored).contiguous(), posed.support(how)
        return support if allowed is None else support & allowed

    def meet(self, posed: Posed, how: How) -> Answer:
        """A refit; where every neuron stays, the trained weights."""
        began = time.perf_counter()
        program = self.programs(posed, how)
        every, over = len(self.kept) == self.neurons and not how.cascade, Until(how)
        weights, short = (posed.W, {}) if every else refit_told(program, self.support(posed, how), over)
        solved = time.perf_counter() - began
        told = {"solver": "refit", "message": "", "effective": short} | environment(weights)
        limits = {"tol": how.options["tol"], "feas_tol": how.options["feas_tol"]}
        certificate = certify(program, weights)
        seconds = Seconds(0.0, solved, time.perf_counter() - began - solved)
        status = over.ended or Status.NO_BOUND
        solution = Solution(weights, None, status, certificate, (), 0, seconds, told | {"limits": limits})
        return answered(program, solution, posed, math.inf, math.inf, [])

    def __str__(self) -> str:
        return f"{len(self.kept)} of {self.neurons} inputs"
