"""What unpacks to far more than its size is refused before it is unpacked, up to a limit that can be raised."""

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from convexprune.errors import DamagedFile
from convexprune.files import weights
from convexprune.files.arrays import load_array
from convexprune.files.weights import load_weights
from convexprune.solvers.errors import InvalidInput, InvalidTolerance

ZEROS = 2**20  # bytes, which deflate makes a thousandth of


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_HARMLESS", 2**16)


def npz_of_zeros(path: Path) -> Path:
    np.savez_compressed(path, x=np.zeros((ZEROS // 8, 1)), y=np.arange(3.0))
    return path


def deflated_weights(path: Path) -> Path:
    """As torch writes them, but for the compression, which torch can read."""
    stored = io.BytesIO()
    torch.save({"w": torch.zeros(ZEROS // 4)}, stored)
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return path


def expanded_weights(path: Path) -> Path:
    torch.save({"w": torch.zeros(1).expand(ZEROS // 4, 4)}, path)
    return path


@pytest.mark.usefixtures("_small")
def test_arrays_that_unpack_to_too_much_are_refused_and_others_in_the_file_are_not(tmp_path: Path) -> None:
    path = npz_of_zeros(tmp_path / "x.npz")
    with pytest.raises(
        InvalidInput, match=r"unpacks to 1,048,\d+, more than 100 times its size.*max_ratio=\d+ \(--max"
    ):
        load_array(path, "x")
    assert load_array(path, "y").tolist() == [0, 1, 2]
    assert load_array(path, "x", max_ratio=2000).shape == (ZEROS // 8, 1)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(("make", "needed"), [(deflated_weights, 1000), (expanded_weights, 5000)])
def test_weights_that_unpack_to_too_much_are_refused(tmp_path: Path, make, needed: int) -> None:  # type: ignore[no-untyped-def]
    path = make(tmp_path / "w.pt")
    with pytest.raises(InvalidInput, match="more than 100 times its size"):
        load_weights(path)
    assert load_weights(path, max_ratio=needed)["w"].count_nonzero() == 0


def test_what_is_small_unpacked_passes_whatever_its_ratio(tmp_path: Path) -> None:
    assert len(load_array(npz_of_zeros(tmp_path / "x.npz"), "x")) == ZEROS // 8
    assert len(load_weights(deflated_weights(tmp_path / "w.pt"))["w"]) == ZEROS // 4


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("shape", [(2**38,), (2**20, 2**20, 2**20)])
def test_headers_that_tell_of_more_than_there_is_are_damaged_and_nothing_is_allocated(
    tmp_path: Path, suffix: str, shape: tuple[int, ...]
) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(800)
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    with pytest.raises(DamagedFile, match=r"its header tells of [\d,]+ bytes, and it has 9"):
        load_array(path)


@pytest.mark.parametrize("limit", [0.5, -1, float("nan")])
def test_limits_that_are_none(tmp_path: Path, limit: float) -> None:
    np.save(tmp_path / "x.npy", np.ones(3))
    with pytest.raises(InvalidTolerance, match="max_ratio"):
        load_array(tmp_path / "x.npy", max_ratio=limit)
    with pytest.raises(InvalidTolerance, match="max_ratio"):
        load_weights(tmp_path / "x.pt", max_ratio=limit)
