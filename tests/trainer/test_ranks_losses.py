"""Several processes train what one process trains, with every part of the loss: reference, entropy, several optimizer steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer.fakes import tiny_llama
from tests.trainer.test_ranks import train, weights_of

OPTIONS = [
    *("beta=0.1", "sync_ref_model=true", "ref_model_sync_steps=1", "entropy_coef=0.01"),
    *("num_minibatches=2", "ppo_epochs=2"),
]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    run_dir = tmp_path_factory.mktemp("one")
    train(run_dir, *OPTIONS)
    return weights_of(run_dir)


@pytest.mark.parametrize(
    "options",
    [[], ["deepspeed=zero2"], ["deepspeed=zero3", "model_name_or_path=FOLDER", "save_strategy=steps", "save_steps=1"]],
    ids=["ddp", "zero2", "zero3"],
)
def test_reference_and_several_optimizer_steps_do_not_depend_on_the_ranks(
    tmp_path: Path, one_rank: dict[str, Tensor], options: list[str]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")

    train(tmp_path, *OPTIONS, *[option.replace("FOLDER", str(tmp_path / "model")) for option in options], ranks=2)

    found = weights_of(tmp_path)
    for name, expected in one_rank.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, msg=name)
