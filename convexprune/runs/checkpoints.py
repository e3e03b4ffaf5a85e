"""States of a whole network in a journal, for methods that train: the last two, so that one of them is always whole."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from convexprune.errors import DamagedFile
from convexprune.files.texts import Json
from convexprune.runs.journal import Journal, Record

_SLOTS = 2


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """What a training was at, to go on from.

    Attributes:
        journal: Where they are kept; None: nowhere.
        name: What is trained, in the names of files.
    """

    journal: Journal | None
    name: str

    def goals(self) -> list[dict[str, object]]:
        """Those of the entries, by which a journal finds them."""
        return [{"kind": "checkpoint", "slot": slot} for slot in range(_SLOTS)]

    def newest(self) -> Record | None:
        """The last state that was kept; None if there is none.

        Raises:
            DamagedFile: It was changed or cut short; the message says what to delete.
        """
        if self.journal is None:
            return None
        found = [record for goal in self.goals() if (record := self.journal.get(self.name, goal)) is not None]
        try:
            return max(found, key=lambda record: int(record.data["number"]), default=None)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFile(
                f"{self.journal.folder}: a checkpoint of {self.name!r} has no number ({error!r}); delete its files in "
                "layers/, or start in another folder"
            ) from error

    def restored(self, put: Callable[[Record], None]) -> bool:
        """Whether there is a last state that was kept; ``put`` then has been called with it.

        Raises:
            DamagedFile: As ``newest``, and what ``put`` raises of a state that is none.
        """
        record = self.newest()
        if record is not None:
            put(record)
        return record is not None

    def keep(self, number: int, data: Json, tensors: Mapping[str, Tensor]) -> None:
        """Keep a state, in the place of the last but one; it is on disk, whole, when this returns."""
        if self.journal is None:
            return
        newest = self.newest()
        slot = 0 if newest is None else 1 - int(newest.data["goal"]["slot"])
        own: Json = {"wanted": "", "allowed": None, "measured": False, "groups": [], "number": number}
        self.journal.put(self.name, self.goals()[slot], Record({**own, **data}, tensors))
