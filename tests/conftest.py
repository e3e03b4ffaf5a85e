"""One thread and repeatable examples: the same tests see the same numbers everywhere."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before libraries size their pools: threads of several workers collide
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait for others would take their cores from them

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=15)
settings.load_profile("repeatable")
