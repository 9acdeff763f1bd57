"""Several processes train what one process trains: torchrun, gloo, DDP and DeepSpeed on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

WORKER = Path(__file__).with_name("rank_worker.py")


def train(run_dir: Path, *options: str, ranks: int = 1, expect: int = 0) -> str:
    """Two steps in processes of their own; returns what they printed."""
    launcher = [
        "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
    ]  # fmt: skip
    command = [sys.executable, *(launcher if ranks > 1 else []), str(WORKER), str(run_dir), *options]
    # One thread each: spinning OpenMP threads of several processes on few cores stop each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def weights_of(run_dir: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(run_dir / "final").named_parameters())


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    run_dir = tmp_path_factory.mktemp("one")
    train(run_dir)
    return weights_of(run_dir)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, []),
        (2, ["deepspeed=zero1"]),
        (2, ["deepspeed=zero2"]),
        (1, ["deepspeed=zero2"]),
        (3, ["batch_size=8", "max_tokens_per_micro_batch=1000"]),  # more ranks than full micro batches
    ],
    ids=["ddp-2", "zero1-2", "zero2-2", "zero2-1", "ddp-3"],
)
def test_the_number_of_ranks_and_zero_change_no_weight(
    tmp_path: Path, one_rank: dict[str, Tensor], ranks: int, options: list[str]
) -> None:
    train(tmp_path, *options, ranks=ranks)

    found = weights_of(tmp_path)
    assert found.keys() == one_rank.keys()
    for name, expected in one_rank.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_zero2_resumes_where_it_was(tmp_path: Path, one_rank: dict[str, Tensor]) -> None:
    options = ["deepspeed=zero2", "save_strategy=steps", "save_steps=1"]
    train(tmp_path, *options, "stop_before=1", ranks=2)
    assert not (tmp_path / "final").exists()

    train(tmp_path, *options, ranks=2)

    for name, expected in one_rank.items():
        torch.testing.assert_close(weights_of(tmp_path)[name], expected, rtol=1e-4, atol=1e-5, msg=name)
