"""The trainer end to end, in this process, against a FAKE rollout server and a FAKE engine."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from atroposlib.errors import ConfigError, FencedError
from atroposlib.wire.columns import Group
from tests.trainer.fakes import (
    REWARDED_TOKEN,
    FakePublisher,
    FakeRolloutServer,
    a_config,
    a_group,
    random_groups,
    tiny_llama,
)
from trainer.batches.micro_batch import build_micro_batch, share_of_rank
from trainer.batches.prompt_sharing import cluster
from trainer.batches.step_batch import build_step_batch
from trainer.checkpoints import folders as checkpoints
from trainer.errors import NonFiniteError, StalenessError, TrainerError
from trainer.grpo_trainer import GRPOTrainer
from trainer.policy.logprobs import PackedPolicy
from trainer.weight_sync.config import WeightSyncConfig


def a_trainer(
    run_dir: Path, server: FakeRolloutServer, *, publisher: FakePublisher | None = None, lm: Any = None, **options: Any
) -> GRPOTrainer:
    return GRPOTrainer(
        a_config(run_dir, **options),
        model=lm or tiny_llama(),
        connect=server.client,
        publisher=publisher or FakePublisher(),
    )


def weights_in(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def rewarded_probability(lm: Any) -> float:
    logits = lm(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1]
    return float(logits.softmax(-1)[REWARDED_TOKEN])


def test_the_rewarded_token_becomes_likelier(tmp_path: Path) -> None:
    before = rewarded_probability(tiny_llama())

    a_trainer(tmp_path, FakeRolloutServer(sequences=32), max_steps=5, batch_size=32).train()

    assert rewarded_probability(AutoModelForCausalLM.from_pretrained(tmp_path / "final")) > 1.2 * before


def test_each_step_is_published_then_acknowledged_and_each_checkpoint_committed(tmp_path: Path) -> None:
    server, publisher = FakeRolloutServer(), FakePublisher()

    a_trainer(tmp_path, server, publisher=publisher, save_strategy="steps", save_steps=2).train()

    assert publisher.published == [0, 1, 2, 3]
    assert publisher.is_closed
    assert server.said("open", "policy", "ack", "commit") == [
        ("open", tmp_path.name),
        ("policy", 0),
        ("ack", 0, 1),
        ("ack", 1, 2),
        ("commit", 2),
        ("ack", 2, 3),
        ("commit", 3),
        ("commit", 3),
    ]


def test_the_engine_holds_the_weights_of_the_final_checkpoint(tmp_path: Path) -> None:
    publisher = FakePublisher()

    a_trainer(tmp_path, FakeRolloutServer(), publisher=publisher).train()

    final = weights_in(tmp_path / "final")
    assert publisher.weights.keys() == final.keys()
    assert all(torch.equal(tensor, final[name]) for name, tensor in publisher.weights.items())


def test_metrics_and_ledger_have_a_line_for_each_step(tmp_path: Path) -> None:
    a_trainer(tmp_path, FakeRolloutServer()).train()

    metrics, ledger = lines_of(tmp_path / "metrics.jsonl"), lines_of(tmp_path / "ledger" / "trainer.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert [line["policy_version"] for line in metrics] == [1, 2, 3]
    assert metrics[0].keys() >= {
        "time", "reward/mean", "reward/std", "frac_reward_zero_std", "loss/pg", "grad_norm", "learning_rate",
        "staleness/mean", "staleness/max", "mismatch/kl_k3", "mismatch/ratio_max", "is/truncated_frac", "ess", "entropy",
        "completion/mean", "completion/p95", "completion/truncated_frac", "tokens/step", "tokens/forward",
        "time/wait_s", "time/train_s", "time/sync_s", "time/step_s", "n_sequences",
    }  # fmt: skip
    assert ledger[1] == {
        "step": 1,
        "groups": [group.group_id for group in random_groups(1, sequences=8)],
        "sequences": 8,
        "max_staleness": 0,
    }


def test_the_ledger_is_written_before_the_acknowledgement(tmp_path: Path) -> None:
    server = FakeRolloutServer()
    acked_before_ledger: list[int] = []
    ledger = tmp_path / "ledger" / "trainer.jsonl"

    class Publisher(FakePublisher):
        def publish(self, version: int, weights: Any) -> Any:
            if version and len(lines_of(ledger)) < version:
                acked_before_ledger.append(version)
            return super().publish(version, weights)

    a_trainer(tmp_path, server, publisher=Publisher()).train()

    assert acked_before_ledger == []


def test_metrics_say_what_the_batch_was(tmp_path: Path) -> None:
    group = a_group(
        "g", rewards=[1.0, 0.0], completions=[(7, 3), (4, 5, 6)], version=0, finish_reasons=("stop", "length")
    )
    server = FakeRolloutServer(batches=lambda step: [group])

    a_trainer(tmp_path, server, max_steps=2, overlong="keep", learning_rate=1e-9).train()

    first, second = lines_of(tmp_path / "metrics.jsonl")
    assert first["reward/mean"] == 0.5
    assert first["reward/std"] == 0.5
    assert first["completion/mean"] == 2.5
    assert first["completion/truncated_frac"] == 0.5
    assert (first["tokens/step"], first["tokens/forward"], first["n_sequences"]) == (5, 7, 2)
    assert (first["staleness/max"], second["staleness/max"]) == (0, 1)
    # The engine claims e^-1 for each token, the random model gives about 1/32: the ratio is far below the cap.
    assert first["is/truncated_frac"] == 0.0
    assert first["entropy"] == pytest.approx(3.46, abs=0.05)
    assert first["mismatch/ratio_max"] == pytest.approx(torch.e / 32, rel=0.4)


def test_a_stale_batch_is_refused(tmp_path: Path) -> None:
    server = FakeRolloutServer(batches=lambda step: random_groups(step, sequences=8, version=0))

    with pytest.raises(StalenessError, match="max_staleness=1"):
        a_trainer(tmp_path, server, max_staleness=1).train()

    assert server.said("ack") == [("ack", 0, 1), ("ack", 1, 2)]


def test_a_trainer_that_was_replaced_stops(tmp_path: Path) -> None:
    server = FakeRolloutServer()

    def take_over(step: int) -> None:
        if step == 2:
            server.session += 1

    server.on_lease = take_over
    with pytest.raises(FencedError):
        a_trainer(tmp_path, server).train()


def test_training_goes_on_without_an_engine(tmp_path: Path) -> None:
    server, publisher = FakeRolloutServer(), FakePublisher()
    publisher.is_up = False

    a_trainer(tmp_path, server, publisher=publisher).train()

    assert server.said("ack", "policy") == [("ack", 0, None), ("ack", 1, None), ("ack", 2, None)]


@pytest.mark.parametrize("options", [{}, {"use_peft": True}], ids=["whole", "adapter"])
def test_a_publisher_is_made_from_the_configuration(tmp_path: Path, options: dict[str, Any]) -> None:
    server = FakeRolloutServer()
    config = a_config(tmp_path, max_steps=1, inference_servers=["http://127.0.0.1:9"], **options)

    GRPOTrainer(config, model=tiny_llama(), connect=server.client).train()

    assert server.said("ack", "policy") == [("ack", 0, None)]  # nobody answers on that port


def test_a_run_that_publishes_nowhere_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = FakeRolloutServer()

    GRPOTrainer(a_config(tmp_path, max_steps=1), model=tiny_llama(), connect=server.client).train()

    assert "no inference server gets new weights: name them in inference_servers" in caplog.text
    assert server.said("ack", "policy") == [("policy", 0), ("ack", 0, 1)]


def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "weight_decay": 0.1}
    a_trainer(tmp_path / "whole", FakeRolloutServer(), **options).train()
    server, publisher = FakeRolloutServer(), FakePublisher()

    def crash(step: int) -> None:
        if step == 4:
            server.session += 1

    server.on_lease = crash
    with pytest.raises(FencedError):
        a_trainer(tmp_path / "cut", server, **options, prefetch=0).train()
    assert (server.committed_step, server.acknowledged_step) == (4, 4)
    # The checkpoint after 4 steps was not finished: the run goes on from 2.
    (tmp_path / "cut" / "checkpoints" / "checkpoint-4" / checkpoints.MARKER).unlink()
    server.committed_step, server.on_lease, server.events = 2, lambda step: None, []
    a_trainer(tmp_path / "cut", server, publisher=publisher, lm=tiny_llama(seed=9), **options).train()

    whole, resumed = weights_in(tmp_path / "whole" / "final"), weights_in(tmp_path / "cut" / "final")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert server.said("lease") == [("lease", 2), ("lease", 3), ("lease", 4)]
    # The engines already ran version 4: nothing older is published on the way there.
    assert publisher.published == [4, 5]
    assert server.said("ack") == [("ack", 2, None), ("ack", 3, 4), ("ack", 4, 5)]
    steps = [line["step"] for line in lines_of(tmp_path / "cut" / "ledger" / "trainer.jsonl")]
    assert steps == [0, 1, 2, 3, 4, 2, 3, 4]  # step 4 was taken, but another trainer had the run when it said so


def test_a_finished_run_that_is_started_again_only_saves(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    server = FakeRolloutServer()
    a_trainer(tmp_path, server, **options).train()
    server.events.clear()

    a_trainer(tmp_path, server, **options).train()

    assert server.said("lease", "ack") == []
    assert server.said("commit") == [("commit", 3)]


def test_a_run_whose_batches_are_gone_says_what_to_do(tmp_path: Path) -> None:
    server = FakeRolloutServer(committed_step=7)

    with pytest.raises(TrainerError, match=r"checkpoint after 7 steps.* is after 0; give the output_dir"):
        a_trainer(tmp_path, server).train()


def test_a_request_to_stop_ends_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    server = FakeRolloutServer()
    trainer = a_trainer(tmp_path, server, max_steps=50, save_strategy="steps", save_steps=50, prefetch=0)
    server.on_lease = lambda step: trainer.request_stop("SIGTERM") if step == 3 else None

    trainer.train()

    assert server.committed_step == 4
    assert checkpoints.last_complete(tmp_path / "checkpoints") == (tmp_path / "checkpoints" / "checkpoint-4", 4)
    assert not (tmp_path / "final").exists()


def test_a_request_to_stop_while_waiting_ends_with_a_checkpoint(tmp_path: Path) -> None:
    server = FakeRolloutServer(waits_until=lambda step: step < 2)
    trainer = a_trainer(tmp_path, server, max_steps=50, save_strategy="steps", save_steps=50)
    server.on_lease = lambda step: threading.Timer(0.2, trainer.request_stop, ["SIGINT"]).start() if step == 2 else None

    trainer.train()

    assert server.committed_step == 2
    assert server.said("ack")[-1][1] == 1


def test_the_configuration_is_saved_beside_the_checkpoints(tmp_path: Path) -> None:
    own = tmp_path / "trainer.yaml"
    own.write_text("mine")

    a_trainer(tmp_path, FakeRolloutServer(), max_steps=1).train()

    assert (tmp_path / "trainer_resolved.yaml").read_text().count("max_steps: 1") == 1
    assert own.read_text() == "mine"


# LoRA

ADAPTER: dict[str, Any] = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "down_proj"]}


def test_engines_get_the_adapter_alone_and_checkpoints_hold_it(tmp_path: Path) -> None:
    publisher = FakePublisher()

    a_trainer(tmp_path, FakeRolloutServer(), publisher=publisher, **ADAPTER).train()

    saved = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert publisher.weights.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in publisher.weights.items())
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


def test_other_transports_get_the_adapter_merged_in(tmp_path: Path) -> None:
    publisher = FakePublisher()

    a_trainer(
        tmp_path, FakeRolloutServer(), publisher=publisher, weight_sync=WeightSyncConfig(transport="gloo"), **ADAPTER
    ).train()

    base = dict(tiny_llama().named_parameters())
    trained = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "final")).merge_and_unload()
    assert publisher.weights.keys() == base.keys()
    for name, expected in trained.named_parameters():
        torch.testing.assert_close(publisher.weights[name], expected, msg=name)
    moved = {name.split(".")[-2] for name, tensor in publisher.weights.items() if not torch.equal(tensor, base[name])}
    assert moved == {"q_proj", "down_proj"}


def test_an_adapter_resumes_where_it_was(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, **ADAPTER}
    a_trainer(tmp_path / "whole", FakeRolloutServer(), **options).train()
    server = FakeRolloutServer()
    cut = a_trainer(tmp_path / "cut", server, prefetch=0, **options)
    server.on_lease = lambda step: cut.request_stop("test") if step == 1 else None
    cut.train()
    server.on_lease = lambda step: None

    a_trainer(tmp_path / "cut", server, **{**options, "seed": 5}).train()

    assert server.said("commit")[-1] == ("commit", 3)
    whole, resumed = (load_file(tmp_path / run / "final" / "adapter_model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# Several optimizer steps on one batch


def counted_forwards(trainer: GRPOTrainer) -> list[bool]:
    """Of each forward pass of the policy, whether it was for a gradient."""
    seen: list[bool] = []
    trainer.model.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    return seen


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, 0),
        ({"beta": 0.0, "correction": "bypass", "ppo_epochs": 2}, 0),
        ({"num_minibatches": 2}, 1),
        ({"ppo_epochs": 3}, 1),
    ],
    ids=["one-step", "bypass", "minibatches", "epochs"],
)
def test_an_extra_pass_is_made_only_where_the_policy_moves_within_the_step(
    tmp_path: Path, options: dict[str, Any], extra: int
) -> None:
    trainer = a_trainer(tmp_path, FakeRolloutServer(), max_steps=1, max_tokens_per_micro_batch=1000, **options)
    seen = counted_forwards(trainer)

    trainer.train()

    minibatches, epochs = options.get("num_minibatches", 1), options.get("ppo_epochs", 1)
    assert seen.count(True) == minibatches * epochs
    assert seen.count(False) == extra * minibatches


def test_minibatches_and_epochs_are_steps_of_the_optimizer_and_one_of_the_run(tmp_path: Path) -> None:
    server = FakeRolloutServer()
    trainer = a_trainer(tmp_path, server, max_steps=2, num_minibatches=2, ppo_epochs=3, max_tokens_per_micro_batch=1000)
    trainer.create_optimizer()
    assert trainer.optimizer is not None
    taken: list[float] = []
    trainer.optimizer.register_step_post_hook(lambda *_: taken.append(1.0))

    trainer.train()

    assert len(taken) == 2 * 2 * 3
    assert server.said("ack") == [("ack", 0, 1), ("ack", 1, 2)]
    first, second = lines_of(tmp_path / "metrics.jsonl")
    assert first["ratio/mean"] != 1.0
    assert first["ratio/clip_frac_high"] + first["ratio/clip_frac_low"] > 0
    assert second["step"] == 1


def test_each_minibatch_is_averaged_over_itself(tmp_path: Path) -> None:
    shares = [
        share_of_rank(
            build_step_batch(
                3, random_groups(3, sequences=8), advantage_scale="none", overlong="mask", temperature=1.0
            ),
            rank=rank,
            ranks=2,
            max_tokens=24,
            hidden_size=16,
            aggregation="token_mean",
            max_completion_length=None,
            shares_prompts=True,
            num_minibatches=4,
            seed=1,
        )
        for rank in range(2)
    ]

    for parts in zip(*(share.minibatches for share in shares), strict=True):
        assert len({len(micro_batches) for micro_batches in parts}) == 1
        weights = torch.cat([micro.loss_weights_M for micro_batches in parts for micro in micro_batches])
        assert float(weights.sum()) == pytest.approx(1.0)


# Reference


def test_the_policy_is_held_near_its_reference(tmp_path: Path) -> None:
    def kl_after(run: str, **options: Any) -> float:
        a_trainer(tmp_path / run, FakeRolloutServer(), max_steps=6, beta=1e-6, **options).train()
        return float(lines_of(tmp_path / run / "metrics.jsonl")[-1]["loss/kl"])

    free = kl_after("free")
    a_trainer(tmp_path / "held", FakeRolloutServer(), max_steps=6, beta=5.0).train()
    held = lines_of(tmp_path / "held" / "metrics.jsonl")

    assert held[0]["loss/kl"] == 0.0
    assert 0 < held[-1]["loss/kl"] < free / 2


def test_an_adapter_run_has_its_base_as_the_reference(tmp_path: Path) -> None:
    a_trainer(tmp_path, FakeRolloutServer(), beta=0.1, **ADAPTER).train()

    first, *_, last = lines_of(tmp_path / "metrics.jsonl")
    assert first["loss/kl"] == 0.0
    assert last["loss/kl"] > 0


def test_the_environments_reference_needs_no_pass(tmp_path: Path) -> None:
    group = a_group("g", ref_logprobs=np.full(9, -2.0, dtype=np.float32))
    trainer = a_trainer(tmp_path, FakeRolloutServer(batches=lambda step: [group]), max_steps=1, beta=0.1, **ADAPTER)
    seen = counted_forwards(trainer)

    trainer.train()

    assert all(seen)
    assert lines_of(tmp_path / "metrics.jsonl")[0]["loss/kl"] > 0


def test_a_reference_that_moves_is_the_same_after_resuming(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **{"beta": 1.0, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
        **{"save_strategy": "steps", "save_steps": 1, "max_steps": 3},
    }
    a_trainer(tmp_path / "whole", FakeRolloutServer(), **options).train()
    server = FakeRolloutServer()
    cut = a_trainer(tmp_path / "cut", server, prefetch=0, **options)
    server.on_lease = lambda step: cut.request_stop("test") if step == 1 else None
    cut.train()
    server.on_lease = lambda step: None

    a_trainer(tmp_path / "cut", server, **options).train()

    whole, resumed = weights_in(tmp_path / "whole" / "final"), weights_in(tmp_path / "cut" / "final")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# Losses that are no numbers


def poisoned(step: int) -> list[Group]:
    groups = random_groups(step, sequences=8)
    # A number, but its square is none.
    bad = np.full(groups[0].n_tokens, 3e38, dtype=np.float32)
    return [Group(**{**vars(groups[0]), "advantages": bad}), *groups[1:]]


@pytest.mark.parametrize("options", [{}, {"num_minibatches": 2}], ids=["one", "minibatches"])
def test_a_loss_that_is_no_number_leaves_the_weights_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    server = FakeRolloutServer(batches=lambda step: poisoned(step) if step == 1 else random_groups(step, sequences=8))
    publisher = FakePublisher()
    seen: list[dict[str, Tensor]] = []

    class Publisher(FakePublisher):
        def publish(self, version: int, weights: Any) -> Any:
            result = super().publish(version, weights)
            seen.append(self.weights)
            return result

    publisher = Publisher()
    a_trainer(tmp_path, server, publisher=publisher, weight_decay=0.1, **options).train()

    metrics = lines_of(tmp_path / "metrics.jsonl")
    assert [line["step/skipped"] for line in metrics] == [0, 1, 0]
    assert server.said("ack") == [("ack", 0, 1), ("ack", 1, 2), ("ack", 2, 3)]
    assert all(tensor.isfinite().all() for tensor in publisher.weights.values())
    # The other minibatch of the batch is trained on.
    assert all(torch.equal(seen[1][name], seen[2][name]) for name in seen[1]) is (not options)
    assert not all(torch.equal(seen[2][name], seen[3][name]) for name in seen[2])


def test_a_run_whose_losses_stay_no_numbers_ends_and_says_so(tmp_path: Path) -> None:
    server = FakeRolloutServer(batches=poisoned)

    with pytest.raises(NonFiniteError, match=r"step 2: .* 2 steps before it"):
        a_trainer(tmp_path, server, max_steps=9).train()


# The constructor


def test_both_names_of_the_configuration_and_of_the_tokenizer_are_taken(tmp_path: Path) -> None:
    tokenizer = SavedBeside()

    trainer = GRPOTrainer(
        args=a_config(tmp_path, max_steps=1),
        model=tiny_llama(),
        tokenizer=tokenizer,
        connect=FakeRolloutServer().client,
    )
    trainer.train()

    assert trainer.processing_class is tokenizer
    assert tokenizer.folders == [str(tmp_path / "final.draft")]


class SavedBeside:
    """A FAKE tokenizer that remembers where it was saved."""

    def __init__(self) -> None:
        self.folders: list[str] = []

    def save_pretrained(self, folder: Path) -> None:
        self.folders.append(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tokenizer": SavedBeside(), "processing_class": SavedBeside()},
            "tokenizer and processing_class are two names",
        ),
        ({"model": "other/model"}, "model='other/model' is not the configuration's model_name_or_path"),
    ],
)
def test_two_different_values_of_one_thing_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOTrainer(a_config(tmp_path), **{"model": tiny_llama(), **options})
    with pytest.raises(ConfigError, match="config and args are two names"):
        GRPOTrainer(a_config(tmp_path), args=a_config(tmp_path), model=tiny_llama())


def test_an_optimizer_a_schedule_and_figures_of_ones_own_are_used(tmp_path: Path) -> None:
    lm = tiny_llama()
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    GRPOTrainer(
        a_config(tmp_path),
        model=lm,
        optimizers=(optimizer, schedule),
        compute_metrics=lambda batch: {"own/groups": float(len(batch.group_ids))},
        connect=FakeRolloutServer().client,
    ).train()

    metrics = lines_of(tmp_path / "metrics.jsonl")
    assert [line["own/groups"] for line in metrics] == [2.0] * 3
    assert [line["learning_rate"] for line in metrics] == [0.5, 0.25, 0.125]


def test_override_points_and_callbacks_are_called_and_their_errors_end_the_run(tmp_path: Path) -> None:
    called: list[str] = []

    class Trainer(GRPOTrainer):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            called.append("epoch")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            called.append(f"step {state.global_step}")
            if state.global_step == 2:
                raise RuntimeError("enough")

    class Callback(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            called.append("callback")

    trainer = Trainer(
        a_config(tmp_path), model=tiny_llama(), callbacks=[Callback()], connect=FakeRolloutServer().client
    )
    with pytest.raises(RuntimeError, match="enough"):
        trainer.train()

    assert called == ["epoch", "callback", "step 1", "callback", "step 2"]


# Gradients


def gradients(tmp_path: Path, **options: Any) -> dict[str, Tensor]:
    """Of one step over random_groups(0), just before the optimizer takes them."""
    lm = tiny_llama()
    found: dict[str, Tensor] = {}
    trainer = a_trainer(tmp_path, FakeRolloutServer(), lm=lm, max_steps=1, max_grad_norm=0.0, **options)
    trainer.create_optimizer()
    assert trainer.optimizer is not None
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in lm.named_parameters()})
    )
    trainer.train()
    return found


def plain_gradients() -> dict[str, Tensor]:
    """The same step computed the plain way: one sequence after the other, all logits, no packing, no trainer."""
    lm = tiny_llama()
    batch = build_step_batch(0, random_groups(0, sequences=8), advantage_scale="none", overlong="mask", temperature=1.0)
    total = torch.zeros(())
    for sequence in batch.sequences:
        tokens = torch.from_numpy(sequence.tokens_L.astype("int64"))
        logprobs = lm(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        assert sequence.inference_logprobs_L is not None
        weights = (logprobs.detach() - torch.from_numpy(sequence.inference_logprobs_L[1:])).exp().clamp(max=2.0)
        ratios = (logprobs - logprobs.detach()).exp()
        losses = -weights * ratios * torch.from_numpy(sequence.advantages_L[1:])
        total = total + losses[torch.from_numpy(sequence.is_trained_L[1:])].sum()
    (total / batch.trained_tokens).backward()
    return {name: p.grad for name, p in lm.named_parameters()}


@pytest.mark.parametrize("max_tokens", [1, 24, 1000])
@pytest.mark.parametrize("chunk_size", [3, 1000])
def test_packing_and_chunking_change_no_gradient(tmp_path: Path, max_tokens: int, chunk_size: int) -> None:
    found = gradients(tmp_path, max_tokens_per_micro_batch=max_tokens, logprob_chunk_size=chunk_size)

    for name, expected in plain_gradients().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7, msg=name)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    plain, recomputed = gradients(tmp_path / "a"), gradients(tmp_path / "b", gradient_checkpointing=True)

    assert all(torch.allclose(plain[name], recomputed[name], rtol=1e-5, atol=1e-8) for name in plain)


def test_idle_passes_add_exactly_nothing() -> None:
    batch = build_step_batch(
        0, [a_group("g", completions=[(7,), (8,)])], advantage_scale="none", overlong="mask", temperature=1.0
    )
    shares = [
        share_of_rank(
            batch,
            rank=rank,
            ranks=4,
            max_tokens=100,
            hidden_size=16,
            aggregation="token_mean",
            max_completion_length=None,
            shares_prompts=True,
        )
        for rank in range(4)
    ]
    (idle,) = next(s.micro_batches for s in shares if not s.micro_batches[0].loss_weights_M.any())
    policy = PackedPolicy(tiny_llama(), chunk_size=4)

    logprobs, _ = policy(
        idle.input_ids_1T,
        idle.position_ids_1T,
        idle.segments_1T,
        idle.prefixes_1T,
        idle.target_positions_M,
        idle.target_ids_M,
        idle.temperatures_M,
    )
    (logprobs * idle.loss_weights_M).sum().backward()

    # Every parameter takes part, so that no collective misses one.
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())
    whole = cluster(batch.sequences, [0, 1], capacity=100, shares_prompts=True)
    assert build_micro_batch(batch.sequences, whole, [1.0, 1.0]).loss_weights_M.all()


def test_sequences_without_a_policy_gradient_are_not_computed_and_change_nothing(tmp_path: Path) -> None:
    level = a_group("level", rewards=[1.0, 1.0], completions=[(7, 3), (4, 5, 6)])
    lms = [tiny_llama(), tiny_llama()]

    # An entropy term that weighs next to nothing makes every sequence count.
    for run, lm, entropy_coef in zip("ab", lms, (0.0, 1e-12), strict=True):
        server = FakeRolloutServer(batches=lambda step: [a_group("g"), level])
        a_trainer(tmp_path / run, server, lm=lm, max_steps=1, optim="sgd", entropy_coef=entropy_coef).train()

    skipped, computed = (lines_of(tmp_path / run / "metrics.jsonl")[0] for run in "ab")
    assert (skipped["tokens/forward"], computed["tokens/forward"]) == (7, 14)
    assert skipped["loss/pg"] == pytest.approx(computed["loss/pg"])
    for (name, parameter), (_, other) in zip(lms[0].named_parameters(), lms[1].named_parameters(), strict=True):
        torch.testing.assert_close(parameter, other, msg=name)
