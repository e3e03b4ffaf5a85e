"""What is measured while the models are at hand, for a page that is written later: costs, and pictures of weights.

DIR/extras.json         what sparsity buys, and what the pictures show (written last)
DIR/maps.safetensors    the pictures
"""

import base64
import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from convexprune.costs import flops, latency, storage
from convexprune.files.texts import Json
from convexprune.files.weights import StrPath, read, safetensors_bytes, save_json, write_atomically
from convexprune.layers.memory import Batch
from convexprune.masks import kept_masks, make_permanent_
from convexprune.network.forwards import Forward, check_module
from convexprune.report.report import Report
from convexprune.runs.journal import read_json
from convexprune.solvers.errors import InvalidInput

SIDE = 160
"""The most cells that a picture has along either side."""

_REMEDY = "delete it and have it written again by save_extras, or do without"


def save_extras(
    folder: StrPath,
    dense_state: Mapping[str, Tensor] | nn.Module,
    model: nn.Module,
    batch: Batch = None,
    report: Report | None = None,
    *,
    forward: Forward | None = None,
) -> Path:
    """Write what sparsity buys, and pictures of the weights before and after, next to a run's report.

    Args:
        folder: The run directory.
        dense_state: The state dict before, as copies, or the model before. Where neurons are gone, operations and times
            before are known only from the model.
        model: The network now; left as found.
        batch: One batch, for operations and times; without it neither is measured.
        report: What was pruned: weights of its layers are shown even where nothing has changed.
        forward: Called as ``forward(model, batch)`` in place of ``model(batch)``.

    Returns:
        The path of extras.json.

    Raises:
        InvalidInput: ``dense_state`` is that of another network, or shares its tensors with the model.
        OSError: The folder cannot be written to.
        ConvexPruneError: As ``storage``, ``flops`` and ``latency``.
    """
    state = _without_masks(dense_state).state_dict() if isinstance(dense_state, nn.Module) else dense_state
    now = _without_masks(check_module(model))
    pairs = _pairs(state, model, now.state_dict())
    before = dense_state if isinstance(dense_state, nn.Module) else _loaded(now, state)
    old_size = storage(dict(state) if before is None else before)
    data: dict[str, Any] = {"storage": {"before": old_size.to_dict(), "after": storage(model).to_dict()}}
    if batch is not None:
        old = None if before is None else flops(before, batch, forward=forward).to_dict()
        data["flops"] = {"before": old, "after": flops(model, batch, forward=forward).to_dict()}
        data["latency"] = latency(model, batch, before=before, forward=forward).to_dict()
    rows, maps = list[Json](), dict[str, Tensor]()
    reported = tuple(f"{row.name}." if row.name else "" for row in (() if report is None else report.layers))
    for key, (old_weight, weight) in pairs.items():
        if key.startswith(reported) or not torch.equal(old_weight, weight):
            peak, number = float(old_weight.abs().max()) if old_weight.numel() else 0.0, len(rows)
            maps[f"before.{number}"], cell = pooled(old_weight, peak)
            maps[f"after.{number}"], _ = pooled(weight, peak, cell)
            rows.append({"name": key, "before": list(old_weight.shape), "after": list(weight.shape), "cell": cell})
    write_atomically(safetensors_bytes(maps), Path(folder) / "maps.safetensors")
    return save_json({"maps": rows, **data}, Path(folder) / "extras.json")


def read_extras(folder: Path) -> tuple[Json, dict[str, Tensor]] | None:
    """What ``save_extras`` wrote, plain data and pictures by name; None where it was not called.

    Raises:
        DamagedFile: A file of the two is missing, or cannot be read.
    """
    path = folder / "extras.json"
    if not path.exists():
        return None
    return read_json(path, _REMEDY), read(folder / "maps.safetensors", load_file, "pictures of weights", _REMEDY)


def pooled(weight: Tensor, peak: float, cell: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:
    """The largest |w| of each cell of a weight [M, ...] as a matrix with a row an output, in 255 steps of the peak.

    A cell is 0 where all its weights are, and only there.

    Returns the picture, uint8, and the cell, (rows, columns): if not given the least that leaves at most SIDE a side.
    """
    matrix = weight.detach().abs().flatten(1).to(torch.float32)
    rows, columns = matrix.shape
    cell = cell or (max(1, -(-rows // SIDE)), max(1, -(-columns // SIDE)))
    if not matrix.numel():
        return torch.zeros(1, 1, dtype=torch.uint8), cell
    largest = functional.max_pool2d(matrix[None, None], cell, ceil_mode=True)[0, 0]
    steps = (largest / (peak or 1.0) * 255).clamp_(max=255)
    return torch.where(largest > 0, steps.clamp_(min=1), 0.0).to(torch.uint8), cell


def picture(steps: Tensor) -> str:
    """A grey PNG as a data URI: black where a step is 255, white only where it is 0."""
    from PIL import Image

    # |w| spreads over decades: by the square root small weights are seen beside zeros.
    shades = torch.where(steps > 0, 215 * (1 - (steps / 255).sqrt()), 255.0).round().to(torch.uint8)
    content = io.BytesIO()
    Image.fromarray(shades.numpy()).save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _without_masks(model: nn.Module) -> nn.Module:
    """The model, or a copy with zeros in its weights in place of masks."""
    if not kept_masks(model):
        return model
    own = copy.deepcopy(model)
    make_permanent_(own)
    return own


def _pairs(
    state: Mapping[str, Tensor], model: nn.Module, now: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each weight before and now."""
    places = {tensor.data_ptr() for tensor in model.state_dict().values() if isinstance(tensor, Tensor)}
    weights = {key: old for key, old in state.items() if isinstance(old, Tensor) and old.dim() > 1}
    for key, old in weights.items():
        if key not in now:
            raise InvalidInput(
                f"dense_state: the model has no {key!r}; give the state dict of this network before it was pruned"
            )
        if old.numel() and old.data_ptr() in places:
            raise InvalidInput(
                f"dense_state: {key!r} is the model's own tensor, so it holds what pruning left; copy before pruning: "
                "{name: tensor.clone() for name, tensor in model.state_dict().items()}"
            )
    return {key: (old.detach().cpu(), now[key].cpu()) for key, old in weights.items()}


def _loaded(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module | None:
    """A copy of the model with these weights; None where they are of other shapes."""
    before = copy.deepcopy(model)
    try:
        before.load_state_dict(state)
    except RuntimeError:
        return None
    return before
