"""The same run gives the same files, byte for byte, in whichever process it is done."""

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import torch
from safetensors import safe_open

from convexprune.files.weights import safetensors_bytes

RUN = """
import itertools, sys, time
ticks = itertools.count()
time.perf_counter = lambda: next(ticks) / 1000  # seconds are measured, and would differ

import hashlib
from pathlib import Path
import torch
from torch import nn
from convexprune import Options, prune_, save_weights
from convexprune.files.weights import save_json
from convexprune.masks import keep_masks_
from convexprune.page.extras import save_extras
from convexprune.page.page import write_page

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.shift = nn.Parameter(torch.zeros(8, 8))
    def forward(self, x):
        return self.last((self.second((self.first(x)).relu()) @ self.shift.T).relu())

torch.set_num_threads(1)
torch.manual_seed(0)
model, x, out = Net().eval(), torch.rand(60, 6), Path(sys.argv[1])
state = {key: value.clone() for key, value in model.state_dict().items()}
chosen = {"first", "second", "last"}  # in an order that the hash seed decides
report = prune_(model, x, sparsity=0.5, options=Options(layers=chosen), run=out)
save_json(report.to_dict(), out / "report.json")
save_extras(out, state, model, report=report)
write_page(out)
keep_masks_(model)
save_weights(model, out / "model.safetensors")
for path in sorted(out.rglob("*.*")):
    print(path.relative_to(out), hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_metadata_lie_in_one_order() -> None:
    """What writes them takes the order of a hash that is seeded anew each time."""
    told = {name: name.upper() for name in "gbacfed"}
    tensors = {"w": torch.arange(3.0), "ü": torch.ones(2, dtype=torch.float16)}
    assert len({safetensors_bytes(tensors, told) for _ in range(8)}) == 1


def test_canonical_headers_are_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"ü": torch.arange(5.0), "b": torch.ones(3, dtype=torch.int8)}, {"é": "ö\n"}))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"é": "ö\n"}
        assert torch.equal(file.get_tensor("ü"), torch.arange(5.0))
        assert torch.equal(file.get_tensor("b"), torch.ones(3, dtype=torch.int8))


def test_a_run_writes_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", RUN]
    running = [
        subprocess.Popen(  # noqa: S603
            [*command, str(tmp_path / seed / "out")], stdout=PIPE, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "3")
    ]
    one, other = (process.communicate()[0].decode().splitlines() for process in running)
    assert len(one) >= 10
    assert one == other
