"""A run on disk: each solved layer as soon as it is solved, so that a run that was killed goes on where it was.

    DIR/run.json                      what is solved: fingerprints of model and data, the recipe (written first)
    DIR/layers/NAME-KEY.safetensors   arrays of one solved layer
    DIR/layers/NAME-KEY.json          all else about it, with a SHA-256 of everything (written last: it is the proof)
    DIR/.lock                         held while a process writes here; the system lets it go when the process ends

Every file is written beside its place, flushed to disk and renamed. Nothing is ever unpickled, and nothing in a file
names code: kinds, fits and statuses are looked up in fixed tables.
"""

import hashlib
import json
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self, cast

import numpy as np
from filelock import FileLock, Timeout
from safetensors.torch import load as load_tensors
from torch import Tensor

from convexprune.errors import DamagedFile, OtherRun
from convexprune.files.texts import Json, utf8
from convexprune.files.weights import StrPath, as_path, make_folder, safetensors_bytes, write_atomically

_FORMAT = 2
_SOLVED = ("model", "data", "recipe")  # what makes two runs the same
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # what ``write_atomically`` leaves when it is killed
_LONGEST = 100  # characters of a layer's name in the names of its files


@dataclass(frozen=True, eq=False)
class Record:
    """One entry: plain data, and arrays by name."""

    data: Json
    tensors: Mapping[str, Tensor]


class Journal:
    """The entries of one run in a folder, which is made if need be.

    No other process can open it until it is closed, which happens at the latest when nothing refers to it any more, or
    when its process ends, however that ends.

    Args:
        folder: Where.
        run: What is solved, as plain data: fingerprints "model" and "data", and the "recipe".

    Raises:
        OtherRun: The folder holds a run of another model, other data or another recipe, or another process writes to
            it; no file of the run was changed.
        DamagedFile: Its run.json cannot be read.
        InvalidInput: A file, or a symbolic link that leads nowhere, is where the folder should be.
        OSError: The folder cannot be written to.
    """

    def __init__(self, folder: StrPath, run: Mapping[str, object]) -> None:
        self.folder, self._run = Path(folder), _run_fingerprint(run)
        make_folder(self.folder)
        self._unlock: Callable[[], object] = weakref.finalize(self, _locked(self.folder).release)
        path, described = self.folder / "run.json", {"format": _FORMAT, **run}
        try:
            if path.exists():
                check_same(self.folder, _read_run(path), described)
            for leftover in (*self.folder.glob(".*.tmp"), *self.folder.glob("layers/.*.tmp")):
                if _LEFTOVER.fullmatch(leftover.name):
                    leftover.unlink(missing_ok=True)
            if not path.exists():
                write_atomically(_encoded(described), path)
        except BaseException:
            self.close()
            raise

    @classmethod
    def existing(cls, folder: StrPath) -> "tuple[Journal, Json]":
        """The journal of a run that was started, to read from even while another process writes; and what it solves.

        Raises:
            FileNotFoundError: The folder holds no run.
            DamagedFile: Its run.json cannot be read.
            OtherRun: It is of another format.
        """
        path = as_path(folder) / "run.json"
        if not path.exists():
            raise FileNotFoundError(f"{folder}: no run.json in it, so it is no run directory; give that of a prune")
        journal = cls.__new__(cls)
        described = _read_run(path)
        journal.folder, journal._run, journal._unlock = Path(folder), _run_fingerprint(described), lambda: None
        return journal, described

    def close(self) -> None:
        """Let other processes write here; calling it again does nothing."""
        self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, name: str, goal: Mapping[str, object]) -> Record | None:
        """The entry of a layer and a goal, or None.

        Raises:
            DamagedFile: The entry was changed or cut short; the message says what to delete.
        """
        path = self.path(name, goal)
        return self.read(path) if path.exists() else None

    def put(self, name: str, goal: Mapping[str, object], record: Record) -> None:
        """Keep an entry; it is on disk, whole, when this returns.

        Raises:
            OSError: It could not be written; earlier entries are whole.
        """
        path = self.path(name, goal)
        arrays = safetensors_bytes({key: value.detach().cpu().contiguous() for key, value in record.tensors.items()})
        data = {**record.data, "layer": name, "goal": goal, "run": self._run}
        path.unlink(missing_ok=True)  # else, killed between the two writes, it would vouch for arrays not its own
        write_atomically(arrays, path.with_suffix(".safetensors"))
        write_atomically(_encoded(data | {"sha256": _seal(arrays, data)}), path)

    def entries(self) -> Iterator[Record]:
        """All entries, in the order of their names.

        Raises:
            DamagedFile: One was changed or cut short.
        """
        for path in self.paths():
            yield self.read(path)

    def paths(self) -> list[Path]:
        """Where all entries are, in the order of their names."""
        return sorted((self.folder / "layers").glob("*.json"))

    def path(self, name: str, goal: Mapping[str, object]) -> Path:
        """Where the entry of a layer and a goal is, or would be."""
        key = hashlib.sha256(_encoded([name, dict(goal)], sort=True)).hexdigest()[:12]
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:_LONGEST] or "model"
        return self.folder / "layers" / f"{readable}-{key}.json"

    def read(self, path: Path) -> Record:
        """The entry in one of ``paths()``.

        Raises:
            DamagedFile: It was changed or cut short; the message says what to delete.
        """
        remedy = f"delete {path.name} to have that layer solved again"
        data, arrays = read_json(path, remedy), path.with_suffix(".safetensors")
        name, goal = data.get("layer"), data.get("goal")
        if not (isinstance(name, str) and isinstance(goal, dict) and self.path(name, goal).name == path.name):
            raise DamagedFile(
                f"{path} is the entry of layer {name!r} and goal {goal!r}, not that of its name; {remedy}"
            )
        if data.get("run") != self._run:
            raise DamagedFile(f"{path} belongs to another run than the run.json beside it; {remedy}")
        if not arrays.is_file():
            raise DamagedFile(f"{arrays} is missing, expected the arrays of {path.name}; {remedy}")
        content = arrays.read_bytes()
        if _seal(content, data) != data.get("sha256"):
            raise DamagedFile(f"{path} or {arrays.name} was changed or cut short since they were written; {remedy}")
        try:
            return Record(data, load_tensors(content))
        except Exception as error:  # damaged bytes make the parser raise nearly anything
            raise DamagedFile(f"{arrays} holds no tensors ({type(error).__name__}: {error}); {remedy}") from error


def recipe_fingerprint(recipe: Mapping[str, object]) -> str:
    """SHA-256 of plain data; the order of a mapping counts, as it does for name patterns."""
    return hashlib.sha256(_encoded(recipe)).hexdigest()


def read_json(path: Path, remedy: str = "restore it, or start in another folder") -> Json:
    """A JSON object.

    Raises:
        DamagedFile: It is cut short, or something else.
    """
    try:
        found = json.loads(path.read_bytes(), parse_constant=_no_number)
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise DamagedFile(f"{path} is no JSON ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise DamagedFile(f"{path} holds a {type(found).__name__}, expected an object; {remedy}")
    return found


def check_same(folder: StrPath, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Whether two descriptions, as in run.json, are of the same model, data and recipe.

    Raises:
        OtherRun: The one found in ``folder`` is another; the message says in what.
    """
    names = {"model": "another model", "data": "other calibration data", "recipe": "another recipe"}
    names["holdout"] = "other held-out data"
    other = [key for key in names if _encoded(found.get(key)) != _encoded(wanted.get(key))]
    if not other:
        return
    own, given = (cast(Mapping[str, object], each.get("recipe") or {}) for each in (found, wanted))
    keys = sorted(key for key in {**own, **given} if _encoded(own.get(key)) != _encoded(given.get(key)))
    names["recipe"] += f" ({', '.join(keys)})"
    if other == ["data"]:
        names["data"] += " (is it shuffled, or augmented at random?)"
    raise OtherRun(
        f"{folder} holds a run with {' and '.join(names[key] for key in other)}: give the same as then, or choose "
        "another folder; nothing in it was changed"
    )


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is none of its words")


_LOCKS: "weakref.WeakValueDictionary[Path, FileLock]" = weakref.WeakValueDictionary()


def _locked(folder: Path) -> FileLock:
    """The folder's lock, held once more: a process shares its own, so that a failed run never locks out the next."""
    path = folder.resolve() / ".lock"
    lock = _LOCKS.setdefault(path, FileLock(path, timeout=0, thread_local=False))
    try:
        lock.acquire()
    except Timeout:
        raise OtherRun(
            f"{folder}: another process is writing a run to this folder; wait until it ends, or choose another folder"
        ) from None
    return lock


def _read_run(path: Path) -> Json:
    found = read_json(path)
    if found.get("format") != _FORMAT:
        raise OtherRun(f"{path.parent}: a run of format {found.get('format')!r}, expected {_FORMAT}; choose another")
    missing = [key for key in _SOLVED if key not in found]
    if missing or not isinstance(found["recipe"], dict):
        what = f"lacks {', '.join(missing)}" if missing else f"holds no recipe, but {found['recipe']!r}"
        raise DamagedFile(f"{path} {what}; restore it, or start in another folder")
    return found


def _run_fingerprint(described: Mapping[str, object]) -> str:
    return recipe_fingerprint({key: described.get(key) for key in _SOLVED})


def _seal(arrays: bytes, data: Mapping[str, object]) -> str:
    digest = hashlib.sha256(arrays)
    digest.update(_encoded({key: value for key, value in data.items() if key != "sha256"}, sort=True))
    return digest.hexdigest()


def _encoded(data: object, sort: bool = False) -> bytes:
    """JSON, the same for equal data; numbers that JSON has no word for become texts that ``float`` reads."""
    return utf8(f"{json.dumps(_plain(data), sort_keys=sort, ensure_ascii=False, allow_nan=False, indent=1)}\n")


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)
