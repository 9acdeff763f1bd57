"""Several processes train what one process trains: gloo, DDP and DeepSpeed on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.trainer import rank_worker
from tests.trainer.fakes import tiny_llama
from tests.trainer.ranks import run_ranks


def train(run_dir: Path, *options: str, ranks: int = 1) -> None:
    """Two steps in processes of their own."""
    done = run_ranks(rank_worker.main, str(run_dir), *options, ranks=ranks)
    assert done.returncode == 0, done.output


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
        (1, ["deepspeed=zero2"]),
        (2, ["deepspeed=zero3", "model_name_or_path=FOLDER"]),
        (3, ["batch_size=8", "max_tokens_per_micro_batch=1000"]),  # more ranks than full micro batches
    ],
    ids=["ddp-2", "zero1-2", "zero2-1", "zero3-2", "ddp-3"],
)
def test_the_number_of_ranks_and_zero_change_no_weight(
    tmp_path: Path, one_rank: dict[str, Tensor], ranks: int, options: list[str]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    options = [option.replace("FOLDER", str(tmp_path / "model")) for option in options]

    train(tmp_path, *options, ranks=ranks)

    found, engine = weights_of(tmp_path), torch.load(tmp_path / "engine.pt")
    assert found.keys() == one_rank.keys() == engine.keys()
    for name, expected in one_rank.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(engine[name], found[name].to(engine[name].dtype), rtol=0, atol=0, msg=name)


def test_torchrun_starts_the_ranks(tmp_path: Path, one_rank: dict[str, Tensor]) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "--module", "tests.trainer.rank_worker", str(tmp_path), "deepspeed=zero2",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    for name, expected in one_rank.items():
        torch.testing.assert_close(weights_of(tmp_path)[name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3_offload"])
def test_a_deepspeed_run_resumes_where_it_was(tmp_path: Path, one_rank: dict[str, Tensor], deepspeed: str) -> None:
    options = [f"deepspeed={deepspeed}", "save_strategy=steps", "save_steps=1"]
    train(tmp_path, *options, "stop_before=1", ranks=2)
    assert not (tmp_path / "final").exists()

    train(tmp_path, *options, ranks=2)

    for name, expected in one_rank.items():
        torch.testing.assert_close(weights_of(tmp_path)[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_an_adapter_split_by_zero3_is_trained_saved_and_published_whole(tmp_path: Path) -> None:
    options = ["use_peft=true", "lora_r=2", "weight_sync={transport: gloo}"]
    train(tmp_path / "one", *options)
    train(tmp_path / "two", *options, "deepspeed=zero3", ranks=2)

    one, two = (load_file(tmp_path / run / "final" / "adapter_model.safetensors") for run in ("one", "two"))
    merged_one, merged_two = (torch.load(tmp_path / run / "engine.pt") for run in ("one", "two"))

    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    assert merged_one.keys() == merged_two.keys() == dict(tiny_llama().named_parameters()).keys()
    for name, expected in merged_one.items():
        torch.testing.assert_close(merged_two[name], expected.bfloat16(), rtol=1e-2, atol=1e-3, msg=name)
