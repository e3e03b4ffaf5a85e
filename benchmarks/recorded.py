"""Runs that were recorded once, run again: the same nonzeros in each layer, and the same errors but for rounding.

    python benchmarks/recorded.py [--data ../shared/data] [--only NAME ...] [--write]

The record (benchmarks/recorded.json) was made before the pruners came to share one contract. Differences are listed.
"""

import argparse
import contextlib
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from trained import load

from convexprune.costs import accuracy
from convexprune.options import Options
from convexprune.prune import prune_
from convexprune.report.report import Report
from convexprune.targets import Eps, Neurons, Sparsity

RECORD = Path(__file__).with_name("recorded.json")
TOLERANCE = 1e-4  # of errors, relative: sums of float32 in another order

Prune = Callable[[nn.Module, Tensor], Report]


class Stopped(Exception):
    """A run that is to go on."""


def resumed(model: nn.Module, x: Tensor) -> Report:
    options = Options(mode="cascade")

    def progress(stage: str, done: int, _total: int) -> None:
        if stage != "capture" and done >= 2:
            raise Stopped

    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Stopped):
            prune_(copy.deepcopy(model), x, sparsity=0.8, options=options, run=folder, progress=progress)
        assert any(Path(folder, "layers").glob("*.json"))
        return prune_(model, x, sparsity=0.8, options=options, run=folder)


def on_dask(model: nn.Module, x: Tensor) -> Report:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        return prune_(model, x, Eps(0.1), jobs=client)


def coreset(method: str, items: str, part: float = 0.5, seed: int = 0, **own: object) -> Prune:
    from convexprune.pruners.pruner import PRUNERS

    def prune(model: nn.Module, x: Tensor) -> Report:
        target = Neurons(part) if items == "neurons" else Sparsity(part, str(own.get("scope", "layer")))
        options = {name: value for name, value in own.items() if name != "scope"}
        how = Options(seed=seed, fit="ball", norms="leave") if method == "magnitude" else Options(seed=seed)
        return prune_(model, x, target, method=PRUNERS.make(method, options)[1], options=how)

    return prune


RUNS: dict[str, tuple[str, int, Prune]] = {
    "lenet-300-100 eps 0.1": ("lenet-300-100", 2000, lambda m, x: prune_(m, x, Eps(0.1))),
    "lenet-5 budgets cascade": (
        "lenet-5",
        200,
        lambda m, x: prune_(m, x, sparsity=0.9, options=Options(mode="cascade")),
    ),
    "lenet-5 resumed": ("lenet-5", 200, resumed),
    "lenet-300-100 dask": ("lenet-300-100", 2000, on_dask),
    "resnet-20 2:4": ("resnet-20", 100, lambda m, x: prune_(m, x, sparsity="2:4")),
    "resnet-20 neurons": (
        "resnet-20",
        100,
        lambda m, x: prune_(m, x, Neurons(0.3), options=Options(layers=["layer*.conv1"])),
    ),
    "lenet-300-100 lowner": ("lenet-300-100", 1000, coreset("lowner", "neurons")),
    "lenet-300-100 mussay": ("lenet-300-100", 1000, coreset("mussay", "neurons")),
    "lenet-300-100 pfp": ("lenet-300-100", 1000, coreset("pfp", "neurons")),
    "lenet-300-100 uniform": ("lenet-300-100", 1000, coreset("uniform", "neurons")),
    "lenet-300-100 corenet": ("lenet-300-100", 1000, coreset("corenet", "weights")),
    "lenet-300-100 sipp": ("lenet-300-100", 1000, coreset("sipp", "weights")),
    "lenet-300-100 magnitude": ("lenet-300-100", 1000, coreset("magnitude", "weights")),
    "lenet-300-100 magnitude neurons": ("lenet-300-100", 1000, coreset("magnitude", "neurons")),
    "lenet-300-100 lowner top": ("lenet-300-100", 1000, coreset("lowner", "neurons", sampling="top")),
    "lenet-300-100 sipp deterministic": ("lenet-300-100", 1000, coreset("sipp", "weights", variant="deterministic")),
    "lenet-5 corenet network": ("lenet-5", 200, coreset("corenet", "weights", scope="network")),
    "lenet-5 lowner guarantee": ("lenet-5", 200, coreset("lowner", "neurons", seed=1)),
}


def differences(now: dict[str, object], before: dict[str, object]) -> list[str]:
    found = []
    for name, row in before["layers"].items():  # type: ignore[attr-defined]
        own = now["layers"].get(name)  # type: ignore[attr-defined]
        if own is None:
            found.append(f"{name}: no row")
            continue
        if own["nonzeros"] != row["nonzeros"]:
            found.append(f"{name}: {own['nonzeros']:,} nonzeros, recorded {row['nonzeros']:,}")
        if not math.isnan(row["error"]) and not math.isclose(
            own["error"], row["error"], rel_tol=TOLERANCE, abs_tol=1e-6
        ):
            found.append(f"{name}: error {own['error']:.6g}, recorded {row['error']:.6g}")
    if not math.isclose(now["error"], before["error"], rel_tol=TOLERANCE, abs_tol=1e-6):  # type: ignore[arg-type]
        found.append(f"network: error {now['error']:.6g}, recorded {before['error']:.6g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    parser.add_argument("--write", action="store_true", help="Replace the record.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in args.only:
        network, samples, prune = RUNS[name]
        model, train, test = load(network, args.data)
        images = train[0]
        if network == "resnet-20":  # its classes come one after the other
            images = images[torch.arange(len(images)).view(10, -1).T.flatten()]
        began = time.perf_counter()
        report = prune(model, images[:samples])
        seconds = time.perf_counter() - began
        rows = {row.name: {"nonzeros": row.nonzeros, "error": row.output_error} for row in report.layers}
        now = {"layers": rows, "error": report.output_error, "accuracy": accuracy(model, *test), "seconds": seconds}
        if args.write:
            record[name] = now
            RECORD.write_text(json.dumps(record, indent=1) + "\n")
        found = differences(now, record[name])
        said = "the same" if not found else "; ".join(found)
        print(f"{name}: {said} ({seconds / record[name]['seconds']:.2f} of the time)")


if __name__ == "__main__":
    main()
