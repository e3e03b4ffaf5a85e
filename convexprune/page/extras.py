"""What is measured while the models are at hand, for a page that is written later: costs, and pictures of weights.

DIR/extras.json         what sparsity buys, and what the pictures show, with their SHA-256 (written last)
DIR/maps.safetensors    the pictures
"""

import base64
import copy
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

from convexprune.costs import flops, latency, storage
from convexprune.errors import DamagedFile
from convexprune.files.texts import Json
from convexprune.files.weights import StrPath, safetensors_bytes, save_json, write_atomically
from convexprune.layers.memory import Batch
from convexprune.masks import kept_masks, make_permanent_
from convexprune.network.forwards import Forward, check_module
from convexprune.report.report import Report
from convexprune.runs.journal import read_json
from convexprune.solvers.errors import InvalidInput

SIDE = 160
"""The most cells that a picture has along either side."""

_FORMAT = 1
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
    state = dense_state.state_dict() if isinstance(dense_state, nn.Module) else dense_state
    pairs = _pairs(state, check_module(model))
    before = dense_state if isinstance(dense_state, nn.Module) else _rebuilt(state, model)
    costs = _costs(before, state, model, batch, forward)
    rows, maps = list[Json](), dict[str, Tensor]()
    reported = tuple(f"{row.name}." if row.name else "" for row in (() if report is None else report.layers))
    for key, (old, new) in pairs.items():
        if key.startswith(reported) or old.shape != new.shape or not bool((old == new).all()):
            peak = float(old.abs().max()) if old.numel() else 0.0
            number = str(len(rows))
            maps[f"before.{number}"], cell = pooled(old, peak)
            maps[f"after.{number}"], _ = pooled(new, peak, cell)
            rows.append({"name": key, "before": list(old.shape), "after": list(new.shape), "cell": cell, "peak": peak})
    pictures = safetensors_bytes(maps)
    write_atomically(pictures, Path(folder) / "maps.safetensors")
    own = {"format": _FORMAT, "maps": rows, "sha256": hashlib.sha256(pictures).hexdigest()}
    return save_json(own | costs, Path(folder) / "extras.json")


def read_extras(folder: Path) -> tuple[Json, dict[str, Tensor]] | None:
    """What ``save_extras`` wrote, plain data and pictures by name; None where it was not called.

    Raises:
        DamagedFile: A file of the two is missing, was changed or cut short.
    """
    path, pictures = folder / "extras.json", folder / "maps.safetensors"
    if not path.exists():
        return None
    data = read_json(path, _REMEDY)
    if data.get("format") != _FORMAT:
        raise DamagedFile(f"{path}: format {data.get('format')!r}, expected {_FORMAT}; {_REMEDY}")
    content = pictures.read_bytes() if pictures.exists() else b""
    if hashlib.sha256(content).hexdigest() != data.get("sha256"):
        found = "changed or cut short" if content else "missing"
        raise DamagedFile(f"{pictures} is {found}, expected the file that {path.name} was written for; {_REMEDY}")
    return data, load(content)


def pooled(weight: Tensor, peak: float, cell: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:
    """The largest |w| of each cell of a weight [M, ...] as a matrix with a row an output, in 255 steps of the peak.

    A cell is 0 where all its weights are, and only there.

    Returns the picture, uint8, and the cell, (rows, columns): if not given the least that leaves at most SIDE a side.
    """
    matrix = weight.detach().abs().reshape(len(weight), -1).to(torch.float32)
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

    # |w| spreads over decades: by the square root small weights can be told from zeros.
    shades = torch.where(steps > 0, 215 * (1 - (steps / 255).sqrt()), 255.0).round().to(torch.uint8)
    content = io.BytesIO()
    Image.fromarray(shades.numpy()).save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _pairs(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Each weight before and now, masks applied."""
    found = {}
    for key, old in state.items():
        if not isinstance(old, Tensor) or old.dim() < 2:
            continue
        path, _, name = key.rpartition(".")
        try:
            new = getattr(model.get_submodule(path), name)
        except AttributeError as error:
            missing = f"dense_state: the model has no {key!r}; give the state dict of this network before it was pruned"
            raise InvalidInput(missing) from error
        if old.numel() and old.data_ptr() == new.data_ptr():
            raise InvalidInput(
                f"dense_state: {key!r} is the model's own tensor, so it holds what pruning left; copy before pruning: "
                "{name: tensor.clone() for name, tensor in model.state_dict().items()}"
            )
        found[key] = (old.detach().cpu(), new.detach().cpu())
    return found


def _rebuilt(state: Mapping[str, Tensor], model: nn.Module) -> nn.Module | None:
    """The model before; None where the shapes are no longer those."""
    before = copy.deepcopy(model)
    if kept_masks(before):
        make_permanent_(before)
    own = before.state_dict()
    if own.keys() != state.keys() or any(own[key].shape != value.shape for key, value in state.items()):
        return None
    before.load_state_dict(state)
    return before


def _costs(
    before: nn.Module | None, state: Mapping[str, Tensor], model: nn.Module, batch: Batch, forward: Forward | None
) -> dict[str, object]:
    stored = storage(dict(state) if before is None else before)
    costs: dict[str, object] = {"storage": {"before": stored.to_dict(), "after": storage(model).to_dict()}}
    if batch is not None:
        old = None if before is None else flops(before, batch, forward=forward).to_dict()
        costs["flops"] = {"before": old, "after": flops(model, batch, forward=forward).to_dict()}
        costs["latency"] = latency(model, batch, before=before, forward=forward).to_dict()
    return costs
