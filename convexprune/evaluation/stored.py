"""What evaluations have in common: sealed JSON that is read back whole, Parquet for other programs, tables as text."""

import hashlib
import json
from abc import ABC, abstractmethod
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from convexprune.files.texts import Json
from convexprune.files.weights import StrPath, existing, plain, read, save_json, write_atomically
from convexprune.report.tables import as_text
from convexprune.solvers.errors import MissingExtra

if TYPE_CHECKING:
    from rich.table import Table

_FORMAT = 1
S = TypeVar("S", bound="Stored")


class Stored(ABC):
    """A result as plain data, as a table, and as files."""

    kind: ClassVar[str]

    @abstractmethod
    def to_dict(self) -> dict[str, object]:
        """Plain data, with the samples' outcomes packed."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: Json) -> Self:
        """What ``to_dict`` described."""

    @abstractmethod
    def records(self) -> list[dict[str, object]]:
        """All figures in the long format: one a row, with the network, distribution, radius or class that it is of."""

    @abstractmethod
    def table(self, width: int = 140) -> "Table":
        """A rich table for so many characters."""

    def to_json(self) -> str:
        """``to_dict()`` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def save(self, path: StrPath) -> Path:
        """Write one JSON file that ``load`` reads back whole; its folder is made if need be.

        Raises:
            InvalidInput, OSError: It cannot be written there.
        """
        content = plain(self.to_dict())
        return save_json({"kind": self.kind, "format": _FORMAT, "sha256": _seal(content), "content": content}, path)

    @classmethod
    def load(cls, path: StrPath) -> Self:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: Nothing is at ``path``.
            InvalidInput: It is a folder, or does not end in .json.
            DamagedFile: It was changed or cut short, or holds something else.
        """
        expected = f"the JSON of a {cls.kind}, of format {_FORMAT}"
        return read(existing(path, (".json",))[0], partial(_parsed, cls), expected, "write it again with save(path)")

    def to_parquet(self, path: StrPath) -> Path:
        """Write ``records()`` as Parquet.

        Raises:
            MissingExtra: pyarrow is not installed.
            InvalidInput, OSError: It cannot be written there.
        """
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise MissingExtra('Parquet needs pyarrow: pip install "convexprune[evaluation]"') from error
        content = BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(self.records()), content)
        return write_atomically(content.getvalue(), path)

    def __str__(self) -> str:
        return as_text(self.table)


def _parsed(cls: type[S], path: Path) -> S:
    """What a file holds; any error says that it is damaged."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if (data["kind"], data["format"]) != (cls.kind, _FORMAT):
        raise ValueError(f"kind {data['kind']!r}, format {data['format']!r}")
    if _seal(data["content"]) != data["sha256"]:
        raise ValueError("its content is not what was written")
    return cls.from_dict(data["content"])


def _seal(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
