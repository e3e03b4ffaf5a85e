"""What ``convexprune prune`` reads, does and writes: everything is read and checked before anything is solved."""

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from convexprune.cli.source import Labelled, Source
from convexprune.coresets import coreset_prune_
from convexprune.coresets.base import Method
from convexprune.costs import accuracy
from convexprune.errors import DamagedFile
from convexprune.files.weights import check_folder, save_json
from convexprune.nettrim import prune_
from convexprune.nettrim.verify import verify
from convexprune.network.weights import load_weights_into_, save_weights
from convexprune.report.report import Report
from convexprune.runs.consistency import seal
from convexprune.runs.journal import Journal, check_same, read_json
from convexprune.runs.preview import Preview, preview, recipe_of
from convexprune.solvers.errors import ConvexPruneError, InvalidInput

_log = logging.getLogger(__name__)

_AGAIN = "the results in {} are not as they were written: written again from its layers"
_NO_DATA = "Net-Trim fits each layer to what it computes on data: give --calibration"


class Job:
    """A model, its data, and the folder that the results go to.

    Args:
        source: The model and its inputs.
        out: The folder; None: nothing will be written.
        resumes: Whether a run that is there already goes on.
        labels_key: The calibration labels' key.
        labelled: Samples for the accuracy.

    Raises:
        InvalidInput: Results are there already that are not those of a run that goes on, or a file lies where the
            folder should be; and as ``find_model`` and the readers of files.
    """

    def __init__(
        self,
        source: Source,
        out: Path | None,
        *,
        resumes: bool = False,
        labels_key: str | None = None,
        labelled: Labelled | None = None,
    ) -> None:
        self.out = None if out is None else _checked(out, resumes)
        if labels_key is not None and source.calibration is None:
            raise InvalidInput("--labels-key names an array of the calibration file: give --calibration, too")
        self.read = source.read(labels_key)
        self.model, self.dense = self.read.model, copy.deepcopy(self.read.model)
        for notice in self.read.notices:
            _log.info("%s", notice)
        self.labelled = None if labelled is None else labelled.read(self.read)
        self.accuracy: dict[str, float] = {}
        self.told: dict[str, Any] = {}
        self.notes: list[str] = []

    def plan(self, **arguments: Any) -> Preview:
        """What ``net_trim`` would do."""
        return preview(self.model, self._data(), **arguments)

    def finished(self, **arguments: Any) -> dict[str, Any] | None:
        """The report of this very run if the folder holds all its results, else None; ``notes`` says why.

        They are verified: the entries on the data, the report by the entries. Accuracies are measured again where
        labelled samples were given.

        Raises:
            OtherRun: It holds those of another run.
        """
        if self.out is None or not all((self.out / name).exists() for name in ("run.json", *_RESULTS)):
            return None
        recipe = recipe_of(self.model, self._data(), **arguments)
        described = Journal.existing(self.out)[1]
        mode = recipe.mode or described["recipe"].get("mode")  # left open, it is whichever the run has
        check_same(self.out, described, {**described, "recipe": replace(recipe, mode=mode).to_dict()})
        report = self._sound(self.out)
        if report is None or report["provenance"]["stopped"] is not None:
            return None
        if report["provenance"].get("removed") != arguments.get("remove", True):
            return None
        found = verify(self.model, self._data(), self.out, holdout=self.read.holdout)
        if not (found.complete and all(row.ok for row in found.layers)):
            return None  # whoever goes on with the run tells what is wrong
        if found.results:
            self.notes.append(_AGAIN.format(self.out))
            return None
        return report | self._measured_again(self.out)

    def _sound(self, out: Path) -> dict[str, Any] | None:
        """The report, if the results are those that were written; else None, and a note."""
        from convexprune.report.extras import read_extras

        try:
            report = read_json(out / "report.json")
            read_extras(out)
        except DamagedFile:
            report = {}
        if report.get("sha256") == seal(report, out / "model.safetensors"):
            return report
        self.notes.append(_AGAIN.format(out))
        return None

    def _measured_again(self, out: Path) -> dict[str, Any]:
        """The accuracies with the written model, where labelled samples were given."""
        if self.labelled is None:
            return {}
        load_weights_into_(self.model, out / "model.safetensors", resize=True)
        self._measure(self.dense, "before")
        self._measure(self.model, "after")
        return {"accuracy": self.accuracy}

    def net_trim(self, **arguments: Any) -> Report:
        """``prune_`` with the folder as run directory, and the accuracy before and after."""
        self._measure(self.dense, "before")  # a forward may leave its marks on the model, which is to be fingerprinted
        report = prune_(self.model, self._data(), holdout=self.read.holdout, run=self.out, **arguments)
        self._measure(self.model, "after")
        return self._noticed(report)

    def coreset(self, method: str | Method, size: Any, **recipe: Any) -> Report:
        """``coreset_prune_``, with the accuracy before and after."""
        self._measure(self.dense, "before")
        report = coreset_prune_(self.model, self.read.inputs, method, size, labels=self.read.labels, **recipe)
        self._measure(self.model, "after")
        return self._noticed(report)

    def _noticed(self, report: Report) -> Report:
        """With what was chosen of the files."""
        return replace(report, notices=(*self.read.notices, *report.notices))

    def write(self, report: Report, **provenance: Any) -> dict[str, Path]:
        """Write the results; their paths by what they are.

        ``told`` is then the report as written, sealed with a SHA-256 of itself and the model; ``notes`` says what could
        not be measured.
        """
        assert self.out is not None  # noqa: S101 - without a folder nothing was pruned
        files = {"model": save_weights(self.model, self.out / "model.safetensors")}
        data = report.to_dict()
        data |= {"accuracy": self.accuracy, "provenance": {**data["provenance"], **provenance}}
        self.told = data | {"sha256": seal(data, files["model"])}
        files["report"] = save_json(self.told, self.out / "report.json")
        if data["provenance"].get("stopped") is None:
            files |= self._extras(self.out, report)
        return files

    def _extras(self, out: Path, report: Report) -> dict[str, Path]:
        from convexprune.report.extras import save_extras

        try:
            return {"extras": save_extras(out, self.dense, self.model, self.read.batch, report)}
        except (ConvexPruneError, RuntimeError) as error:  # the results are written, and count for more
            self.notes.append(f"what sparsity buys could not be measured: {error}")
            return {}

    def _data(self) -> Any:
        if self.read.inputs is None:
            raise InvalidInput(_NO_DATA)
        return self.read.inputs

    def _measure(self, model: nn.Module, when: str) -> None:
        if self.labelled is not None:
            inputs, labels = self.labelled
            self.accuracy[when] = accuracy(model, inputs, labels)


_RESULTS = ("model.safetensors", "report.json")


def _checked(out: Path, resumes: bool) -> Path:
    check_folder(out)
    own = resumes and (out / "run.json").exists()
    existing = [str(out / name) for name in ("run.json", *_RESULTS) if (out / name).exists()]
    if existing and not own:
        raise InvalidInput(f"{', '.join(existing)}: there already, and not overwritten; choose another --out")
    return out
