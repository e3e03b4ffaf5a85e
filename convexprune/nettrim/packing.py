"""Tasks and answers as they travel to other processes and machines: arrays beside one pickle of all else.

joblib memory-maps numpy arrays and Dask sends them without copies, but neither knows tensors. What is opened has the
same values and strides in memory of torch's own, so that its products round alike.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import Tensor

from convexprune.solvers.errors import InvalidInput

_CARRIERS = {torch.bfloat16: torch.int16}  # numpy does not know it: it travels as one of the same width
_DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_DTYPES |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True, eq=False)
class Array:
    """A tensor's values, and how it lay in memory."""

    values: np.ndarray[Any, Any]
    dtype: torch.dtype
    stride: tuple[int, ...]
    device: str

    @classmethod
    def of(cls, tensor: Tensor) -> "Array":
        """A view, where the tensor is on the CPU."""
        here = tensor.detach().cpu()
        return cls(_viewed(here), tensor.dtype, tuple(here.stride()), str(tensor.device))

    def tensor(self) -> Tensor:
        """A tensor of its own, on the same device as the first.

        Raises:
            InvalidInput: There is no such device here.
        """
        made = torch.empty_strided(self.values.shape, self.stride, dtype=self.dtype)
        np.copyto(_viewed(made), self.values)
        try:
            return made.to(self.device)
        except (RuntimeError, AssertionError) as error:
            remedy = "use workers that have it, or move the model to the CPU"
            raise InvalidInput(f"arrays are on {self.device!r}, which a worker lacks ({error}): {remedy}") from error


@dataclass(frozen=True, eq=False)
class Parcel:
    """Anything, with its arrays apart."""

    frame: bytes
    arrays: tuple[Array, ...]

    def __sizeof__(self) -> int:
        """For Dask, which plans by it."""
        return len(self.frame) + sum(array.values.nbytes for array in self.arrays)

    def opened(self) -> Any:
        """A copy of what was packed.

        Raises:
            InvalidInput: Arrays were on a device that is not here.
        """
        return _Unpickler(io.BytesIO(self.frame), self.arrays).load()


def packed(content: Any) -> Parcel:
    """A parcel that other processes can open; its arrays are views, and one that is used twice is sent once.

    Raises:
        Exception: What pickle raises where it cannot.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    return Parcel(buffer.getvalue(), tuple(Array.of(tensor) for _, tensor in pickler.found.values()))


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc] # untyped; it takes classes that a script defines
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.found: dict[int, tuple[int, Tensor]] = {}

    def persistent_id(self, value: object) -> int | None:
        """Tensors are told by their place among the arrays; rare kinds of them pickle themselves."""
        if type(value) is not Tensor or value.dtype not in _DTYPES or value.layout is not torch.strided:
            return None
        return self.found.setdefault(id(value), (len(self.found), value))[0]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, arrays: tuple[Array, ...]) -> None:
        super().__init__(file)
        self._arrays = arrays
        self._opened: dict[int, Tensor] = {}

    def persistent_load(self, number: int) -> Tensor:
        """One tensor for each array, however often it is used."""
        if number not in self._opened:
            self._opened[number] = self._arrays[number].tensor()
        return self._opened[number]


def _viewed(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.view(_CARRIERS.get(tensor.dtype, tensor.dtype)).numpy()
