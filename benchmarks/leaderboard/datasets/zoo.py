"""The problem zoo."""

from benchopt import BaseDataset

from convexprune.solvers import LayerProgram
from convexprune.solvers.testing import zoo


class Dataset(BaseDataset):
    """A member of the zoo by name; by default the short representative list, ``member=all`` for every feasible one."""

    name = "zoo"
    parameters = {"member": [member.name for member in zoo.representative()]}  # noqa: RUF012 - benchopt's way
    parameter_template = "{member}"

    @classmethod
    def get_all_parameter_values(cls, name: str) -> list[str] | None:
        return [member.name for member in zoo.members()] if name == "member" else None

    def get_data(self) -> dict[str, LayerProgram]:
        return {"program": zoo.member(self.member).build()}
