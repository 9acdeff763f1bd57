"""Several processes train what one process trains: gloo, DDP and DeepSpeed on CPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.trainer.ranks import run_ranks
from tests.trainer.supervised import rank_worker
from tests.trainer.supervised.fakes import tiny_model
from tests.trainer.supervised.rank_worker import run


def train(method: str, run_dir: Path, *options: str, ranks: int) -> None:
    """Two steps in processes of their own."""
    done = run_ranks(rank_worker.main, method, str(run_dir), *options, ranks=ranks)
    assert done.returncode == 0, done.output


def weights_of(run_dir: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(run_dir / "final").named_parameters())


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def figures_of(run_dir: Path) -> list[float]:
    """What Adam hides: a gradient that is wrong by a factor gives nearly the same weights."""
    names = ("loss", "eval_loss", "grad_norm")
    return [line[name] for line in lines_of(run_dir) for name in names if name in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone")
    run("sft", run_dir, ["eval_steps=1"])
    return run_dir


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(3, []), (2, ["deepspeed=zero2"]), (2, ["deepspeed=zero3", "model_name_or_path=FOLDER"])],
    ids=["ddp-3", "zero2-2", "zero3-2"],
)
def test_the_number_of_ranks_and_zero_change_no_weight(
    tmp_path: Path, alone: Path, ranks: int, options: list[str]
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    options = [option.replace("FOLDER", str(tmp_path / "model")) for option in options]

    train("sft", tmp_path, "eval_steps=1", *options, ranks=ranks)

    expected, found = weights_of(alone), weights_of(tmp_path)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert figures_of(tmp_path) == pytest.approx(figures_of(alone), rel=1e-4)


def test_a_student_learns_the_same_from_its_teacher_on_two_ranks(tmp_path: Path) -> None:
    options = ["lmbda=0.0", "beta=0.1"]
    run("gkd", tmp_path / "alone", options)
    train("gkd", tmp_path / "zero2", *options, "deepspeed=zero2", ranks=2)

    assert figures_of(tmp_path / "zero2") == pytest.approx(figures_of(tmp_path / "alone"), rel=1e-4)
    expected, found = weights_of(tmp_path / "alone"), weights_of(tmp_path / "zero2")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_ranks_share_out_what_is_sampled_and_all_learn_from_all_of_it(tmp_path: Path) -> None:
    train("gkd", tmp_path, "lmbda=1.0", "eval_strategy=steps", "eval_steps=1", "load_best_model_at_end=false", ranks=2)

    steps = [line for line in lines_of(tmp_path) if "sampled_frac" in line]
    assert [step["sampled_frac"] for step in steps] == [1.0, 1.0]
    # Eight prompts, up to six tokens each.
    assert all(8 <= step["tokens/trained"] <= 48 for step in steps)
    assert all("eval_avg_tokens" in line for line in lines_of(tmp_path) if "eval_loss" in line)
