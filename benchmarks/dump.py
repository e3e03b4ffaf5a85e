"""Write the layers of a trained network as files that the leaderboard and the performance profile take as problems.

python benchmarks/dump.py --data ../shared/data --model lenet-300-100 --weights lenet300_mnist.safetensors
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from convexprune.cli.reference import find_model
from convexprune.files.arrays import load_array
from convexprune.network.weights import load_weights_into_
from convexprune.options import Options
from convexprune.prune import Request
from convexprune.runs.run import Run
from convexprune.solvers import L1, LayerProgram
from convexprune.solvers.testing.layers import program_of
from convexprune.targets import Eps

FOLDER = Path(__file__).resolve().parent / "results" / "layers"


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer, or one group of a convolution: inputs X [P, N], weights W [N, M], what follows as a fit's name."""

    name: str
    X: Tensor
    W: Tensor
    fit: str
    bias: bool

    def program(self, eps: float) -> LayerProgram:
        """The program whose targets the layer's own weights reach; eps is relative, and the bias is free."""
        penalty = L1.free_bias(self.X.shape[1]) if self.bias else L1()
        return program_of(self.X, self.W, self.fit, eps, penalty)


def layers(model: nn.Module, inputs: Tensor, patterns: list[str] | None = None, rows: int = 2000) -> Iterator[Layer]:
    """The layers that can be pruned, with at most so many rows of X, drawn at random (seed 0)."""
    options = Options(layers=patterns, mode="parallel", norms="leave")
    _, run = Request.of(model, inputs, Eps(0.1), None, options, None, 1).prepared(Run, lambda *_: None)
    run.samples_needed = True
    for name, layer in run.layers.items():
        for group, problem in enumerate(run.problems(name)):
            X, title = problem.inputs, name if layer.groups == 1 else f"{name} group {group}"
            kept = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))[:rows].sort().values
            yield Layer(title, X[kept], problem.W, problem.fit.name, problem.biased)


def write_layer(path: Path, layer: Layer, eps: float) -> Path:
    """An npz of X, W, fit, eps and bias."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, X=layer.X.numpy(), W=layer.W.numpy(), fit=layer.fit, eps=eps, bias=layer.bias)
    return path


def read_layer(path: Path) -> LayerProgram:
    """The program of a dumped layer."""
    with np.load(path, allow_pickle=False) as file:
        X, W = torch.from_numpy(file["X"]), torch.from_numpy(file["W"])
        return Layer(path.stem, X, W, str(file["fit"]), bool(file["bias"])).program(float(file["eps"]))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the two files below")
    found.add_argument("--model", default="lenet-300-100", help="a built-in name, or package.module:factory")
    found.add_argument("--weights", default="lenet300_mnist.safetensors")
    found.add_argument("--inputs", default="mnist.npz")
    found.add_argument("--samples", type=int, default=1000, help="inputs of the network")
    found.add_argument("--rows", type=int, default=2000, help="rows of a layer's X at most, drawn at random")
    found.add_argument("--layers", nargs="*", help="name patterns; all layers if left out")
    found.add_argument("--eps", type=float, default=0.1, help="relative to ‖Y‖")
    found.add_argument("--out", type=Path, default=FOLDER)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    a = parser().parse_args(arguments)
    reference = find_model(a.model)
    model = reference.build()
    load_weights_into_(model, a.data / a.weights)
    inputs = reference.prepare(load_array(a.data / a.inputs)[: a.samples])
    for layer in layers(model, inputs, a.layers, a.rows):
        path = a.out / f"{a.model.replace(':', '.')} {layer.name}, {layer.fit} {a.eps:g}.npz"
        write_layer(path, layer, a.eps)
        print(f"{path}: X {list(layer.X.shape)}, W {list(layer.W.shape)}")


if __name__ == "__main__":
    main()
