"""Layers of trained networks, written by ``benchmarks/dump.py``."""

from pathlib import Path

from benchmark_utils import FOLDER, read_layer
from benchopt import BaseDataset

from convexprune.solvers import LayerProgram


class Dataset(BaseDataset):
    """A dumped layer: a file name in the folder of dumps, or a path."""

    name = "layer"
    parameters = {"file": sorted(path.name for path in FOLDER.glob("*.npz")) or [None]}  # noqa: RUF012 - benchopt's way
    parameter_template = "{file}"

    def get_data(self) -> dict[str, LayerProgram | None]:
        return {"program": read_layer(FOLDER / Path(self.file)) if self.file else None}
