"""One thread a process: ranks are forked from this process, and an OpenMP pool does not survive a fork."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import hypothesis
import torch

torch.set_num_threads(1)
# No test measures time: machines are shared.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")
