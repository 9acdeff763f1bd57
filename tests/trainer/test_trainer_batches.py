"""Bad batches, and none at all: what a trainer does, in this process, against a FAKE rollout server."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atroposlib.errors import NoBatchError
from atroposlib.wire.columns import Group
from tests.trainer.fakes import FakeRolloutServer, a_config, a_group, random_groups, tiny_llama
from tests.trainer.in_memory import RememberingPublisher, a_trainer, lines_of
from trainer.errors import ForeignTokensError, UnusableBatchError
from trainer.policy.loading import build_policy
from trainer.run.shares import batch_limits
from trainer.weight_sync.config import WeightSyncConfig


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


def level(group: Group) -> Group:
    return replace(group, scores=np.ones(group.n_sequences))


def cut_off(group: Group) -> Group:
    return replace(group, finish_reasons=("length",) * group.n_sequences)


@pytest.mark.parametrize("spoil", [level, cut_off], ids=["equal-rewards", "all-truncated"])
@pytest.mark.parametrize("options", [{}, {"num_minibatches": 2, "ppo_epochs": 2}], ids=["one", "several"])
def test_a_batch_without_any_gradient_is_acknowledged_and_leaves_the_weights_alone(
    tmp_path: Path, spoil: Any, options: dict[str, Any]
) -> None:
    # Step 1: with momentum and weight decay, an optimizer step would move the weights.
    server = FakeRolloutServer(
        batches=lambda step: [spoil(g) if step == 1 else g for g in random_groups(step, sequences=8)]
    )
    publisher = RememberingPublisher()

    a_trainer(tmp_path, server, publisher=publisher, weight_decay=0.1, **options).train()

    v = publisher.versions
    assert [moved(v[i], v[i + 1]) for i in range(3)] == [True, False, True]
    assert server.said("ack") == [("ack", 0, 1), ("ack", 1, 2), ("ack", 2, 3)]
    metrics = lines_of(tmp_path / "metrics.jsonl")
    assert [line.get("step/without_gradient") for line in metrics] == [None, 1.0, None]
    assert (metrics[1]["grad_norm"], metrics[1]["step/skipped"]) == (0.0, 0.0)


def test_what_is_left_out_is_counted_told_once_and_used_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def batch(step: int) -> list[Group]:
        first, second = random_groups(step, sequences=8)
        numbers = np.ones(second.n_tokens, dtype=np.float32)
        numbers[int(second.cu_seqlens[1]) - 1] = np.nan
        return [replace(first, loss_mask=first.loss_mask[1:]), replace(second, advantages=numbers)]

    with caplog.at_level(logging.WARNING, logger="trainer"):
        a_trainer(tmp_path, FakeRolloutServer(batches=batch)).train()

    for line in lines_of(tmp_path / "metrics.jsonl"):
        assert (line["batch/left_out_groups"], line["batch/left_out_sequences"]) == (1.0, 1.0)
        assert (line["n_sequences"], line["step/skipped"]) == (4.0, 0.0)
    assert caplog.text.count("left out: column 'loss_mask'") == 1
    assert "step 0: group 'step0-group1' of environment 0, sequence 0: gets no loss: column 'advantages'" in caplog.text
    ledger = lines_of(tmp_path / "ledger" / "trainer.jsonl")
    assert [len(line["groups"]) for line in ledger] == [2, 2, 2]


def test_a_batch_of_nothing_but_broken_groups_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    server = FakeRolloutServer(
        batches=lambda step: [replace(g, scores=g.scores[1:]) for g in random_groups(step, sequences=8)]
    )

    reason = r"step 0: not one group .* 'step0-group0'.*3 scores for 4 sequences.*give a new run_name"
    with pytest.raises(UnusableBatchError, match=reason):
        a_trainer(tmp_path, server).train()


def test_token_ids_of_another_model_end_the_run_before_the_step(tmp_path: Path) -> None:
    server = FakeRolloutServer(batches=lambda step: [a_group("g", completions=[(7, 40), (3,)])])

    with pytest.raises(ForeignTokensError, match="token id 40, but the model knows 0 to 31"):
        a_trainer(tmp_path, server).train()
    assert server.said("ack") == []


def test_a_sequence_longer_than_the_models_positions_gets_no_loss(tmp_path: Path) -> None:
    long = a_group("long", completions=[[5] * 127, [6] * 5])

    a_trainer(tmp_path, FakeRolloutServer(batches=lambda step: [long]), max_steps=1).train()

    (line,) = lines_of(tmp_path / "metrics.jsonl")
    assert (line["batch/left_out_sequences"], line["tokens/step"]) == (1.0, 5.0)


def test_old_clients_without_logprobs_are_trained_uncorrected_and_counted(tmp_path: Path) -> None:
    server = FakeRolloutServer(
        batches=lambda step: [replace(g, inference_logprobs=None) for g in random_groups(step, sequences=8)]
    )

    a_trainer(tmp_path, server, max_steps=1).train()

    (line,) = lines_of(tmp_path / "metrics.jsonl")
    assert (line["batch/uncorrected_sequences"], line["ess"]) == (8.0, 0.0)


@pytest.mark.parametrize(("top_p", "warnings"), [(0.9, 1), (1.0, 0)])
def test_sampling_from_another_distribution_is_told_once_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, top_p: float, warnings: int
) -> None:
    server = FakeRolloutServer(
        batches=lambda step: [replace(g, generation_params={"top_p": top_p}) for g in random_groups(step, sequences=8)]
    )

    with caplog.at_level(logging.WARNING, logger="trainer"):
        a_trainer(tmp_path, server).train()

    assert caplog.text.count("sampled with top_p=") == warnings
    for line in lines_of(tmp_path / "metrics.jsonl"):
        assert line.get("batch/reshaped_sampling_groups", 0) == 2 * warnings


@pytest.mark.parametrize(
    ("options", "is_known"),
    [
        ({}, False),
        ({"inference_servers": ["http://127.0.0.1:1"]}, True),
        ({"inference_servers": ["http://127.0.0.1:1"], "correction": "none"}, False),
        ({"inference_servers": ["http://127.0.0.1:1"], "weight_sync": WeightSyncConfig(probe=False)}, False),
    ],
    ids=["no-engines", "probed", "no-correction", "no-probe"],
)
def test_logprobs_are_known_to_be_of_what_was_sampled_where_the_start_proves_it(
    tmp_path: Path, options: dict[str, Any], is_known: bool
) -> None:
    limits = batch_limits(a_config(tmp_path, **options), build_policy(tiny_llama(), logprob_chunk_size=4))

    assert limits.has_sampled_logprobs == is_known


def test_the_next_batch_is_leased_while_the_step_trains(tmp_path: Path) -> None:
    leased = threading.Event()
    seen: list[bool] = []
    server = FakeRolloutServer(on_lease=lambda step: leased.set() if step == 1 else None)
    trainer = a_trainer(tmp_path, server, max_steps=2, max_tokens_per_micro_batch=1000)
    # The first pass of the first step does not go on before the second batch was asked for.
    trainer.model.register_forward_pre_hook(lambda *_: seen.append(leased.wait(5.0)))

    trainer.train()

    assert seen[0]


def test_a_run_without_a_batch_ends_with_what_the_server_waits_for(tmp_path: Path) -> None:
    server = FakeRolloutServer(waits_until=lambda step: step < 1)

    with pytest.raises(NoBatchError) as caught:
        a_trainer(tmp_path, server, batch_deadline_s=0.3).train()

    assert caught.value.waiting_for == "no environment is registered"


@pytest.mark.parametrize("epochs", [1, 3])
def test_bypass_measures_every_optimizer_step_from_the_engine(tmp_path: Path, epochs: int) -> None:
    group = a_group("g", logprob=-2.0)
    starts: list[Tensor] = []
    trainer = a_trainer(
        tmp_path,
        FakeRolloutServer(batches=lambda step: [group]),
        max_steps=1,
        correction="bypass",
        ppo_epochs=epochs,
        learning_rate=0.1,
    )
    trainer.model.register_forward_hook(lambda _, __, scores: starts.append(scores.logprobs_M.detach().clone()))

    trainer.train()

    (line,) = lines_of(tmp_path / "metrics.jsonl")
    expected = torch.cat([(logprobs + 2.0).exp() for logprobs in starts]).mean()
    assert len(starts) == epochs
    assert line["ratio/mean"] == pytest.approx(float(expected), rel=1e-4)
