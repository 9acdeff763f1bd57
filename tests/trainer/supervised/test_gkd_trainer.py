"""GKD: the loss and gradient of a plain reference, whose completions are learnt, evaluation, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from atroposlib.data import DataConfig
from atroposlib.errors import ConfigError, DataError
from tests.trainer.supervised.fakes import HELD_OUT, ROWS, gkd_config, tiny_model, tokenizer
from tests.trainer.supervised.plain import divergence, step_of_descent
from tests.trainer.supervised.test_sft_trainer import examples_of
from trainer.supervised.config import GKDConfig
from trainer.supervised.distillation import source_of_step
from trainer.supervised.gkd_trainer import GKDTrainer


def sharp(seed: int, **options: Any) -> Any:
    """A random model that is sure of itself."""
    lm = tiny_model(seed, **options)
    with torch.no_grad():
        lm.model.embed_tokens.weight.mul_(20)
    return lm


def a_trainer(run_dir: Path, **options: Any) -> GKDTrainer:
    objects: dict[str, Any] = {
        name: options.pop(name)
        for name in ("model", "teacher_model", "teacher_processing_class", "train_dataset", "eval_dataset")
        if name in options
    }
    defaults: dict[str, Any] = {
        "model": sharp(0),
        "teacher_model": sharp(1),
        "teacher_processing_class": tokenizer(),
        "train_dataset": ROWS,
        "eval_dataset": HELD_OUT,
    }
    return GKDTrainer(gkd_config(run_dir, **options), tokenizer=tokenizer(), **(defaults | objects))


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


PLAIN = {"batch_size": len(ROWS), "max_steps": 1, "optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0}


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.5},
        {"beta": 0.0},
        {"beta": 1.0, "packing": False},
        {"beta": 0.2, "kd_temperature": 0.7, "logprob_chunk_size": 1000},
    ],
    ids=["middle", "forward", "reverse", "temperature"],
)
def test_a_step_is_that_of_the_plain_divergence(tmp_path: Path, options: dict[str, Any]) -> None:
    student = sharp(0)
    how = {"beta": options["beta"], "temperature": options.get("kd_temperature", 1.0)}
    loss = divergence(student, sharp(1), examples_of(ROWS), **how)
    expected = step_of_descent(student, loss, learning_rate=0.01)

    a_trainer(tmp_path, **PLAIN, **options).train()

    assert lines_of(tmp_path)[1]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "final").named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_rescaling_only_scales(tmp_path: Path) -> None:
    a_trainer(tmp_path / "plain", **PLAIN, beta=0.1).train()
    a_trainer(tmp_path / "scaled", **PLAIN, beta=0.1, jsd_rescale=True).train()

    plain, scaled = (lines_of(tmp_path / run)[1]["loss"] for run in ("plain", "scaled"))
    assert scaled == pytest.approx(plain / 0.36, rel=1e-5)


def test_the_student_comes_to_say_what_the_teacher_says(tmp_path: Path) -> None:
    a_trainer(tmp_path, max_steps=25, batch_size=8, learning_rate=0.05, model=tiny_model(0), beta=0.0).train()

    lines = [line for line in lines_of(tmp_path) if "teacher_cross_entropy" in line]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["teacher_cross_entropy"] < lines[0]["teacher_cross_entropy"] - 0.5


def test_a_teacher_whose_output_layer_is_padded_has_the_same_vocabulary(tmp_path: Path) -> None:
    teacher = sharp(1)
    padded = sharp(1, vocabulary=320)
    with torch.no_grad():
        padded.load_state_dict(
            {name: padded.state_dict()[name].index_copy(0, torch.arange(len(value)), value) if "embed" in name or "lm_head" in name
             else value for name, value in teacher.state_dict().items()}
        )  # fmt: skip
    a_trainer(tmp_path / "plain", **PLAIN).train()
    a_trainer(tmp_path / "padded", **PLAIN, teacher_model=padded).train()

    plain, found = (lines_of(tmp_path / run)[1]["loss"] for run in ("plain", "padded"))
    assert found == pytest.approx(plain, rel=1e-5)


def short(positions: int) -> Any:
    """A teacher of few positions."""
    lm = sharp(1)
    lm.config.max_position_embeddings = positions
    return lm


def test_max_seq_length_is_bounded_by_the_teachers_positions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_seq_length=128 .* 64 positions of the teacher"):
        a_trainer(tmp_path, teacher_model=short(64))


def test_max_seq_length_that_is_not_given_is_lowered_to_the_teachers_positions(tmp_path: Path) -> None:
    given = gkd_config(tmp_path)
    config = GKDConfig(
        **{name: getattr(given, name) for name in ("run_dir", "model_name_or_path", "teacher_model_name_or_path")},
        eval_strategy="no",
    )
    trainer = GKDTrainer(
        config, model=sharp(0), teacher_model=short(32), tokenizer=tokenizer(), teacher_processing_class=tokenizer(),
        train_dataset=[*ROWS, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 90}]}],
    )  # fmt: skip

    assert config.max_seq_length == 32
    assert max(len(each.tokens_L) for each in trainer._examples) == 32


def test_a_teacher_with_fewer_tokens_than_its_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="teacher embeddings for 100: give teacher_tokenizer_name_or_path=FOLDER"):
        a_trainer(tmp_path, teacher_model=tiny_model(1, vocabulary=100))


def test_one_coin_a_step_decides_whose_completions_are_learnt() -> None:
    chosen = [source_of_step(step, lmbda=0.5, seq_kd=False, seed=1) for step in range(2000)]

    assert 900 < chosen.count("student") < 1100
    assert chosen == [source_of_step(step, lmbda=0.5, seq_kd=False, seed=1) for step in range(2000)]
    assert {source_of_step(step, lmbda=1.0, seq_kd=False, seed=1) for step in range(99)} == {"student"}
    assert {source_of_step(step, lmbda=0.0, seq_kd=True, seed=1) for step in range(99)} == {"teacher"}


def test_on_policy_steps_learn_the_students_own_words(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, lmbda=1.0, max_new_tokens=5)
    data = examples_of(ROWS)

    found = trainer._objective.completed(0, data)
    again = trainer._objective.completed(0, data)
    other = trainer._objective.completed(1, data)

    assert all(each.is_sampled for each in found)
    assert all((each.prompt == known.prompt).all() for each, known in zip(found, data, strict=True))
    assert all(1 <= each.trained_tokens <= 5 for each in found)
    assert [each.tokens_L.tolist() for each in found] == [each.tokens_L.tolist() for each in again]
    assert [each.tokens_L.tolist() for each in found] != [each.tokens_L.tolist() for each in other]


def first_tokens(trainer: GKDTrainer, count: int) -> Any:
    """How often each token was sampled as the first of a completion."""
    (example,) = examples_of(ROWS[:1])
    sampled = trainer._objective.completed(0, [example] * count)
    return torch.bincount(torch.tensor([int(each.tokens_L[-1]) for each in sampled]), minlength=259)


ONE_TOKEN = {"lmbda": 1.0, "max_new_tokens": 1, "generation_batch_size": 300}


def test_a_sampled_token_has_its_probability_at_the_temperature(tmp_path: Path) -> None:
    student = sharp(0)
    trainer = a_trainer(tmp_path, model=student, temperature=0.5, **ONE_TOKEN)
    prompt = torch.from_numpy(examples_of(ROWS[:1])[0].prompt).long()[None]
    expected = (student(input_ids=prompt).logits[0, -1] / 0.5).softmax(-1).detach()

    found = first_tokens(trainer, 600) / 600

    assert float((found - expected).abs().sum() / 2) < 0.15


def test_no_token_is_left_out_of_the_sampling_whatever_the_checkpoint_says(tmp_path: Path) -> None:
    student = tiny_model(0)
    student.generation_config.top_k = 1
    trainer = a_trainer(tmp_path, model=student, **ONE_TOKEN)

    # About alike probable, all of them; 50 would be the likeliest that transformers keeps by default.
    assert int((first_tokens(trainer, 600) > 0).sum()) > 150


def test_seq_kd_learns_the_teachers_words(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, seq_kd=True, temperature=0.01, max_new_tokens=4)
    (example,) = trainer._objective.completed(0, examples_of(ROWS[:1]))
    teacher = sharp(1)
    prompt = torch.from_numpy(example.prompt).long()[None]
    likeliest = teacher.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)

    assert (
        example.tokens_L[len(example.prompt) :].tolist()
        == likeliest[0, prompt.shape[1] :].tolist()[: example.trained_tokens]
    )
    assert not example.is_sampled


def test_an_on_policy_run_trains_on_prompts_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {word}", "ground_truth": word} for word in "abcd"]
    a_trainer(tmp_path, lmbda=1.0, train_dataset=rows, max_steps=2).train()

    assert [line["sampled_frac"] for line in lines_of(tmp_path)[1:]] == [1.0, 1.0]


def test_prompts_alone_are_refused_where_the_datas_completions_are_learnt(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 0"):
        a_trainer(tmp_path, lmbda=0.5, train_dataset=[{"prompt": "say a"}])


def test_an_evaluation_measures_divergence_success_and_length(tmp_path: Path) -> None:
    trainer = a_trainer(
        tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, eval_on_start=True, learning_rate=1e-9,
        baseline_success=0.0, baseline_tokens=12.0, load_best_model_at_end=False,
    )  # fmt: skip
    trainer.train()

    found = [line for line in lines_of(tmp_path) if "eval_loss" in line]
    expected = divergence(sharp(0), sharp(1), examples_of(HELD_OUT), beta=0.5).item()
    assert [line["step"] for line in found] == [0, 1]
    assert found[0]["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert found[0]["eval_success_rate"] == 0.0
    assert 1 <= found[0]["eval_avg_tokens"] <= 6
    assert found[0]["metrics/token_reduction"] == pytest.approx(1 - found[0]["eval_avg_tokens"] / 12)
    assert found[0]["metrics/meets_target"] == 0.0


def test_sessions_of_the_runtime_are_measured_against_a_baseline(tmp_path: Path) -> None:
    session = {
        "task": "add",
        "session_metadata": {"ground_truth": "4", "status": "succeeded"},
        "trajectory_events": [{"actor": "student", "text": "is it 5?"}, {"actor": "teacher", "text": "It is 4."}],
    }
    export = tmp_path / "export.jsonl"
    export.write_text("".join(json.dumps({**session, "id": number}) + "\n" for number in range(5)))
    sessions = DataConfig(loader="runtime_traces", form="conversation", dataset_path=export, eval_split_ratio=0.4)
    trainer = a_trainer(
        tmp_path / "run", data=sessions, train_dataset=None, eval_dataset=None, max_steps=1, eval_strategy="steps",
        eval_steps=1, baseline_success=0.75, load_best_model_at_end=False,
    )  # fmt: skip
    trainer.train()

    found = lines_of(tmp_path / "run")[-1]
    assert found["eval_success_rate"] == 0.0
    assert found["metrics/success_delta"] == -0.75


def test_evaluation_prompts_hold_no_word_of_the_assistants(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=False)

    assert [[message["role"] for message in each.messages] for each in trainer._asked.questions] == [["user"]] * 2
    assert [each.ground_truth for each in trainer._asked.questions] == ["zz", "y"]


def test_a_run_on_its_own_words_goes_on_as_if_it_had_not_been_cut(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lmbda": 0.5, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    a_trainer(tmp_path / "whole", **options).train()
    trainer = a_trainer(tmp_path / "cut", **options)
    trainer.request_stop("test")
    trainer.train()
    assert trainer.state.global_step == 1

    a_trainer(tmp_path / "cut", **options).train()

    whole, found = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / run / "final").named_parameters())
        for run in ("whole", "cut")
    )
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
