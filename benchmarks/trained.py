"""Trained networks with their data, a short fine-tuning in which zeros stay zeros, and runs that are made once."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from resnet20 import build, prepare
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from convexprune import load_weights_into_
from convexprune.cli.reference import find_model
from convexprune.masks import keep_masks_, make_permanent_
from convexprune.pruners.finetuning import crop_and_flip

__all__ = ["Images", "Kept", "cifar10", "finetune_", "load", "train_"]

Images = tuple[Tensor, Tensor]  # and their labels
Run = TypeVar("Run")

_LENETS = {"lenet-300-100": "lenet300", "lenet-5": "lenet5"}


def load(name: str, data: Path) -> tuple[nn.Module, Images, Images]:
    """A network with its training and test images: a LeNet on MNIST, or ResNet-20 on JPEG-coded CIFAR-10.

    Of CIFAR-10's training set there are 4,000 images, one class after the other.
    """
    if name in _LENETS:
        reference, files = find_model(name), np.load(data / "mnist.npz")
        model = reference.build()
        load_weights_into_(model, data / f"{_LENETS[name]}_mnist.safetensors")
        parts = [(reference.prepare(files[f"x_{k}"]), torch.from_numpy(files[f"y_{k}"])) for k in ("train", "test")]
    else:
        model = build()
        load_weights_into_(model, data / "resnet20_cifar10.safetensors")
        sets = [np.load(data / f"cifar10_{part}.npz") for part in ("calib", "test")]
        parts = [(prepare(file["x"]), torch.from_numpy(file["y"])) for file in sets]
    train, test = ((x, y.long()) for x, y in parts)
    return model.eval(), train, test


def cifar10(data: Path, count: int, tests: int) -> tuple[Images, Images]:
    """So many JPEG-coded training and test images and their labels, as many of each class."""
    from PIL import Image

    files, test = np.load(data / "cifar10_train_jpeg.npz"), np.load(data / "cifar10_test.npz")
    content, ends = files["jpeg"], files["offsets"]
    pixels = [Image.open(io.BytesIO(content[ends[i] : ends[i + 1]].tobytes())).convert("RGB") for i in range(count)]
    train = prepare(np.stack([np.asarray(image) for image in pixels])), torch.from_numpy(files["y"][:count]).long()
    return train, (prepare(test["x"][:tests]), torch.from_numpy(test["y"][:tests]).long())


def train_(model: nn.Module, data: Images, steps: int, rate: float, seed: int, *, constant: bool = False) -> None:
    """Stochastic gradient descent with momentum on moved and mirrored images; the rate falls by a cosine, or stays."""
    x, y = data
    random = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps), eta_min=rate if constant else 0)
    model.train()
    order = torch.cat([torch.randperm(len(x), generator=random) for _ in range(-(-steps * 128 // len(x)))] or [y[:0]])
    for batch in order[: steps * 128].view(steps, 128):
        optimiser.zero_grad()
        F.cross_entropy(model(crop_and_flip(x[batch], random)), y[batch]).backward()
        optimiser.step()
        schedule.step()
    model.eval()


def finetune_(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, rate: float, seed: int) -> None:
    """Adam with a cosine, batches of 128; weights that are 0 stay 0."""
    x, y = data
    shuffle = torch.Generator().manual_seed(seed)
    keep_masks_(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    steps = len(x) // 128
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, epochs * steps))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=shuffle)[: steps * 128].view(steps, 128):
            optimiser.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
            schedule.step()
    model.eval()
    make_permanent_(model)


class Kept(Generic[Run]):
    """Runs by key, a line each in a file as soon as they are made; those that are there are not made again."""

    def __init__(self, log: Path, kind: type[Run], key: Callable[[Run], object], console: Console) -> None:
        known = [kind(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
        self.log, self.key, self.console = log, key, console
        self.runs = {key(run): run for run in known}

    def get(self, key: object, make: Callable[[], Run]) -> Run:
        if key not in self.runs:
            self.add(make())
        return self.runs[key]

    def add(self, made: Run) -> None:
        if self.key(made) in self.runs:
            return
        self.runs[self.key(made)] = made
        with self.log.open("a") as file:
            file.write(json.dumps(asdict(made)) + "\n")  # type: ignore[call-overload]
        self.console.print(made, highlight=False)
