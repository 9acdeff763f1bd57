"""SFT: the loss and gradient of a plain reference, runs that resume, evaluate, and keep the best model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from atroposlib.errors import ConfigError
from tests.trainer.supervised.fakes import HELD_OUT, ROWS, sft_config, tiny_model, tokenizer
from tests.trainer.supervised.plain import cross_entropy, step_of_descent
from trainer.supervised.examples import Example, prepare, row_tokenizer
from trainer.supervised.sft_trainer import SFTTrainer


def a_trainer(run_dir: Path, **options: Any) -> SFTTrainer:
    objects: dict[str, Any] = {
        name: options.pop(name) for name in ("model", "callbacks", "train_dataset") if name in options
    }
    config = sft_config(run_dir, **options)
    defaults: dict[str, Any] = {"model": tiny_model(), "train_dataset": ROWS}
    return SFTTrainer(config, tokenizer=tokenizer(), eval_dataset=HELD_OUT, **(defaults | objects))


def examples_of(rows: list[dict[str, Any]]) -> list[Example]:
    tokenize = row_tokenizer(
        tokenizer(), completion_only=True, last_turn_only=False, response_marker=None, takes_prompts=False
    )
    return prepare(rows, tokenize, max_seq_length=128)[0]


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


class StopAfter(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize(
    "options",
    [{}, {"packing": False}, {"max_tokens_per_micro_batch": 70}, {"logprob_chunk_size": 1000}],
    ids=["packed", "one-a-pass", "small-passes", "one-chunk"],
)
def test_a_step_is_that_of_the_plain_loss_however_it_is_cut(tmp_path: Path, options: dict[str, Any]) -> None:
    lm = tiny_model()
    loss = cross_entropy(lm, examples_of(ROWS))
    expected = step_of_descent(lm, loss, learning_rate=0.5)

    a_trainer(
        tmp_path, batch_size=len(ROWS), max_steps=1, optim="sgd", learning_rate=0.5, max_grad_norm=0.0, **options
    ).train()

    assert lines_of(tmp_path)[1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    found = weights_of(tmp_path / "final")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_run_learns_its_rows_and_leaves_a_model_with_its_tokenizer(tmp_path: Path) -> None:
    a_trainer(tmp_path, max_steps=-1, num_train_epochs=15, batch_size=8, learning_rate=0.03).train()

    lines = lines_of(tmp_path)
    assert lines[0]["data/rows"] == len(ROWS)
    assert [line["step"] for line in lines[1:]] == list(range(1, 16))
    assert lines[-1]["loss"] < 0.6 * lines[1]["loss"]
    assert lines[-1]["epoch"] == 15
    assert AutoTokenizer.from_pretrained(tmp_path / "final").eos_token == "<|im_end|>"
    assert (tmp_path / "trainer_resolved.yaml").is_file()


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    # 3 steps an epoch; the run is cut in the middle of the second.
    options: dict[str, Any] = {"batch_size": 3, "max_steps": 7, "save_strategy": "steps", "save_steps": 2}
    a_trainer(tmp_path / "whole", **options).train()
    a_trainer(tmp_path / "cut", callbacks=[StopAfter(4)], **options).train()
    assert not (tmp_path / "cut" / "final").exists()

    a_trainer(tmp_path / "cut", model=tiny_model(seed=9), **options).train()

    whole, found = weights_of(tmp_path / "whole" / "final"), weights_of(tmp_path / "cut" / "final")
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    losses = {line["step"]: line["loss"] for line in lines_of(tmp_path / "cut") if "loss" in line}
    expected = {line["step"]: line["loss"] for line in lines_of(tmp_path / "whole") if "loss" in line}
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_run_that_goes_on_with_other_rows_is_told_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"batch_size": 3, "max_steps": 5, "save_strategy": "steps"}
    a_trainer(tmp_path, callbacks=[StopAfter(4)], **options).train()
    a_trainer(tmp_path, callbacks=[StopAfter(5)], **options | {"max_steps": 6}).train()
    assert "steps an epoch" not in caplog.text

    a_trainer(tmp_path, train_dataset=ROWS[:5], **options | {"max_steps": 6}).train()

    assert "the checkpoint had 3 steps an epoch, and these rows and batch_size make 2" in caplog.text


def test_a_request_to_stop_leaves_a_checkpoint(tmp_path: Path) -> None:
    class Ask(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            trainer.request_stop("test")

    trainer = a_trainer(tmp_path, max_steps=5, save_strategy="steps", callbacks=[Ask()])
    trainer.train()

    assert trainer.state.global_step == 1
    assert (tmp_path / "checkpoints" / "checkpoint-1" / "atropos.json").is_file()


def test_evaluation_is_the_plain_loss_on_the_rows_held_out(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, max_steps=4, eval_steps=2, learning_rate=1e-9)
    trainer.train()

    found = [line for line in lines_of(tmp_path) if "eval_loss" in line]
    expected = cross_entropy(tiny_model(), examples_of(HELD_OUT)).item()
    assert [line["step"] for line in found] == [2, 4]
    assert found[0]["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert found[0]["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_the_best_checkpoint_becomes_the_final_model(tmp_path: Path) -> None:
    # So large a rate that held-out rows get worse with every step.
    options = {"eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.3, "save_total_limit": 2}
    trainer = a_trainer(tmp_path, max_steps=4, **options)
    trainer.train()

    losses = {line["step"]: line["eval_loss"] for line in lines_of(tmp_path) if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    final, kept = (weights_of(tmp_path / part) for part in ("final", f"checkpoints/checkpoint-{best}"))
    assert best < 4
    for name, value in kept.items():
        torch.testing.assert_close(final[name], value, rtol=0, atol=0, msg=name)


def test_without_rows_held_out_there_is_no_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = sft_config(tmp_path, max_steps=2, eval_steps=1, save_strategy="steps", save_steps=1)
    trainer = SFTTrainer(config, model=tiny_model(), tokenizer=tokenizer(), train_dataset=ROWS)
    trainer.train()

    assert "no row is held out" in caplog.text
    assert "give eval_dataset" in caplog.text
    assert not any("eval_loss" in line for line in lines_of(tmp_path))
    assert (tmp_path / "final").is_dir()


def test_rows_to_evaluate_on_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_dataset goes with train_dataset: give both"):
        a_trainer(tmp_path, train_dataset=None)


def test_checkpoints_and_evaluations_of_each_epoch(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "do_eval": True, "load_best_model_at_end": False}
    a_trainer(tmp_path, max_steps=-1, num_train_epochs=2, **options).train()

    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert [line["step"] for line in lines_of(tmp_path) if "eval_loss" in line] == [2, 4]


def test_an_adapter_alone_is_trained_and_saved(tmp_path: Path) -> None:
    a_trainer(tmp_path, use_peft=True, lora_r=2, learning_rate=0.05).train()

    adapter = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    assert not (tmp_path / "final" / "model.safetensors").exists()


def test_an_adapter_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"use_peft": True, "lora_r": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    a_trainer(tmp_path / "whole", **options).train()
    a_trainer(tmp_path / "cut", callbacks=[StopAfter(2)], **options).train()
    a_trainer(tmp_path / "cut", **options).train()

    whole, cut = (load_file(tmp_path / run / "final" / "adapter_model.safetensors") for run in ("whole", "cut"))
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_loss_that_is_no_number_changes_no_weight(tmp_path: Path) -> None:
    lm = tiny_model()
    with torch.no_grad():
        lm.model.norm.weight[0] = math.nan
    trainer = a_trainer(tmp_path, model=lm, max_steps=1)
    before = lm.model.layers[0].mlp.up_proj.weight.clone()
    trainer.train()

    assert torch.equal(lm.model.layers[0].mlp.up_proj.weight, before)
    assert lines_of(tmp_path)[1]["step/skipped"] == 1


def test_max_seq_length_is_bounded_by_the_models_positions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_seq_length=4096 .* 256 positions"):
        a_trainer(tmp_path, max_seq_length=4096)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="259 tokens and the model embeddings for 100"):
        a_trainer(tmp_path, model=tiny_model(vocabulary=100))
