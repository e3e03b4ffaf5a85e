"""From whatever the caller holds to checked tensors."""

import math
import warnings
from numbers import Integral, Real
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convexprune.solvers.errors import EmptyInput, InvalidInput, InvalidTolerance, NonFinite, ShapeMismatch

_BLOCK_ENTRIES = 2**20
_ORDINARY = 32  # exponents of two within which squares take half of float32's range, and their sums have the rest

ArrayLike: TypeAlias = Tensor | npt.NDArray[np.generic]


def as_matrix(name: str, value: ArrayLike) -> Tensor:
    """``value`` as a finite, nonempty, real matrix, converted as by ``as_real``.

    Raises:
        ShapeMismatch: Not two-dimensional. EmptyInput: One of the dimensions is 0. NonFinite: NaN or infinity inside.
        InvalidInput: As ``as_real``.
    """
    tensor = as_real(name, value)
    if tensor.ndim != 2:
        raise ShapeMismatch(
            f"{name}: expected a matrix, found shape {list(tensor.shape)}; reshape it to two dimensions"
        )
    if 0 in tensor.shape:
        raise EmptyInput(f"{name}: expected at least one row and one column, found shape {list(tensor.shape)}")
    return check_finite(name, tensor)


def count_nonfinite(tensor: Tensor) -> int:
    """How many entries are NaN or infinite, without temporaries of the tensor's size."""
    parts = [tensor[rows] for rows in blocks_of(tensor)] if tensor.ndim == 2 else [tensor]
    return sum(int(part.numel() - torch.isfinite(part).sum()) for part in parts)


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; NonFinite is raised where it holds NaN or infinity."""
    bad = count_nonfinite(tensor)
    if bad:
        raise NonFinite(f"{name}: {bad} of {tensor.numel()} entries are NaN or infinite; clean the data first")
    return tensor


def blocks_of(A: Tensor, columns: int | None = None) -> list[slice]:
    """Blocks of rows of A [P, ·] of about a million entries (of ``columns`` columns), what a cache can hold.

    On an accelerator, where starting a computation costs more than missing a cache, they are far larger.
    """
    entries = _BLOCK_ENTRIES if A.device.type == "cpu" else 64 * _BLOCK_ENTRIES
    rows = max(1, entries // max(1, A.shape[1] if columns is None else columns))
    return [slice(first, min(first + rows, len(A))) for first in range(0, len(A), rows)]


def add_gram(total: Tensor, A: Tensor) -> Tensor:
    """total + AᵀA in place, both symmetric: blocks off the diagonal are computed once, three eighths less."""
    N = len(total)
    width = max(64, -(-N // 4))
    for first in range(0, N, width):
        here, right = slice(first, first + width), slice(first + width, N)
        total[here, here].addmm_(A[:, here].T, A[:, here])
        if first + width < N:
            product = A[:, here].T @ A[:, right]
            total[here, right] += product
            total[right, here] += product.T
    return total


def check_shape(name: str, tensor: Tensor, expected: tuple[int, int], meaning: str) -> Tensor:
    """The tensor itself; ShapeMismatch is raised unless it has the expected shape."""
    if tuple(tensor.shape) != expected:
        raise ShapeMismatch(f"{name}: expected shape {list(expected)} ({meaning}), found {list(tensor.shape)}")
    return tensor


def checked_radius(name: str, value: object) -> float:
    """``value`` as a finite float ≥ 0; InvalidTolerance is raised for anything else."""
    number = as_number(name, value, "a number ≥ 0")
    if not (math.isfinite(number) and number >= 0):
        raise InvalidTolerance(f"{name}: expected a finite number ≥ 0, found {number}")
    return number


def as_radii(name: str, value: float | ArrayLike, targets: Tensor) -> float | Tensor:
    """``value`` as a radius ≥ 0, or as [M] in float64, one for each column of the targets, on their device.

    Raises:
        ShapeMismatch: Another number of radii. InvalidTolerance: One is negative, NaN or infinite.
        InvalidInput: As ``as_real``.
    """
    if not np.ndim(value):
        return checked_radius(name, value)
    radii = as_real(name, value)  # type: ignore[arg-type]
    if tuple(radii.shape) != (targets.shape[1],):
        neurons, found = targets.shape[1], list(radii.shape)
        raise ShapeMismatch(f"{name}: expected a number, or one for each of the {neurons} neurons, found shape {found}")
    radii = radii.to(targets.device, torch.float64)
    bad = ~(torch.isfinite(radii) & (radii >= 0))
    if bool(bad.any()):
        raise InvalidTolerance(f"{name}: expected finite numbers ≥ 0, found {float(radii[bad][0])}")
    return radii


def as_number(name: str, value: object, expected: str = "a number") -> float:
    """``value``, Python's, numpy's or a tensor of one real entry, as a float; else InvalidTolerance is raised."""
    if isinstance(value, Tensor):
        value = value.detach()
    if isinstance(value, Real | np.ndarray | Tensor):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise InvalidTolerance(f"{name}: expected {expected}, found {value!r}")


def checked_positive(name: str, value: object) -> float:
    """``value`` as a finite float > 0; InvalidTolerance is raised for anything else."""
    number = as_number(name, value, "a positive number")
    if not 0 < number < math.inf:
        raise InvalidTolerance(f"{name}: expected a positive number, found {number}")
    return number


def checked_count(name: str, value: object, least: int = 1) -> int:
    """``value`` as a whole number ≥ ``least``; InvalidTolerance is raised for anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InvalidTolerance(f"{name}: expected a whole number ≥ {least}, found {value!r}")
    return int(value)


def checked_dtype(dtype: object) -> None:
    """Raise InvalidInput unless iterations can run in ``dtype``: float32, float64, or None for the program's own."""
    if dtype not in (None, torch.float32, torch.float64):
        raise InvalidInput(f"dtype: expected torch.float32, torch.float64 or None, found {dtype!r}")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16 matrices, two to sixteen times as fast."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    # Newer releases of torch tell; elsewhere such products may be emulated, which is slow.
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def norm(A: Tensor) -> Tensor:
    """‖A‖_F as a float64 scalar tensor; where squares would overflow, or vanish, A is scaled.

    torch adds float32 squares in float32, which loses 6e-4 of the norm at 2·10⁷ entries; short runs do not.
    """
    A = A.to(working_dtype(A.dtype))
    found, room = _by_runs(A), torch.finfo(A.dtype).max ** 0.45
    if 1 / room < float(found) < room or not A.numel():
        return found
    largest = A.abs().max()
    if not 0 < float(largest) < math.inf:
        return largest.to(torch.float64)
    unit = power_of_two(float(largest))
    return _by_runs(A / unit) * unit


def power_of_two(size: float) -> float:
    """The power of two below a positive number: dividing by it rounds nothing."""
    return math.ldexp(1.0, math.frexp(size)[1] - 1)


def unit_of(*arrays: Tensor) -> float:
    """1, or the power of two below their largest entry where squares of that overflow, or vanish, in float32."""
    largest = max(float(torch.maximum(-A.amin(), A.amax())) for A in arrays)
    return 1.0 if 2.0**-_ORDINARY < largest < 2.0**_ORDINARY or not largest else power_of_two(largest)


def _by_runs(A: Tensor) -> Tensor:
    if A.dtype != torch.float64:
        flat = A.reshape(-1)
        whole = len(flat) - len(flat) % 4096
        runs = torch.linalg.vector_norm(flat[:whole].view(-1, 4096), dim=1)
        A = torch.cat([runs, torch.linalg.vector_norm(flat[whole:]).reshape(1)]).to(torch.float64)
    length: Tensor = torch.linalg.vector_norm(A)
    return length


def stratified(total: int, count: int, seed: int = 0) -> Tensor:
    """``count`` ≤ ``total`` of the numbers 0 to total − 1, ascending: a random one of each of equally long runs.

    Rows that belong together lie side by side, as the positions of an image do: each image has its share of the sample.
    """
    ends = torch.arange(count + 1) * total // count
    places = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ends[:-1] + (places * ends.diff()).long()


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that iterations on data of this type run in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_real(name: str, value: ArrayLike) -> Tensor:
    """``value`` as a real tensor of any shape that shares the caller's memory where it can.

    Integers and booleans become float32 (float64 where float32 cannot hold them exactly).

    Raises:
        InvalidInput: Complex numbers, masked entries, or nothing that converts to a dense tensor.
    """
    if np.ma.is_masked(value):
        raise InvalidInput(
            f"{name}: found masked entries, expected numbers everywhere; fill them, or leave their rows out"
        )
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
            # torch shares memory with a natively ordered array that is not reversed.
            shared = array.dtype.isnative and min(array.strides, default=0) >= 0
            array = array if shared else array.astype(array.dtype.newbyteorder("="), copy=True)
            with warnings.catch_warnings():
                # A read-only one (a memory-mapped file) may be larger than memory; nothing here writes to it.
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                value = torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            found = f"one of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise InvalidInput(f"{name}: expected a tensor or a numeric array, found {found}") from error
    if value.layout != torch.strided or value.is_meta:
        found = "one without data" if value.is_meta else str(value.layout)
        raise InvalidInput(f"{name}: expected a dense tensor, found {found}; use to_dense()")
    if value.is_complex():
        raise InvalidInput(f"{name}: expected real numbers, found {value.dtype}")
    if value.is_floating_point():
        return value.detach()
    exact_in_float32 = value.dtype in (torch.bool, torch.uint8, torch.int8, torch.int16)
    return value.to(torch.float32 if exact_in_float32 else torch.float64)
