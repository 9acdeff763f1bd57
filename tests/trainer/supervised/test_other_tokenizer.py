"""GKD with a teacher whose tokenizer is another: spans of text instead of one vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from atroposlib.errors import ConfigError
from tests.trainer.supervised.fakes import ROWS, gkd_config, tiny_model, tokenizer
from tests.trainer.supervised.test_gkd_trainer import sharp
from tests.trainer.supervised.test_sft_trainer import examples_of
from trainer.supervised.examples import Example, with_completion
from trainer.supervised.gkd_trainer import GKDTrainer, aligns
from trainer.supervised.span_scores import SpanScorer
from trainer.supervised.teacher import Teacher, load_teacher

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def word_tokenizer() -> Any:
    """Merges of letters, a chat template of its own, and another end."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        ["ab cd e fgh abab cdcd fgfgh"] * 4,
        BpeTrainer(
            vocab_size=300, special_tokens=["</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    config = gkd_config(tmp_path_factory.mktemp("teacher"))
    words = word_tokenizer()
    return load_teacher(config, words, lm=tiny_model(3, vocabulary=len(words)))


def plain_logprob(lm: Any, prompt: list[int], completion: list[int]) -> list[float]:
    logits = lm(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return [float(logits[len(prompt) + i - 1, token].detach()) for i, token in enumerate(completion)]


def test_a_span_has_the_teachers_logprob_of_its_text(teacher: Teacher) -> None:
    student, words = tokenizer(), teacher.tokenizer
    (example,) = examples_of(ROWS[:1])
    sampled = with_completion(example, [*student.encode("fgh ab", add_special_tokens=False), 2], is_sampled=True)
    scorer = SpanScorer(teacher, student, ends=frozenset({2}), max_tokens=64)

    (found,) = scorer.scores([sampled])

    ids = words.encode("fgh ab", add_special_tokens=False)
    prompt = words.encode("[user]say ab</s>[assistant]", add_special_tokens=False)
    expected = plain_logprob(teacher.lm, prompt, [*ids, words.eos_token_id])
    assert 1 < len(ids) < 6
    # Letters are the student's tokens: every token of the teacher is a span, and the end is one.
    assert found.teacher_logprobs == pytest.approx(expected, rel=1e-4)
    offsets = words("fgh ab", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert found.span_of_token == [i for i, (start, end) in enumerate([*offsets, (0, 1)]) for _ in range(end - start)]


def test_a_completion_without_an_end_gets_none(teacher: Teacher) -> None:
    student = tokenizer()
    (example,) = examples_of(ROWS[:1])
    sampled = with_completion(example, student.encode("ab", add_special_tokens=False), is_sampled=True)

    (found,) = SpanScorer(teacher, student, ends=frozenset({2}), max_tokens=64).scores([sampled])

    assert len(found.teacher_logprobs) == len(teacher.tokenizer.encode("ab", add_special_tokens=False))


def a_trainer(run_dir: Path, **options: Any) -> GKDTrainer:
    words = word_tokenizer()
    return GKDTrainer(
        gkd_config(run_dir, **options),
        model=tiny_model(0),
        teacher_model=sharp(3, vocabulary=len(words)),
        tokenizer=tokenizer(),
        teacher_processing_class=words,
        train_dataset=ROWS,
    )


@pytest.mark.parametrize(
    "options", [{"lmbda": 1.0}, {"lmbda": 0.0}, {"lmbda": 0.0, "seq_kd": True}], ids=["student", "data", "teacher"]
)
def test_runs_with_every_source_of_completions(tmp_path: Path, options: dict[str, Any]) -> None:
    a_trainer(tmp_path, **options).train()

    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][1:]
    assert len(steps) == 3
    assert all(step["sampled_frac"] == options["lmbda"] for step in steps)
    assert all(abs(step["loss"]) < 100 and step["grad_norm"] > 0 for step in steps)
    if options["lmbda"]:
        assert all(step["in_spans_frac"] > 0.5 for step in steps)


def test_one_vocabulary_cannot_be_asked_of_two_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"259 tokens.*have two: give align_teacher_template=auto"):
        a_trainer(tmp_path, align_teacher_template=False)


def test_auto_aligns_where_tokenizers_or_templates_differ(tmp_path: Path) -> None:
    config, other = gkd_config(tmp_path), tokenizer()
    other.chat_template = TEMPLATE

    assert not aligns(config, tokenizer(), tokenizer())
    assert aligns(config, tokenizer(), word_tokenizer())
    assert aligns(config, tokenizer(), other)
    assert not aligns(gkd_config(tmp_path, align_teacher_template=False), tokenizer(), other)
    assert aligns(gkd_config(tmp_path, align_teacher_template=True), tokenizer(), tokenizer())


def test_options_that_mean_nothing_then_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    aligns(gkd_config(tmp_path, beta=0.1), tokenizer(), word_tokenizer())

    assert "KL(student || teacher) over spans of text" in caplog.text
    assert "beta has no effect" in caplog.text


@pytest.mark.parametrize(
    ("options", "is_asked"),
    [({"lmbda": 0.0}, False), ({"lmbda": 0.5}, True), ({"lmbda": 0.0, "seq_kd": True}, True)],
    ids=["data", "student", "teacher"],
)
def test_a_teacher_that_is_never_asked_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], is_asked: bool
) -> None:
    aligns(gkd_config(tmp_path, **options), tokenizer(), word_tokenizer())

    assert ("never asks the teacher" in caplog.text) is not is_asked


def test_one_tokenizer_needs_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    aligns(gkd_config(tmp_path, beta=0.1), tokenizer(), tokenizer())

    assert "spans" not in caplog.text
    assert "effect" not in caplog.text


def test_an_empty_prompt_is_a_start_token_for_the_teacher(teacher: Teacher) -> None:
    student, words = tokenizer(), teacher.tokenizer
    # The student's first token says nothing as text, and the teacher's tokenizer adds none of its own.
    text = [student.bos_token_id, *student.encode("fgh", add_special_tokens=False)]
    example = Example(np.array(text, dtype=np.int32), np.arange(len(text)) >= 1, is_sampled=True)

    (found,) = SpanScorer(teacher, student, ends=frozenset({2}), max_tokens=64).scores([example])

    ids = words.encode("fgh", add_special_tokens=False)
    assert found.teacher_logprobs == pytest.approx(plain_logprob(teacher.lm, [words.eos_token_id], ids), rel=1e-4)


def test_a_completion_after_nothing_is_no_question_for_a_teacher(teacher: Teacher) -> None:
    with pytest.raises(AssertionError, match="a prompt of at least one token"):
        teacher.logprobs([([], [5, 6])], max_tokens=8)
