"""A pass that does not fit into memory ends the run with what to change. The allocations that fail are real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.fakes import FakePublisher, FakeRolloutServer, a_config, tiny_llama
from tests.trainer.ranks import run_ranks
from tests.trainer.step import memory_worker
from tests.trainer.step.memory_worker import TOO_MUCH, greedy
from trainer.batches.micro_batch import idle_micro_batch
from trainer.config.deepspeed_presets import preset
from trainer.errors import PassMemoryError
from trainer.grpo_trainer import GRPOTrainer
from trainer.step.out_of_memory import remedies, within_memory
from trainer.supervised.config import SFTConfig


def a_trainer(run_dir: Path, lm: Any, *, ref_lm: Any = None, **options: Any) -> GRPOTrainer:
    return GRPOTrainer(
        a_config(run_dir, **options),
        model=lm,
        ref_model=ref_lm,
        connect=FakeRolloutServer().client,
        publisher=FakePublisher(),
    )


def test_a_run_that_runs_out_of_memory_names_the_pass_and_what_makes_it_smaller(tmp_path: Path) -> None:
    lm = tiny_llama()
    trainer = a_trainer(tmp_path, lm)
    greedy(lm)

    with pytest.raises(PassMemoryError) as caught:
        trainer.train()

    text = str(caught.value)
    assert text.startswith("a pass of ")
    tokens = int(text.split()[3])
    assert 0 < tokens <= trainer.args.max_tokens_per_micro_batch
    assert "GiB held by the process at the peak" in text
    assert f"you tried to allocate {TOO_MUCH} bytes" in text
    assert f"hint: give max_tokens_per_micro_batch={tokens // 2}, gradient_checkpointing=true, use_peft=true" in text
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_pass_without_gradient_is_watched_too(tmp_path: Path) -> None:
    ref_lm = tiny_llama()
    trainer = a_trainer(tmp_path, tiny_llama(), ref_lm=ref_lm, beta=0.1)
    greedy(ref_lm)

    with pytest.raises(PassMemoryError):
        trainer.train()


def test_the_error_type_of_an_accelerator_is_known(tmp_path: Path) -> None:
    with (
        pytest.raises(
            PassMemoryError, match=r"a pass of 2 tokens .*CUDA out of memory\. Tried to allocate 2\.00 GiB\nhint"
        ),
        within_memory(idle_micro_batch(), a_config(tmp_path)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), within_memory(idle_micro_batch(), a_config(tmp_path)):
        raise RuntimeError("shapes cannot be multiplied")


def offered(config: Any, *, is_one_sequence: bool = False) -> list[str]:
    """Names of what is offered for a pass of 4096 tokens."""
    found = remedies(config, tokens=4096, is_one_sequence=is_one_sequence)
    return [text.removeprefix("a ").split()[0] for text in found]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["max_tokens_per_micro_batch=2048", "gradient_checkpointing=true", "use_peft=true"]),
        (
            {"gradient_checkpointing": True},
            ["max_tokens_per_micro_batch=2048", "use_peft=true", "logprob_chunk_size=2"],
        ),
        (
            {"gradient_checkpointing": True, "use_peft": True},
            ["max_tokens_per_micro_batch=2048", "logprob_chunk_size=2"],
        ),
    ],
)
def test_what_is_used_already_is_not_offered(tmp_path: Path, options: dict[str, Any], expected: list[str]) -> None:
    assert offered(a_config(tmp_path, **options)) == expected


def test_a_single_sequence_is_not_cut_by_smaller_passes(tmp_path: Path) -> None:
    assert offered(a_config(tmp_path), is_one_sequence=True)[0] == "max_token_len"
    assert offered(SFTConfig(run_dir=str(tmp_path)), is_one_sequence=True)[0] == "max_seq_length"


@pytest.mark.parametrize(("deepspeed", "is_offered"), [(None, True), (preset("zero2"), True), (preset("zero3"), False)])
def test_several_ranks_may_split_the_weights(
    tmp_path: Path, deepspeed: dict[str, Any] | None, is_offered: bool
) -> None:
    config = a_config(tmp_path)

    class OfTwoRanks:
        """The configuration as one of two ranks has it."""

        world_size = 2

        def __getattr__(self, name: str) -> Any:
            return deepspeed if name == "deepspeed" else getattr(config, name)

    assert ("deepspeed=zero3" in offered(OfTwoRanks())) is is_offered


@pytest.mark.parametrize("deepspeed", [[], ["deepspeed=zero2"]], ids=["ddp", "zero2"])
def test_the_other_ranks_end_with_the_one_that_ran_out_of_memory(tmp_path: Path, deepspeed: list[str]) -> None:
    done = run_ranks(memory_worker.main, str(tmp_path), *deepspeed, ranks=2)

    assert done.returncode != 0
    assert "rank 1 ends: rank 1: a pass of " in done.output
    assert "rank 0 is left alone: " in done.output
