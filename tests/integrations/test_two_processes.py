# SPDX-License-Identifier: Apache-2.0
"""Other people's trainers under torchrun make the steps of the plain loop with the same rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for name in ("accelerate", "transformers", "lightning.pytorch"):
    pytest.importorskip(name)

DRIVER = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Losses and weights of a trainer by its name."""
    folder = tmp_path_factory.mktemp("trainers")
    environment = {**os.environ, "PYTHONPATH": str(DRIVER.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(DRIVER), str(folder)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return lambda name: torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("trainer", ["huggingface", "accelerate", "lightning"])
def test_step_by_step(trained, problem, plain, same, trainer):
    """Ignored rows are unevenly spread, but for Lightning, which takes the mean of means."""
    if trainer != "lightning":
        problem.labels.view(-1, 32)[:, 3:16] = -100
    network = problem.network().eval()
    network.train = lambda mode=True: network
    got = trained(trainer)
    same((got["losses"], got["weights"]), plain(problem, network=network))
